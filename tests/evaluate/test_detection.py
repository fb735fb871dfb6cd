"""Detection: schedules, images, the detector's parts, and small trainings from beginning to end."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from recorded_training import exit_codes, start_ranks
from torch import nn
from voc_devkit import COLOURS, write_boxed_devkit

from bowstore.cli import main
from bowstore.config import ModelConfig, ViewConfig, Workspace
from bowstore.errors import DataError, MismatchError, TrainingError, UsageError
from bowstore.evaluate import detection, voc_boxes
from bowstore.evaluate.detection_images import Draw, Images, loaded, resized, train_draws
from bowstore.evaluate.detector import AlignedPool, Anchors, build_detector, residual_stages, synchronised
from bowstore.evaluate.protocol import DataSets, Network, Scores
from bowstore.evaluate.protocols import voc0712_detection as settings_of
from bowstore.evaluate.protocols.voc0712_detection import SCHEDULES, SMALL, DetectionSettings, Schedule, describe
from bowstore.models.registry import build_backbone
from bowstore.models.saved import load_checkpoint, network_of, save_backbone
from bowstore.runs import checkpoints
from bowstore.train.distributed import World, joined

TESTED = "timm:test_resnet"  # one block a stage, half a million parameters
ALONE = World(0, 1, torch.device("cpu"))
TINY = replace(
    SMALL, iterations=6, drops=(5,), warmup=2, batch=2, sides=(48, 64), test_side=64, anchors=(16, 32), pooled=4,
    samples=8, kept_in_training=(60, 20), kept_in_test=(60, 10), precise=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_boxed_devkit(tmp_path_factory.mktemp("kit"), trainval=10, test=4, side=64)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Schedule:
    monkeypatch.setattr(settings_of, "SMALL", TINY)
    monkeypatch.setattr(detection, "_LOG_EVERY", 2)
    return TINY


def opened(devkit: Path, **settings: Any) -> tuple[DetectionSettings, DataSets]:
    asked = DetectionSettings.model_validate({"voc": devkit, "small": True, **settings})
    return asked, voc_boxes.data(asked, Workspace())


def train_split(devkit: Path) -> voc_boxes.BoxedSplit:
    split = opened(devkit)[1]["train"]
    assert isinstance(split, voc_boxes.BoxedSplit)
    return split


def small_network(folder: Path | None = None) -> Network:
    made = network_of({"name": "r", "task": "words", "model": {"arch": TESTED}, "seed": 3}, "test")
    return Network(backbone=made.fresh(), view=made.view, folder=folder)


# --- schedules and ids


def test_the_paper_s_schedule() -> None:
    plan = SCHEDULES["bownet"]
    assert plan.sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (plan.iterations, plan.batch, plan.frozen, plan.test_side, plan.longest) == (25_000, 16, 2, 800, 1333)
    for iteration, rate in ((0, 2e-5), (500, 0.01001), (1000, 0.02), (16_999, 0.02), (17_000, 0.002), (24_999, 0.002)):
        assert plan.rate_at(iteration) == pytest.approx(rate), iteration


def test_each_schedule_is_a_protocol() -> None:
    ids = {name: describe(DetectionSettings(schedule=name)).id for name in SCHEDULES}
    assert ids == {
        "bownet": "voc0712-detection/bownet",
        "moco": "voc0712-detection/moco",
        "vissl": "voc0712-detection/vissl",
        "obow": "voc0712-detection/obow",
        "voc07": "voc07-detection/vissl",
    }
    small = describe(DetectionSettings(small=True))
    assert (small.id, small.headline) == ("voc0712-detection/small", "AP")
    known = {
        name: (plan.rate, plan.iterations, plan.drops, plan.warmup, plan.frozen) for name, plan in SCHEDULES.items()
    }
    assert known == {
        "bownet": (0.02, 25_000, (17_000,), 1000, 2),
        "moco": (0.02, 24_000, (18_000, 22_000), 100, 0),
        "vissl": (0.02, 24_000, (18_000, 22_000), 1000, 0),
        "obow": (0.01, 24_000, (18_000, 22_000), 100, 0),
        "voc07": (0.02, 12_500, (9500,), 100, 0),
    }
    with pytest.raises(
        ValueError, match="small has a schedule of its own, and schedule is moco; leave one of them out"
    ):
        DetectionSettings(small=True, schedule="moco")


# --- images


def test_sizes_are_detectron2_s() -> None:
    assert resized(375, 500, short=800, longest=1333) == (800, 1067)
    assert resized(500, 375, short=480, longest=1333) == (640, 480)
    assert resized(200, 500, short=800, longest=1333) == (533, 1333)  # bounded by its long side


def test_draws_are_a_function_of_seed_and_iteration(devkit: Path) -> None:
    split = train_split(devkit)
    plan = replace(TINY, batch=2)
    whole = list(islice(train_draws(split, plan, 5), 40))
    assert list(islice(train_draws(split, plan, 5, start=17), 23)) == whole[17:]
    assert list(islice(train_draws(split, plan, 6), 40)) != whole
    assert {draw.short for batch in whole for draw in batch} == {48, 64}
    assert {draw.mirrored for batch in whole for draw in batch} == {False, True}
    wide = split.sizes[:, 1] > split.sizes[:, 0]
    assert all(len({bool(wide[draw.row]) for draw in batch}) == 1 and len(batch) == 2 for batch in whole)
    counts = np.bincount([draw.row for batch in whole for draw in batch], minlength=10)
    assert counts.min() >= 7, counts  # eight passes over ten images, of which a few may wait
    assert counts.max() <= 9, counts


def test_images_without_objects_are_not_trained_on(devkit: Path) -> None:
    split = train_split(devkit)
    empty = voc_boxes.Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_))
    split = replace(split, objects=(empty, *split.objects[1:]))
    assert all(draw.row for batch in islice(train_draws(split, TINY, 0), 40) for draw in batch)


@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_stay_around_what_they_are_of(devkit: Path, mirrored: bool) -> None:
    """Discs: the middle of a box has its class's colour, and the corners of the image have not."""
    split = train_split(devkit)
    images = Images(split, longest=120)
    for row in range(len(split)):
        shown = images[Draw(row, 96, mirrored)]
        assert not isinstance(shown, Exception)
        assert min(shown.image.shape[1:]) in (90, 96)  # of 64 x 48 pixels 120 x 90, bounded by the long side
        assert shown.row == row
        for box, label in zip(shown.target["boxes"].tolist(), shown.target["labels"].tolist(), strict=True):
            if box[2] - box[0] > 14:  # not the speck
                x, y = round((box[0] + box[2]) / 2), round((box[1] + box[3]) / 2)
                colour = shown.image[:, y - 3 : y + 3, x - 3 : x + 3].float().mean((1, 2))
                expected = torch.tensor(COLOURS[split.classes[label - 1]], dtype=torch.float32)
                assert (colour - expected).abs().max() < 25, (row, box, label)
                # Its left and right ends touch the box: there is colour just inside, and none just outside.
                ends = shown.image[:, y, [round(box[0]) + 2, round(box[2]) - 3]].float()
                assert (ends - expected[:, None]).abs().max() < 60


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_one_line(tmp_path: Path, workers: int) -> None:
    split = train_split(write_boxed_devkit(tmp_path, trainval=3, test=3, side=64))
    split.paths[1].write_bytes(split.paths[1].read_bytes()[:-700])
    draws = [[Draw(0, 64)], [Draw(1, 64)]]
    batches = loaded(Images(split, 1000), draws, workers)
    assert [shown.row for shown in next(batches)] == [0]
    with pytest.raises(DataError, match=r"image .*000002.jpg cannot be decoded \(image file is truncated") as error:
        next(batches)
    assert "\n" not in str(error.value)
    split.paths[1].unlink()
    found = Images(split, 1000)[Draw(1, 64)]
    assert "no image" in str(found)
    shutil.copy(split.paths[0], split.paths[1])
    assert isinstance(Images(replace(split, sizes=split.sizes + 1), 1000)[Draw(1, 64)], DataError)


# --- the detector


def test_anchors_are_exact() -> None:
    anchors = Anchors(((32, 64),), ((0.5, 1.0, 2.0),)).cell_anchors[0]
    sides = (anchors[:, 2:] - anchors[:, :2]).tolist()
    np.testing.assert_allclose(
        sides, [[45.2548, 22.6274], [90.5097, 45.2548], [32, 32], [64, 64], [22.6274, 45.2548], [45.2548, 90.5097]],
        rtol=1e-5,
    )  # fmt: skip
    assert (anchors[:, :2] == -anchors[:, 2:]).all()


def test_pooling_is_aligned() -> None:
    """Of a map whose value is its column, cells 2 and 3 (pixels 32 to 64) have their middles at 2.5 and 3.5."""
    columns = torch.arange(8.0).expand(1, 1, 8, 8)
    pooled = AlignedPool(2)({"0": columns}, [torch.tensor([[32.0, 32, 64, 64]])], None)
    assert pooled[0, 0].tolist() == [[2, 3], [2, 3]]


def tiny_detector(plan: Schedule = TINY, arch: str = TESTED) -> Any:
    torch.manual_seed(0)
    return build_detector(build_backbone(ModelConfig(arch=arch)), ViewConfig(), plan, 3, ALONE)


def one_batch() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    images = [torch.rand(3, 64, 60), torch.rand(3, 50, 64)]
    boxes = [torch.tensor([[4.0, 5, 40, 44]]), torch.tensor([[10.0, 8, 30, 40], [30, 4, 60, 20]])]
    return images, [{"boxes": b, "labels": torch.arange(1, 1 + len(b))} for b in boxes]


def test_losses_are_detectron2_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of absolute differences and cross-entropies over what is sampled, computed one by one."""
    detector = tiny_detector()
    rpn, heads = detector.rpn, detector.roi_heads
    scores, deltas = torch.tensor([[0.5], [-1.0], [2.0], [0.0]]), torch.randn(4, 4)
    labels, wanted = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, -1.0])], [torch.randn(2, 4), torch.randn(2, 4)]
    objectness, boxes = rpn.compute_loss(scores, deltas, labels, wanted)
    probability = 1 / (1 + np.exp(-np.array([0.5, -1.0, 2.0])))
    expected = -(np.log(probability[0]) + np.log(1 - probability[1]) + np.log(1 - probability[2]))
    assert objectness.item() == pytest.approx(expected / (2 * 256), rel=1e-5)
    assert boxes.item() == pytest.approx((deltas[0] - wanted[0][0]).abs().sum().item() / (2 * 256), rel=1e-5)

    logits, regressed, target = torch.randn(3, 4), torch.randn(3, 16), torch.randn(3, 4)
    label = torch.tensor([2, 0, 1])
    monkeypatch.setattr(heads, "select_training_samples", lambda *_: ([torch.rand(3, 4)], None, [label], [target]))
    monkeypatch.setattr(heads.box_roi_pool, "forward", lambda *_: None)
    monkeypatch.setattr(heads.box_head, "forward", lambda _: None)
    monkeypatch.setattr(heads.box_predictor, "forward", lambda _: (logits, regressed))
    _, losses = heads.train()({}, [], [], [])
    each = [-(logits[n, k] - logits[n].logsumexp(0)) for n, k in enumerate(label.tolist())]
    assert losses["loss_classifier"].item() == pytest.approx(sum(each).item() / 3, rel=1e-5)
    absolute = (regressed[0, 8:12] - target[0]).abs().sum() + (regressed[2, 4:8] - target[2]).abs().sum()
    assert losses["loss_box_reg"].item() == pytest.approx(absolute.item() / 3, rel=1e-5)


def test_settings_of_the_parts_are_detectron2_s() -> None:
    with torch.device("meta") as nowhere:
        backbone, world = build_backbone(ModelConfig(arch="resnet50")), World(0, 1, nowhere)
        detector = build_detector(backbone, ViewConfig(), SCHEDULES["bownet"], 20, world)
    rpn, heads = detector.rpn, detector.roi_heads
    assert [rpn.train(mode).pre_nms_top_n() for mode in (True, False)] == [12_000, 6000]
    assert [rpn.train(mode).post_nms_top_n() for mode in (True, False)] == [2000, 1000]
    assert (rpn.nms_thresh, rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (
        0.7,
        256,
        0.5,
    )
    assert (rpn.proposal_matcher.low_threshold, rpn.proposal_matcher.high_threshold) == (0.3, 0.7)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (512, 0.25)
    assert (heads.box_coder.weights, rpn.box_coder.weights) == ((10, 10, 5, 5), (1, 1, 1, 1))
    assert (heads.box_roi_pool.side, heads.box_predictor.cls_score.in_features) == (14, 2048)
    assert [name for name, _ in heads.box_head.named_children()] == ["res5", "norm", "mean", "flat"]
    assert (rpn.head.cls_logits.out_channels, rpn.head.conv[0][0].in_channels) == (15, 1024)
    pixels = build_detector(build_backbone(ModelConfig(arch="resnet18")), ViewConfig(), TINY, 20, ALONE)
    assert pixels.roi_heads.box_predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert pixels.roi_heads.box_predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.1)


def test_the_first_stages_stay_and_all_others_learn() -> None:
    """Stem and conv2 with weights and statistics; the rest moves, batch norm without weight decay."""
    detector = tiny_detector(arch="resnet18").train()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    optimizer = detection.build_optimizer(detector, TINY)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    named = dict(detector.named_parameters())
    assert {name for name, p in named.items() if id(p) not in decays} == {
        n for n in named if n.startswith("backbone.frozen")
    }
    assert decays[id(named["roi_heads.box_head.norm.weight"])] == decays[id(named["roi_heads.box_head.norm.bias"])] == 0
    assert decays[id(named["roi_heads.box_predictor.cls_score.bias"])] == 1e-4
    sum(detector(*one_batch()).values()).backward()
    optimizer.step()
    moved = {name for name, value in detector.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in before if name not in moved} == {
        name for name in before if name.startswith("backbone.frozen")
    }
    assert not detector.backbone.frozen.training
    assert all(weight.requires_grad for weight in tiny_detector(replace(TINY, frozen=0)).parameters())


def test_any_residual_network_is_cut_to_the_same_stages() -> None:
    """A map of conv5 made of the five stages is the network's own; others are refused in a line."""
    image = torch.rand(1, 3, 64, 64)
    for arch in ("resnet18", "timm:resnet18", TESTED):
        backbone = build_backbone(ModelConfig(arch=arch)).eval()
        with torch.no_grad():
            map_BChw = image
            for stage in residual_stages(backbone):
                map_BChw = stage(map_BChw)
            torch.testing.assert_close(map_BChw, backbone.feature_maps(image, ["conv5"])["conv5"])
    for arch in ("wrn-10-1", "timm:mobilenetv3_small_050", "torchvision:squeezenet1_1", "timm:resnetv2_50"):
        with pytest.raises(
            UsageError, match=rf"{arch} has no stages conv1 to conv5 of a residual network, of which .* or t"
        ):
            residual_stages(build_backbone(ModelConfig(arch=arch)))


# --- trainings


def ran(devkit: Path, folder: Path | None = None, **settings: Any) -> Scores:
    asked, data = opened(devkit, **settings)
    return detection.run(small_network(folder), data, asked, ALONE)


@pytest.fixture(scope="module")
def uninterrupted(devkit: Path) -> Scores:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings_of, "SMALL", TINY)
        patch.setattr(detection, "_LOG_EVERY", 2)
        return ran(devkit)


def test_a_stopped_training_goes_on_to_the_same_result(
    tiny: Schedule, devkit: Path, uninterrupted: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of a logging interval, and again after the last iteration."""
    folder, place = tmp_path / "net.unfinished", detection._placed
    asked = {"checkpoint_every": 3}

    def until(stop: int) -> Callable[..., Any]:
        left = iter(range(stop))

        def placed(*given: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return place(*given)

        return placed

    monkeypatch.setattr(detection, "_placed", until(5))
    with pytest.raises(KeyboardInterrupt, match="run the command again to go on from step 3"):
        ran(devkit, folder, **asked)
    assert [path.name for path in checkpoints(folder)] == ["step-000000003.pt"]
    monkeypatch.setattr(detection, "_placed", until(4))  # three iterations, and one for the statistics
    with pytest.raises(KeyboardInterrupt):
        ran(devkit, folder, **asked)
    assert [load_checkpoint(path)["step"] for path in checkpoints(folder)] == [6]
    monkeypatch.setattr(detection, "_placed", place)
    scores = ran(devkit, folder, **asked)
    assert scores.details == uninterrupted.details
    assert scores.metrics == uninterrupted.metrics
    with pytest.raises(
        MismatchError, match=r"holds an unfinished evaluation with another seed; restore that, or remove"
    ):
        ran(devkit, folder, seed=1)


def test_what_a_result_says(uninterrupted: Scores) -> None:
    assert uninterrupted.metrics.keys() == {"AP50", "AP75", "AP"}
    assert uninterrupted.details["by_class"].keys() == {"blue", "green", "red"}
    curve = uninterrupted.details["curve"]
    assert [point["iteration"] for point in curve] == [2, 4, 6]
    parts = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(point["loss"] == pytest.approx(sum(point[part] for part in parts)) for point in curve)
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert (uninterrupted.settings["frozen"], uninterrupted.settings["sides"]) == (2, (48, 64))


def test_statistics_of_batch_norm_are_plain_means(tiny: Schedule, devkit: Path) -> None:
    """Over the batches that follow the training, of the extra norm: what each batch's own statistics are, averaged."""
    asked, data = opened(devkit)
    split = data["train"]
    assert isinstance(split, voc_boxes.BoxedSplit)
    detector, seen = tiny_detector(), []
    norm = detector.roi_heads.box_head.norm
    norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    detection.settle(detection.Course(detector, tiny, {}, ALONE), split, asked, 0)
    assert len(seen) == tiny.precise
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert norm.momentum == 0.1


def test_a_loss_that_is_not_finite_ends_the_training(tiny: Schedule, devkit: Path, tmp_path: Path) -> None:
    network = small_network(tmp_path)
    nn.init.constant_(next(network.backbone.parameters()), torch.nan)
    asked, data = opened(devkit)
    with pytest.raises(TrainingError, match=r"voc0712-detection/small: the loss is nan at iteration 2 \(rate 0.01"):
        detection.run(network, data, asked, ALONE)
    assert checkpoints(tmp_path) == []


def test_a_batch_that_ranks_cannot_share(devkit: Path) -> None:
    asked, data = opened(devkit)
    with pytest.raises(UsageError, match=r"3 ranks cannot share 4 images an iteration; start one of 1, 2, 4"):
        detection.run(small_network(), data, asked, World(0, 3, torch.device("cpu")))


def two_ranks(rank: int, devkit: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    settings_of.SMALL = TINY
    with joined("cpu") as world:
        torch.manual_seed(0)
        x, weight = torch.randn(5, 3, 4, 2), torch.randn(5, 3, 4, 2)
        mine = slice(0, 2) if rank == 0 else slice(2, 5)
        plain, both = nn.BatchNorm2d(3), synchronised(nn.BatchNorm2d(3), world.device)
        whole, part = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
        out = plain(whole)
        (out * weight).sum().backward()
        ours = both(part)
        (ours * weight[mine]).sum().backward()
        assert whole.grad is not None
        torch.testing.assert_close(ours, out[mine], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part.grad, whole.grad[mine], rtol=1e-4, atol=1e-5)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(both.state_dict()[name], value)
        asked, data = opened(devkit)
        scores = detection.run(small_network(folder / "net.unfinished"), data, asked, world)
        (folder / f"{rank}.json").write_text(json.dumps([scores.metrics, scores.details]))


def test_two_ranks(devkit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Batch norm sees the images of both, weights and detections are the same on both, and one writes."""
    assert exit_codes(start_ranks(two_ranks, 2, (devkit, tmp_path)), 300) == [0, 0], capfd.readouterr().err
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()
    assert "Warning" not in capfd.readouterr().err
    assert [load_checkpoint(path)["step"] for path in checkpoints(tmp_path / "net.unfinished")] == [6]


@pytest.fixture
def workspace(devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bowstore.yaml").write_text(f"voc: {devkit}\n")
    network = network_of({"name": "r", "task": "words", "model": {"arch": TESTED}}, "test")
    save_backbone(tmp_path / "net.safetensors", network.fresh(), network)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command(tiny: Schedule, workspace: Path, uninterrupted: Scores) -> None:
    done = CliRunner().invoke(main, ["eval", "voc0712-detection", "--small", "--run", "net.safetensors", "--json"])
    assert done.exit_code == 0, done.output
    path = workspace / "net/eval/voc0712-detection-small.json"
    result = json.loads(path.read_text())
    assert result == json.loads(done.stdout)
    assert (result["protocol"], result["headline"]) == ("voc0712-detection/small", "AP")
    assert result["settings"]["images"] == {"train": 10, "test": 4}
    assert [point["iteration"] for point in result["details"]["curve"]] == [2, 4, 6]
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # checkpoints are gone


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_it_was_trained_on_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small schedule, from a random network: a minute of one core."""
    devkit = write_boxed_devkit(tmp_path, trainval=20, test=10)
    network = network_of({"name": "r", "task": "words", "model": {"arch": "resnet18"}}, "test")
    save_backbone(tmp_path / "net.safetensors", network.fresh(), network)
    monkeypatch.chdir(tmp_path)
    command = ["eval", "voc0712-detection", "--small", "--run", "net.safetensors", "--voc", str(devkit), "--json"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    losses = [point["loss"] for point in result["details"]["curve"]]
    assert losses[-1] < 0.6 * losses[0]
    assert result["metrics"]["AP50"] > 0.5
    assert result["metrics"]["AP"] > 0.2
