"""imagenet-linear and places205-linear: classifiers of all layers on a frozen trunk and augmented images."""

import copy
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from recorded_training import exit_codes, start_ranks
from scipy.stats import norm
from shard_sets import ShardMaker

from bowstore.cli import main
from bowstore.config import ModelConfig, ViewConfig, Workspace, places
from bowstore.data.index import Index
from bowstore.data.plan import Schedule, plans
from bowstore.errors import DataError, MissingError, UsageError
from bowstore.evaluate import layer_heads
from bowstore.evaluate.augmented import augmented, light, square_windows
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.fitting import shares
from bowstore.evaluate.protocol import Network
from bowstore.evaluate.protocols import imagenet_linear, places205_linear
from bowstore.evaluate.protocols.imagenet_linear import ImageNetSettings
from bowstore.evaluate.protocols.places205_linear import PlacesSettings
from bowstore.evaluate.runner import evaluate
from bowstore.evaluate.splits import NUMBERS, open_splits
from bowstore.models.pooling import choose_pool, named_taps, pooled_shapes
from bowstore.models.registry import build_backbone
from bowstore.models.saved import load_backbone, network_of, save_backbone
from bowstore.train.distributed import World
from bowstore.train.schedule import learning_rate, total_steps

ALONE = World(0, 1, torch.device("cpu"))
VIEW = ViewConfig(size=16, resize=18, cutmix=True)
NAMES = ["conv1", "block1", "block2", "block3", "pooled"]
SMALL = ImageNetSettings(own_images=True, epochs=2, batch=8)


@pytest.fixture
def workspace(make_shard_set: ShardMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with labelled shards of eight classes and a network with running statistics that are not the first."""
    make_shard_set(40, folder="data/train", classes=8)
    make_shard_set(16, folder="data/val", classes=8, first=40)
    (tmp_path / "bowstore.yaml").write_text("shards: data/train\n")
    saved = network_of({"name": "r", "task": "words", "view": VIEW.model_dump(), "model": {"arch": "wrn-10-1"}}, "test")
    torch.manual_seed(3)
    backbone = saved.fresh().train()
    backbone(torch.randn(8, 3, 16, 16))
    save_backbone(tmp_path / "net.safetensors", backbone.eval(), saved)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["eval", *arguments, "--run", "net.safetensors"])


def rates(settings: Any, images: int, iterations: tuple[int, ...]) -> tuple[int, list[float]]:
    """Steps in all, and the rates of iterations, counted from 1."""
    optim = settings.recipe.schedule.optim(settings, images, lr=0.01)
    assert (optim.batch, optim.momentum) == (256, 0.9)
    of_a_pass = images // 256
    return total_steps(optim, of_a_pass), [learning_rate(number - 1, optim, of_a_pass) for number in iterations]


def test_learning_rates_at_iterations() -> None:
    imagenet, places = NUMBERS["imagenet"][1], NUMBERS["places205"][1]
    fair = (1, 40_000, 40_001, 80_000, 80_001, 120_000, 120_001)
    expected = [0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5]
    for settings, images in ((ImageNetSettings(schedule="fair"), imagenet), (PlacesSettings(schedule="fair"), places)):
        steps, found = rates(settings, images, fair)
        assert steps == 140_000
        assert found == pytest.approx(expected)
    for settings, images, first, second, last in (  # 5,004 and 9,565 iterations an epoch
        (ImageNetSettings(), imagenet, 50_040, 100_080, 140_112),
        (PlacesSettings(), places, 47_825, 95_650, 133_910),
        (PlacesSettings(schedule="obow"), places, 95_650, 191_300, 267_820),
        (ImageNetSettings(epochs=7), imagenet, 12_510, 25_020, 35_028),
        (ImageNetSettings(schedule="fair", epochs=14), imagenet, 20_016, 40_032, 70_056),
    ):
        steps, found = rates(settings, images, (1, first, first + 1, second, second + 1))
        assert steps == last
        assert found == pytest.approx([0.01, 0.01, 1e-3, 1e-3, 1e-4])


def test_what_changes_a_number_is_in_the_id() -> None:
    for settings, protocol_id in (
        (ImageNetSettings(), "imagenet-linear/bownet"),
        (ImageNetSettings(batch=256, epochs=28, seed=3), "imagenet-linear/bownet"),
        (ImageNetSettings(schedule="fair"), "imagenet-linear/fair"),
        (ImageNetSettings(schedule="fair", epochs=28), "imagenet-linear/fair/28-epochs"),
        (ImageNetSettings(epochs=4, batch=64), "imagenet-linear/bownet/4-epochs/batch-64"),
        (ImageNetSettings(own_images=True, layers=("conv4",)), "imagenet-linear/bownet/conv4/own-images"),
        (ImageNetSettings(own_images=True, held_out=True), "imagenet-linear/bownet/own-images-held-out"),
        (PlacesSettings(), "places205-linear/bownet"),
        (PlacesSettings(schedule="obow"), "places205-linear/obow"),
    ):
        protocol = imagenet_linear.describe(settings)
        assert (protocol.id, protocol.version) == (protocol_id, 1)
        assert protocol.headline == ("top1_pooled" if settings.schedule == "obow" else "top1_best")
    assert imagenet_linear.describe(PlacesSettings(layers=("pooled",))).headline == "top1_pooled"


def test_what_each_schedule_is() -> None:
    """Protocols 3.3 and 3.4."""
    network = ViewConfig(size=64, resize=None, mean=(0.5, 0.5, 0.5), area=(0.3, 1.0), flip=False)
    for settings, decay, nesterov, jitter in (
        (ImageNetSettings(), 1e-4, True, 0.0),
        (ImageNetSettings(schedule="fair"), 1e-4, True, 0.4),
        (PlacesSettings(), 1e-4, True, 0.0),
        (PlacesSettings(schedule="obow"), 1e-5, False, 0.0),
    ):
        recipe, seen = settings.recipe, settings.seen(network)
        assert (recipe.weight_decay, recipe.nesterov, recipe.lighting > 0) == (decay, nesterov, jitter > 0)
        assert (seen.brightness, seen.contrast, seen.saturation, seen.hue, seen.grey) == (jitter, jitter, jitter, 0, 0)
        assert (seen.size, seen.resize, seen.area, seen.flip, seen.mean) == (224, 256, (0.08, 1), True, network.mean)
    own = ImageNetSettings(own_images=True).seen(network)
    assert (own.size, own.resize, own.cutmix) == (64, None, False)
    assert PlacesSettings(schedule="obow").chosen == ("pooled",)
    assert PlacesSettings(schedule="obow").recipe.square_crop


def test_maps_of_resnet50_have_the_published_sizes() -> None:
    backbone = build_backbone(ModelConfig(arch="resnet50"))
    names = ["conv1", "pool1", "conv2", "conv3", "conv4", "conv5", "pooled"]
    taps = named_taps(backbone, names, size=224)
    assert [a * b for a, b in pooled_shapes(backbone, taps, 224)] == [9216, 9216, 9216, 8192, 9216, 8192, 2048]


def test_a_protocol_on_class_folders(workspace: Path) -> None:
    done = call("imagenet-linear", "--epochs", "2", "--batch", "8", "--json")
    assert done.exit_code == 0, done.output
    said = done.stderr
    assert "data/train and what is tested on are not imagenet (1000 classes, 1281167 train and 50000 test im" in said
    assert "imagenet-linear: 80/80 images" in said
    result = json.loads((workspace / "net/eval/imagenet-linear-bownet-2-epochs-batch-8-own-images.json").read_text())
    assert result == json.loads(done.stdout)
    assert list(result["metrics"]) == ["top1_best", *(f"top{k}_{name}" for k in (1, 5) for name in NAMES)]
    assert result["metrics"]["top1_best"] == max(result["metrics"][f"top1_{name}"] for name in NAMES[:-1])
    assert all(0 <= share <= 1 and (16 * share).is_integer() for share in result["metrics"].values())
    assert result["headline"] == "top1_best"
    assert result["inputs"]["dataset"] is None
    assert result["settings"]["view"]["size"] == 16
    assert result["settings"]["test_view"]["resize"] == 18
    assert (result["settings"]["ranks"], result["settings"]["probe"]["milestones"]) == (1, [4, 7])
    assert result["settings"]["taps"]["block3"] == {"of": "block3 average grid 4x4", "dims": 1024}
    assert len(result["details"]["block1"]["losses"]) == 2
    again = call("imagenet-linear", "--epochs", "2", "--batch", "8", "--json")
    assert json.loads(again.stdout)["metrics"] == result["metrics"]
    assert json.loads(again.stdout)["details"] == result["details"]


def test_the_trunk_stays_and_each_head_learns_as_it_would_alone(workspace: Path) -> None:
    """Against heads in float64 that are stepped by hand on maps that are pooled by hand."""
    data = open_splits(Path("data/train"), Path("data/val"))
    network = Network(backbone=load_backbone(Path("net.safetensors")).backbone, view=VIEW)
    before = copy.deepcopy(network.backbone.state_dict())
    scores = layer_heads.run(network, data, SMALL, ALONE)
    after = network.backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    trunk = copy.deepcopy(network.backbone).double().eval()
    shape_of = {name: head["dims"] for name, head in scores.settings["taps"].items()}
    torch.manual_seed(0)
    weights = []
    for name in NAMES:
        linear = torch.nn.Linear(shape_of[name], 8)  # draws its first weights as the heads do
        torch.nn.init.normal_(linear.weight, std=0.01)
        torch.nn.init.zeros_(linear.bias)
        weights.append([linear.weight.detach().double(), linear.bias.detach().double()])
    momenta = [[torch.zeros_like(value) for value in pair] for pair in weights]
    losses: list[list[float]] = []
    seen = SMALL.seen(VIEW)
    for step, (images_BCHW, labels) in enumerate(
        augmented(data["train"], seen, batch=8, seed=0, world=ALONE, steps=10)
    ):
        rate = 0.01 * (1, 0.1, 0.01)[(step >= 4) + (step >= 7)]
        with torch.no_grad():
            maps = trunk.feature_maps(images_BCHW.double(), trunk.layers)
        pooled = [choose_pool(*map_Bchw.shape[1:])(map_Bchw) for map_Bchw in maps.values()]
        pooled.append(maps["block3"].mean((2, 3), keepdim=True))
        each = []
        for pooled_Bchw, pair, speeds in zip(pooled, weights, momenta, strict=True):
            mean, var = pooled_Bchw.mean((0, 2, 3), keepdim=True), pooled_Bchw.var((0, 2, 3), False, keepdim=True)
            for value in pair:
                value.requires_grad_()
            normed_Bd = ((pooled_Bchw - mean) / (var + 1e-5).sqrt()).flatten(1)
            loss = F.cross_entropy(F.linear(normed_Bd, *pair), torch.from_numpy(labels))
            for value, speed, gradient in zip(pair, speeds, torch.autograd.grad(loss, pair), strict=True):
                value.requires_grad_(False)
                gradient = gradient + 1e-4 * value
                speed.mul_(0.9).add_(gradient)
                value -= rate * (gradient + 0.9 * speed)  # Nesterov's
            each.append(loss.item())
        losses.append(each)
    expected = np.array(losses).reshape(2, 5, 5).mean(axis=1)  # five steps a pass
    found = np.array([scores.details[name]["losses"] for name in NAMES]).T
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def on_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    train, test = Path(folder, "data/train"), Path(folder, "data/val")
    settings = SMALL.model_copy(update={"train": places(train), "test": test, "layers": ("block2", "pooled")})
    with Path(folder, f"shown-{rank}").open("w") as file, redirect_stderr(file):
        evaluate(imagenet_linear.KIND, settings, EvalConfig(run=str(Path(folder, "net.safetensors"))), Workspace())


def test_two_ranks_give_what_one_gives(workspace: Path) -> None:
    on_two(0, str(workspace))
    path = workspace / "net/eval/imagenet-linear-bownet-block2-pooled-2-epochs-batch-8-own-images.json"
    one = json.loads(path.read_text())
    path.unlink()
    assert exit_codes(start_ranks(on_two, 2, (str(workspace),))) == [0, 0]
    shown = [(workspace / f"shown-{rank}").read_text() for rank in range(2)]
    assert ["imagenet-linear: 80/80" in text for text in shown] == [True, False]  # rank 0 alone shows progress
    two = json.loads(path.read_text())
    assert (one["settings"]["ranks"], two["settings"]["ranks"]) == (1, 2)
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-9)
    for name in ("block2", "pooled"):
        assert two["details"][name]["losses"] == pytest.approx(one["details"][name]["losses"], rel=1e-5)


@pytest.mark.parametrize(("classes", "expected"), [(4, [0.1]), (5, [0.1]), (6, [0.1, 0.5])])
def test_top5_is_of_more_than_five_classes(classes: int, expected: list[float]) -> None:
    found = shares(np.array([1, 2, 3, 4, 5][:classes]), 10, classes, "conv5")
    assert found == dict(zip(("top1_conv5", "top5_conv5"), expected, strict=False))


def test_what_is_interrupted_or_broken_leaves_nothing(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SMALL.model_copy(update={"train": places("data/train"), "test": Path("data/val")})
    for error in (KeyboardInterrupt(), DataError("x")):
        with monkeypatch.context() as patch:
            patch.setattr(layer_heads, "count_hits", lambda *_a, error=error, **_k: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)):
                evaluate(imagenet_linear.KIND, settings, EvalConfig(run="net.safetensors"), Workspace())
    loaded = load_backbone(Path("net.safetensors"))
    for value in loaded.backbone.parameters():
        value.data.fill_(torch.nan)
    save_backbone(Path("broken.safetensors"), loaded.backbone, loaded.saved)
    with pytest.raises(DataError, match=r"features of the first test images: .*: NaN or infinity for .*c0/"):
        evaluate(imagenet_linear.KIND, settings, EvalConfig(run="broken.safetensors"), Workspace())
    assert not (workspace / "net").exists()
    assert not (workspace / "broken").exists()


def test_what_a_user_can_get_wrong_is_one_line(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (["--batch", "64"], "batch 64 is more than the 40 train images; give --batch 32 or less, or more images"),
        (["--batch", "30"], "batch 30 must be a multiple of 4 (processes x 4); give another --batch, or start fewer"),
        (["--batch", "8", "--layer", "conv4"], "wrn-10-1 has no layer 'conv4'; its layers are conv1, block1, block2"),
        (["--batch", "8", "--layer", "block1", "--layer", "block1"], "must be different ones, one at least"),
    ):
        done = call("imagenet-linear", "--own-images", *arguments)
        assert done.exit_code == 2, done.output
        assert message in done.stderr
    done = call("places205-linear")
    assert "40 train images are fewer than a batch of 256: the batch is 32, in an id of its own" in done.stderr
    workspace.joinpath("data/val").rename(workspace / "elsewhere")
    with pytest.raises(MissingError, match="give --test, or --held-out to test on a tenth of each train class"):
        evaluate(
            places205_linear.KIND,
            PlacesSettings(),
            EvalConfig(run="net.safetensors"),
            Workspace(shards=Path("data/train")),
        )


def test_too_few_images(make_shard_set: ShardMaker, tmp_path: Path) -> None:
    make_shard_set(3, folder="few", classes=2)
    make_shard_set(4, folder="test", classes=2, first=3)
    settings = ImageNetSettings(train=tmp_path / "few", test=tmp_path / "test", own_images=True)
    with pytest.raises(DataError, match="3 train images are fewer than the 4 of the smallest batch; use more images"):
        imagenet_linear.data(settings, Workspace())
    other = settings.model_copy(update={"train": tmp_path / "test", "test": tmp_path / "few", "batch": 8})
    with pytest.raises(UsageError, match="batch 8 is more than the 4 train images; give --batch 4 or less"):
        imagenet_linear.data(other, Workspace())
    other = other.model_copy(update={"batch": 4})
    assert imagenet_linear.data(other, Workspace()).view == {}  # the network's own, or --size
    published = other.model_copy(update={"own_images": False})
    assert imagenet_linear.data(published, Workspace()).view == {"size": 224, "resize": 256}


class TestPerturbation:
    """What obow's crop and FAIR's lighting are, by the numbers that they are drawn from."""

    def index(self, make_shard_set: ShardMaker) -> Index:
        return make_shard_set(64, size=40)

    def test_a_square_of_the_resized_image(self, make_shard_set: ShardMaker) -> None:
        index = self.index(make_shard_set)
        view = ViewConfig(size=28, resize=32)
        plan = next(plans(Schedule(64, 64, 1), index, view, start=0, stop=1))
        windows = square_windows(plan, index.height, index.width, view)
        height_B, width_B = index.height[plan.rows], index.width[plan.rows]
        side_B = np.rint(np.minimum(height_B, width_B) * 7 / 8)
        assert (windows[:, 2] == side_B).all()
        assert (windows[:, 3] == side_B).all()
        assert (windows[:, :2] >= 0).all()
        assert (windows[:, 0] + side_B <= height_B).all()
        assert (windows[:, 1] + side_B <= width_B).all()
        for column, length_B in ((0, height_B), (1, width_B)):
            room_B = length_B - side_B
            assert (windows[:, column] == 0).any()
            assert (windows[:, column] == room_B).any()
        without = square_windows(plan, index.height, index.width, ViewConfig(size=28, resize=None))
        np.testing.assert_array_equal(without, windows)  # 8/7 of the crop, as 256 is of 224

    def test_light_along_the_principal_colours(self, make_shard_set: ShardMaker) -> None:
        index = self.index(make_shard_set)
        plan = next(plans(Schedule(64, 64, 1), index, ViewConfig(size=16, resize=16), start=0, stop=1))
        lit_B3 = light(plan, 0.1)
        values = [0.2175, 0.0188, 0.0045]
        vectors = [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
        for draw, lit in zip(plan.task_draws(3), lit_B3, strict=True):
            shares = [0.1 * norm.ppf(u) for u in draw]
            expected = [sum(vectors[c][k] * shares[k] * values[k] for k in range(3)) for c in range(3)]
            np.testing.assert_allclose(lit, expected, rtol=1e-9)
        assert 0.005 < lit_B3.std(axis=0).mean() < 0.02

    def test_both_reach_the_images(self, make_shard_set: ShardMaker, tmp_path: Path) -> None:
        self.index(make_shard_set)
        split = open_splits(tmp_path / "shards", None)["train"]
        view = ImageNetSettings(own_images=True).seen(ViewConfig(size=28, resize=32))
        how: dict[str, Any] = {"batch": 16, "seed": 0, "world": ALONE, "steps": 1}
        ((plain, labels),) = augmented(split, view, **how)
        ((lit, lit_labels),) = augmented(split, view, lighting=0.1, **how)
        ((square, _),) = augmented(split, view, square_crop=True, **how)
        np.testing.assert_array_equal(labels, lit_labels)
        difference = (lit - plain).double()
        assert torch.allclose(difference, difference.mean((2, 3), keepdim=True), atol=1e-5)  # one colour an image
        assert 0.005 < difference.std() * 0.226 < 0.04
        assert not torch.allclose(square, plain, atol=0.1)
