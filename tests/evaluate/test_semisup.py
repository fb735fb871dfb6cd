"""semisup: which images have labels, and the fine-tuning of the whole network on them."""

import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from shard_sets import ShardMaker, encode_jpeg, textured_image, write_tar
from torch import nn

from bowstore.cli import main
from bowstore.config import ViewConfig, Workspace
from bowstore.data.index import build_index
from bowstore.data.views import clean_view
from bowstore.errors import DataError, MissingError, UsageError
from bowstore.evaluate import finetuned
from bowstore.evaluate.augmented import augmented
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.features import Extraction
from bowstore.evaluate.fitting import fit
from bowstore.evaluate.protocol import LabelledSplit, Network
from bowstore.evaluate.protocols import semisup
from bowstore.evaluate.protocols.semisup import KIND, SCHEDULES, SemisupSettings
from bowstore.evaluate.runner import evaluate
from bowstore.evaluate.splits import labelled
from bowstore.evaluate.subsets import check_filled, listed, sampled
from bowstore.models.pooling import POOLED
from bowstore.models.saved import load_backbone, network_of, save_backbone
from bowstore.train.config import OptimConfig
from bowstore.train.distributed import World

ALONE = World(0, 1, torch.device("cpu"))
VIEW = ViewConfig(size=16, resize=18)


def named_shards(root: Path, keys: list[str], order: list[int] | None = None) -> LabelledSplit:
    """Images under the given keys, of the class that is the key's folder."""
    classes = sorted({key.partition("/")[0] for key in keys})
    image = encode_jpeg(textured_image(0, 16, 16))
    samples = [(key, image, classes.index(key.partition("/")[0])) for key in keys]
    write_tar(root / "train-000000.tar", [samples[place] for place in order or range(len(samples))])
    return labelled(build_index(root, classes=tuple(classes)))


def keys_of(split: LabelledSplit) -> list[str]:
    assert split.index is not None
    return [split.index.key(int(row)) for row in split.rows]


def test_ids_and_schedules() -> None:
    for settings, protocol_id in (
        (SemisupSettings(), "semisup/1-percent/sample"),
        (SemisupSettings(percent=10, epochs=20, batch=256, seed=4), "semisup/10-percent/sample"),
        (SemisupSettings(names=Path("1percent.txt")), "semisup/1-percent"),
        (SemisupSettings(names=Path("l"), own_images=True, batch=8), "semisup/1-percent/batch-8/own-images"),
        (SemisupSettings(percent=10, epochs=3), "semisup/10-percent/sample/3-epochs"),
    ):
        assert (semisup.describe(settings).id, semisup.describe(settings).version) == (protocol_id, 1)
    for percent, images, steps, falls in ((1, 12_811, 2000, (1200, 1600)), (10, 128_116, 10_000, (6000, 8000))):
        optim = SCHEDULES[percent].optim(SemisupSettings(percent=percent), images)  # 50 and 500 steps a pass
        assert (optim.batch, optim.epochs, optim.milestones, optim.factor) == (256, steps, falls, 0.2)


class TestList:
    KEYS = ("n01/n01_10", "n01/n01_2", "n01/same", "n02/n02_1", "n02/same", "n02/odd_name")

    @pytest.fixture
    def split(self, tmp_path: Path) -> LabelledSplit:
        return named_shards(tmp_path / "train", list(self.KEYS), order=[4, 0, 3, 1, 5, 2])

    def write(self, tmp_path: Path, *lines: str) -> Path:
        path = tmp_path / "list.txt"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    def test_names_in_any_order(self, split: LabelledSplit, tmp_path: Path) -> None:
        path = self.write(
            tmp_path, "# a remark", "n02_1.JPEG", "", "n01_10.JPEG", "n02/same.png", "imagenet/train/n01/n01_2.JPEG"
        )
        part = listed(split, path, "train")
        assert sorted(keys_of(part)) == ["n01/n01_10", "n01/n01_2", "n02/n02_1", "n02/same"]
        assert part.rows.tolist() == sorted(part.rows)
        assert [part.classes[label] for label in part.labels] == [key[:3] for key in keys_of(part)]
        assert part.key != split.key

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (
                ["n01_10.JPEG", "n09_1.JPEG", "n02_2.JPEG"],
                r"list.txt: 2 of 3 names are not in train \(first: n09_1.JPEG",
            ),
            (
                ["10.JPEG"],
                r"1 of 1 names are not in train \(first: 10.JPEG\); a name is that of the image's file, as in",
            ),
            (
                ["n01_2.JPEG", "same.JPEG"],
                r"1 of 2 names are those of several images of train \(first: same.JPEG, of n0",
            ),
            (
                ["n01_2.JPEG", "n02_1.JPEG", "n01_2.JPEG"],
                r"lists 1 of 3 images twice \(first: n01_2.JPEG\); list each once",
            ),
            (
                ["n01_2.JPEG", "n01/n01_2.jpg", "n02_1", "n01_2.JPEG"],
                r"lists 2 of 4 images twice \(first: n01/n01_2.jpg",
            ),
            (["# nothing"], r"list.txt lists no image; name a file with an image's name a line, as in n01440764_10026"),
        ],
    )
    def test_what_no_list_can_be(self, split: LabelledSplit, tmp_path: Path, lines: list[str], message: str) -> None:
        with pytest.raises(DataError, match=message):
            listed(split, self.write(tmp_path, *lines), "train")

    def test_a_file_that_cannot_be_read(self, split: LabelledSplit, tmp_path: Path) -> None:
        path = tmp_path / "list.txt"
        with pytest.raises(DataError, match=r"cannot read .*; name a file with an image's name, as in .*JPEG, a line"):
            listed(split, path, "train")
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(DataError, match=r"list.txt: byte 0 is not UTF-8; name a file with an image's name"):
            listed(split, path, "train")

    def test_a_part_of_the_shards(self, split: LabelledSplit, tmp_path: Path) -> None:
        """Names of images that are held out are not there."""
        part = LabelledSplit(**{**vars(split), "rows": split.rows[:3], "labels": split.labels[:3]})
        inside, outside = keys_of(part)[1], keys_of(split)[4]
        found = listed(part, self.write(tmp_path, f"{inside}.JPEG"), "train")
        assert keys_of(found) == [inside]
        with pytest.raises(DataError, match=r"1 of 1 names are not in train"):
            listed(part, self.write(tmp_path, f"{outside}.JPEG"), "train")

    def test_classes_without_an_image(self, split: LabelledSplit, tmp_path: Path) -> None:
        part = listed(split, self.write(tmp_path, "n02_1.JPEG"), "train")
        with pytest.raises(DataError, match=r"the list has no image of 1 of 2 classes \(first: n01\); list more"):
            check_filled(part, "the list", "list more")


class TestSample:
    COUNTS: ClassVar = {"a": 149, "b": 150, "c": 50, "d": 250}  # 1.49, 1.5, 0.5 and 2.5 of a hundredth

    def keys(self) -> list[str]:
        return [f"{name}/{number}" for name, count in self.COUNTS.items() for number in range(count)]

    def test_counts_do_not_depend_on_the_seed_nor_images_on_the_shards(self, tmp_path: Path) -> None:
        keys = self.keys()
        split = named_shards(tmp_path / "one", keys)
        order = np.random.default_rng(0).permutation(len(keys)).tolist()
        other = named_shards(tmp_path / "two", keys, order)
        for percent, counts in ((1, [1, 2, 1, 3]), (10, [15, 15, 5, 25])):
            parts = [sampled(split, percent, seed) for seed in (0, 0, 1)]
            assert all(np.bincount(part.labels).tolist() == counts for part in parts)
            chosen = [set(keys_of(part)) for part in parts]
            assert chosen[0] == chosen[1] != chosen[2]
            assert set(keys_of(sampled(other, percent, 0))) == chosen[0]
            assert parts[0].rows.tolist() == sorted(parts[0].rows)
        assert set(keys_of(sampled(split, 1, 0))) < set(keys_of(sampled(split, 10, 0)))

    def test_a_class_that_is_too_small(self, tmp_path: Path) -> None:
        named_shards(tmp_path / "train", [f"{name}/{number}" for name in "ab" for number in range(49)])
        named_shards(tmp_path / "test", ["a/x", "b/y"])
        settings = SemisupSettings(train=tmp_path / "train", test=tmp_path / "test")
        message = r"a sample of 1 % of .*train has no image of 2 of 2 classes \(first: a\); give --percent 10, use more"
        with pytest.raises(DataError, match=message):
            KIND.ask("resolve", SemisupSettings, settings, Workspace())
        assert KIND.ask("resolve", SemisupSettings, settings.model_copy(update={"percent": 10}), Workspace()).batch == 8


@pytest.fixture
def workspace(make_shard_set: ShardMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_shard_set(80, folder="data/train", classes=8)
    make_shard_set(16, folder="data/val", classes=8, first=80)
    (tmp_path / "bowstore.yaml").write_text("shards: data/train\n")
    saved = network_of({"name": "r", "task": "words", "view": VIEW.model_dump(), "model": {"arch": "wrn-10-1"}}, "test")
    save_backbone(tmp_path / "net.safetensors", saved.fresh(), saved)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command(workspace: Path) -> None:
    def call(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["eval", "semisup", "--run", "net.safetensors", "--json", *arguments])

    done = call("--percent", "10", "--epochs", "3")
    assert done.exit_code == 0, done.output
    assert "8 train images are fewer than a batch of 256: the batch is 8, in an id of its own" in done.stderr
    result = json.loads(done.stdout)
    path = workspace / "net/eval/semisup-10-percent-sample-3-epochs-batch-8-own-images.json"
    assert result == json.loads(path.read_text())
    assert result["metrics"].keys() == {"top1", "top5"}
    assert result["settings"]["images"] == {"train": 8, "test": 16}
    assert result["settings"]["labels"]["fewest_of_a_class"] == result["settings"]["labels"]["most"] == 1
    assert len(result["details"]["losses"]) == 3
    again = json.loads(call("--percent", "10", "--epochs", "3").stdout)
    assert (again["metrics"], again["details"]) == (result["metrics"], result["details"])

    (workspace / "list.txt").write_text("".join(f"{number:05d}.jpg\n" for number in range(16)))
    done = call("--list", "list.txt", "--epochs", "1")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["protocol"] == "semisup/1-percent/1-epochs/batch-16/own-images"
    (workspace / "list.txt").write_text("00001.jpg\nx.jpg\n")
    refused = call("--list", "list.txt")
    assert refused.exit_code == 1
    assert refused.stderr.splitlines() == [
        "Error: list.txt: 1 of 2 names are not in data/train (first: x.jpg); a name is that of the image's file, as in "
        "n01440764_10026.JPEG: list others, or name the shards that have them as train"
    ]


def test_one_process(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    settings = SemisupSettings(percent=10, train=Path("data/train"), test=Path("data/val"))
    with pytest.raises(UsageError, match="eval semisup is for one process, and torchrun started 2: batch norms take"):
        evaluate(KIND, settings, EvalConfig(run="net.safetensors"), Workspace())


def test_the_whole_network_is_tuned_as_obow_does(workspace: Path) -> None:
    """Against steps by hand: two learning rates, no decay, plain momentum, batch norms in training mode."""
    settings = SemisupSettings(
        percent=10, epochs=5, batch=4, train=Path("data/train"), test=Path("data/val"), own_images=True
    )
    data = KIND.ask("data", object, settings, Workspace())
    before = load_backbone(Path("net.safetensors")).backbone
    network = Network(backbone=copy.deepcopy(before), view=VIEW)
    scores = finetuned.run(network, data, settings, ALONE)  # type: ignore[arg-type]
    after = network.backbone
    changed = [name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])]
    assert set(changed) == set(before.state_dict()), "weights and running statistics"

    trunk = before.train()
    torch.manual_seed(0)
    head = nn.Linear(64, 8)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    pairs = [(value, 2e-4) for value in trunk.parameters()] + [(value, 0.5) for value in head.parameters()]
    speeds = [torch.zeros_like(value) for value, _ in pairs]
    losses = []
    seen = settings.train_view(VIEW)
    for step, (images_BCHW, labels) in enumerate(
        augmented(data["train"], seen, batch=4, seed=0, world=ALONE, steps=10)
    ):  # type: ignore[index]
        loss = F.cross_entropy(head(trunk(images_BCHW)), torch.from_numpy(labels))
        gradients = torch.autograd.grad(loss, [value for value, _ in pairs])
        fall = (1, 0.2, 0.04)[(step >= 6) + (step >= 8)]  # of ten steps, at three and four fifths
        for (value, rate), speed, gradient in zip(pairs, speeds, gradients, strict=True):
            speed.mul_(0.9).add_(gradient)
            value.data.sub_(fall * rate * speed)
        losses.append(loss.item())
    found = scores.details["losses"]
    assert found == pytest.approx(np.array(losses).reshape(5, 2).mean(axis=1).tolist(), rel=1e-4)
    for name, value in trunk.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=1e-4, atol=1e-6)

    how = Extraction(backbone=trunk, view=clean_view(seen), taps=POOLED, batch=8, device=ALONE.device)
    test = data["test"]  # type: ignore[index]
    logits_MK = head(torch.from_numpy(how.features(test)["pooled"])).detach().numpy()
    order_MK = np.argsort(-logits_MK, axis=1)
    for top in (1, 5):
        hits = (order_MK[:, :top] == test.labels[:, None]).any(axis=1).mean()
        assert scores.metrics[f"top{top}"] == pytest.approx(hits)


def test_a_loss_that_diverges_is_one_line() -> None:
    weight = nn.Parameter(torch.ones(()))
    batches = ((torch.full((4, 3, 2, 2), 1e30), np.zeros(4, np.int64)) for _ in range(4))
    optim = OptimConfig(batch=4, epochs=4, steps_per_epoch=1, lr=1e30)
    message = r"probe: the loss is not finite at step 2 of 4 \(lr 1e\+30\): the features are too large, or the weights"
    with pytest.raises(DataError, match=message):
        fit(
            batches, lambda images, labels: (images.mean() * weight)[None] ** 3, torch.optim.SGD([weight]), optim,
            of_a_pass=2, world=ALONE, what="probe",
        )  # fmt: skip


def test_no_such_list(workspace: Path) -> None:
    settings = SemisupSettings(names=Path("nowhere.txt"))
    with pytest.raises((DataError, MissingError), match=r"nowhere.txt"):
        evaluate(KIND, settings, EvalConfig(run="net.safetensors"), Workspace(shards=Path("data/train")))
