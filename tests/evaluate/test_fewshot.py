"""The protocol fewshot: its id, which shards and classes it takes, what it refuses, and a whole evaluation."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from shard_sets import ShardMaker
from source_sets import tiny_image, write_file

from bowstore.config import ViewConfig, Workspace, dump, validate
from bowstore.data.config import ShardsConfig
from bowstore.data.shards import make_shards
from bowstore.errors import DataError, MissingError, UsageError
from bowstore.evaluate.classes import class_lists
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.episodes import draw_episodes, episode_accuracy, mean_and_interval
from bowstore.evaluate.protocol import DataSets
from bowstore.evaluate.protocols import fewshot
from bowstore.evaluate.protocols.fewshot import KIND, FewShotSettings, describe
from bowstore.evaluate.results import Result, read_result, result_table
from bowstore.evaluate.runner import evaluate
from bowstore.models.saved import network_of, save_backbone

CIFAR_FS, NOVEL = class_lists()["cifar-fs-test"], class_lists()["miniimagenet-test"]
CIFAR100 = (*CIFAR_FS, *(f"other{n}" for n in range(80)))


class Shards(SimpleNamespace):
    """What the protocol asks of an index."""

    def __len__(self) -> int:
        return len(self.label)


def shards(classes: Sequence[str], images: int | Sequence[int], seed: int = 0) -> Shards:
    """Shuffled shards; the key hash of an image does not depend on where it lies."""
    counts = [images] * len(classes) if isinstance(images, int) else images
    label = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    key_hash = np.arange(len(label), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    order = np.random.default_rng(seed).permutation(len(label))
    return Shards(
        classes=tuple(classes), label=label[order], key_hash=key_hash[order], fingerprint="f" * 32, columns_digest="c"
    )


@pytest.fixture
def lay_out(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets the protocol find shards by their paths: lay_out({"data/shards/test": shards(...)})."""

    def lay(found: Mapping[str, Shards]) -> None:
        def open_index(path: Path, _storage: object) -> Shards:
            if str(path) not in found:
                raise MissingError(f"no shards {path}")
            return found[str(path)]

        monkeypatch.setattr(fewshot, "open_index", open_index)
        monkeypatch.setattr(Path, "is_dir", lambda path: str(path) in found)

    return lay


def resolved(workspace: Workspace | None = None, **settings: object) -> tuple[FewShotSettings, DataSets]:
    workspace = workspace or Workspace()
    found = fewshot.resolve(validate(FewShotSettings, settings, "eval fewshot"), workspace)
    return found, fewshot.data(found, workspace)


@pytest.mark.parametrize(
    ("settings", "protocol_id", "headline"),
    [
        ({"classes": CIFAR_FS}, "fewshot/5way-1-5-10-50shot/cifar-fs-test", "5-shot"),
        ({"classes": NOVEL[::-1], "queries": 3, "seed": 1}, "fewshot/5way-1-5-10-50shot/miniimagenet-test", "5-shot"),
        ({"classes": ("all",), "ways": 20, "shots": [1]}, "fewshot/20way-1shot/all", "1-shot"),
        ({"shots": [2, 3, 9]}, "fewshot/5way-2-3-9shot/by-default", "3-shot"),
        ({"classes": ("fox", "bed"), "ways": 2}, "fewshot/2way-1-5-10-50shot/2-classes-de10073c", "5-shot"),
    ],
)
def test_the_id_says_ways_shots_and_classes(settings: dict[str, Any], protocol_id: str, headline: str) -> None:
    protocol = describe(FewShotSettings(**settings))
    assert (protocol.id, protocol.version, protocol.headline) == (protocol_id, 1, headline)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": [5, 1]}, "shots 5, 1 must ascend; each once, smallest first"),
        ({"shots": [1, 1]}, "shots 1, 1 must ascend"),
        ({"shots": []}, "at least 1 item"),
        ({"shots": [0]}, "greater than or equal to 1"),
        ({"ways": 1}, "greater than or equal to 2"),
        ({"episodes": 100_000, "ways": 20}, "show 130000000 images, more than 67108864; take fewer episodes"),
        ({"episodes": 1}, "greater than or equal to 2"),
        ({"way": 5}, "did you mean 'ways'"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate(FewShotSettings, settings, "eval fewshot")


def test_the_classes_of_a_known_data_set_are_found_however_they_are_written(
    lay_out: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for names in (CIFAR100, [name.replace("_", " ").title() for name in CIFAR100]):
        lay_out({"data/shards/test": shards(names, 100)})
        settings, data = resolved(classes=["cifar-fs-test"])
        assert describe(settings).id.endswith("shot/cifar-fs-test")
        assert data.dataset == "cifar100"
        assert data["test"].classes == tuple(names[:20])
        assert np.bincount(data["test"].labels).tolist() == [100] * 20
        assert resolved()[0].classes == CIFAR_FS  # by default
    line = "episodes of the 20 classes cifar-fs-test of data/shards/test; --classes all takes all 100"
    assert capsys.readouterr().err.count(line) == 1  # however often a recipe asks
    settings, data = resolved(classes=["all"])
    assert (describe(settings).id, data.dataset) == ("fewshot/5way-1-5-10-50shot/all", None)
    assert len(data["test"].classes) == 100


def test_the_novel_classes_of_miniimagenet_are_in_its_test_split(lay_out: Any) -> None:
    base, val = [f"n1{n:07d}" for n in range(64)], [f"n2{n:07d}" for n in range(16)]
    splits = {"train": shards(base, 600), "val": shards(val, 600), "test": shards(NOVEL, 600)}
    lay_out({f"data/shards/{name}": split for name, split in splits.items()})
    settings, data = resolved()
    assert settings.test == Path("data/shards/test")
    assert describe(settings).id == "fewshot/5way-1-5-10-50shot/miniimagenet-test"
    assert data.dataset == "miniimagenet"
    assert resolved(test="data/shards/val", ways=3)[1]["test"].classes == tuple(val)
    with pytest.raises(
        UsageError,
        match=r"^data/shards/val lacks 20 of 20 classes: n01930112, .*, n07613480; data/shards/test has them all: "
        r"--test data/shards/test$",
    ):
        resolved(test="data/shards/val", classes=["miniimagenet-test"])


@pytest.mark.parametrize(
    ("found", "dataset"),
    [
        (shards(CIFAR100, 500), None),  # CIFAR-100's train images
        (shards([*CIFAR100, "one more"], 100), None),
        (shards(CIFAR_FS, 100), None),  # its classes alone: nobody knows of what
        (shards(NOVEL, [600] * 19 + [599]), None),
        (shards(NOVEL, 600), "miniimagenet"),
    ],
)
def test_the_papers_figures_stand_beside_its_own_splits_only(lay_out: Any, found: Shards, dataset: str | None) -> None:
    lay_out({"data/shards/test": found})
    classes = ["miniimagenet-test" if "n01930112" in found.classes else "cifar-fs-test"]
    assert resolved(classes=classes)[1].dataset == dataset


def test_which_shards_by_default(lay_out: Any) -> None:
    some, unlabelled = shards("abcdef", 70), shards("abcdef", 70)
    unlabelled.label = np.full(len(some), -1)
    workspace = Workspace(shards=Path("s/train"))
    lay_out({"s/test": some, "s/val": some})
    assert resolved(workspace)[0].test == Path("s/test")
    lay_out({"s/val": some})
    assert resolved(workspace)[0].test == Path("s/val")
    lay_out({"s/test": unlabelled, "s/val": some})  # ImageNet's test images have no labels
    assert resolved(workspace)[0].test == Path("s/val")
    with pytest.raises(DataError, match="test: 420 of 420 images have no label"):
        resolved(workspace, test="s/test")
    lay_out({})
    with pytest.raises(MissingError, match="no test shards: neither s/val nor s/test exists; give --test"):
        resolved(workspace)
    lay_out({"s/test": some, "s/val": some, "other": some})
    assert resolved(workspace.model_copy(update={"val_shards": Path("other")}))[0].test == Path("other")
    assert resolved(workspace, test="other")[0].test == Path("other")


def test_which_images_does_not_depend_on_their_order(lay_out: Any) -> None:
    hashes = []
    for seed in (0, 1):
        some = shards("abc", [9, 7, 8], seed)
        lay_out({"data/shards/test": some})
        data = resolved(ways=2, shots=[1], queries=2, classes=["c,a"])[1]
        assert data["test"].classes == ("a", "c")
        assert data["test"].labels.tolist() == [0] * 9 + [1] * 8
        hashes.append(some.key_hash[data["test"].rows].tolist())
    assert hashes[0] == hashes[1]
    assert hashes[0][:9] == sorted(hashes[0][:9])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ["a,b,c"]}, "5 ways needs as many classes, .*test gives 3; take --ways 3, more --classes or"),
        ({"classes": ["a"]}, "5 ways needs as many .* gives 1; take more --classes or other shards by --test$"),
        ({"classes": ["a,b,c,d,e"]}, "^class b has 40 images in data/shards/test, and 50 shots with 15 queries need "
         "65; take --shots up to 25, other --classes or other shards by --test$"),
        ({}, "class f has 30 images .* take --shots up to 15, other"),
        ({"shots": [1], "queries": 30}, "class f has 30 .* need 31; take fewer --queries and --shots, other --classes"),
        ({"classes": ["a", "bed"]}, "lacks 1 of 2 classes: bed; --classes takes names of its classes, a file or"),
        ({"classes": ["cifar-fs"]}, r"lacks 1 of 1 .*: cifar-fs; .* \(all, cifar-fs-test, miniimagenet-test\), and"),
    ],
)  # fmt: skip
def test_what_no_episode_can_be_drawn_from(lay_out: Any, settings: dict[str, Any], message: str) -> None:
    lay_out({"data/shards/test": shards("abcdef", [70, 40, 70, 65, 70, 30])})
    with pytest.raises(UsageError, match=message):
        resolved(**settings)


def test_classes_without_images_or_names(lay_out: Any) -> None:
    lay_out({"data/shards/test": shards("abcdefg", [0, 70, 70, 70, 70, 70, 0])})
    assert resolved()[1]["test"].classes == tuple("bcdef")  # all that the split has
    with pytest.raises(UsageError, match=r"class a has 0 images .* need 65; take other --classes or"):
        resolved(classes=["a,b,c,d,e"])
    numbers = shards("abcdef", 70)
    numbers.classes = ()
    lay_out({"data/shards/test": numbers})
    assert resolved()[1]["test"].classes == tuple("012345")
    assert resolved(classes=["1,3,5"], ways=3)[1]["test"].classes == tuple("135")


def test_miniimagenet_as_it_is_laid_out(tmp_path: Path) -> None:
    """Shards of the source itself: each split numbers classes of its own, and images lie shuffled."""
    root, number = tmp_path / "mini", 0
    for split, classes in {"train": ("n12", "n11"), "val": ("n13",), "test": NOVEL[::-1]}.items():
        lines = ["filename,label"]
        for name, image in product(classes, range(3)):
            lines.append(f"{name}{image:08d}.jpg,{name}")
            write_file(root / "images" / f"{name}{image:08d}.jpg", tiny_image(number := number + 1))
        write_file(root / f"{split}.csv", "\n".join(lines))
    make_shards(root, tmp_path / "shards", ShardsConfig(workers=1))
    workspace = Workspace(shards=tmp_path / "shards/train")
    settings, data = resolved(workspace, shots=[1], queries=2)
    assert describe(settings).id == "fewshot/5way-1shot/miniimagenet-test"
    assert data["test"].classes == NOVEL
    assert data.dataset is None  # it has 600 images a class
    keys = [data["test"].open().name(row) for row in data["test"].rows.tolist()]
    assert [key.rpartition("/")[2][:9] for key in keys] == [name for name in NOVEL for _ in range(3)]
    with pytest.raises(
        UsageError, match=rf"val lacks 20 of 20 classes: .*; {tmp_path}/shards/test has them all: --test"
    ):
        resolved(workspace, test=tmp_path / "shards/val", classes=["miniimagenet-test"])


class TestWhole:
    def evaluate(self, tmp_path: Path, **settings: object) -> Result:
        view = ViewConfig(size=16, resize=None)
        of_run = {"name": "r", "task": "words", "view": dump(view), "model": {"arch": "wrn-10-1"}}
        network, path = network_of(of_run, "test"), tmp_path / "run.safetensors"
        save_backbone(path, network.fresh(), network)
        kind = validate(FewShotSettings, settings, "eval fewshot")
        return evaluate(KIND, kind, EvalConfig(run=str(path), batch=16), Workspace())

    def test_from_shards_to_result_file(self, tmp_path: Path, make_shard_set: ShardMaker) -> None:
        root = make_shard_set(80).root
        result = self.evaluate(tmp_path, test=root, ways=3, shots=[1, 4], queries=6, episodes=50)
        assert read_result(tmp_path / "run" / "eval" / "fewshot-3way-1-4shot-all.json") == result
        assert result.protocol == "fewshot/3way-1-4shot/all"
        assert result.metrics.keys() == result.details["interval95"].keys() == {"1-shot", "4-shot"}
        assert 0.4 < result.metrics["1-shot"] < result.metrics["4-shot"] <= 1
        assert 0 < result.details["interval95"]["1-shot"] < 0.1
        assert result.settings["classes"] == ["c0", "c1", "c2", "c3"]
        assert result.settings["images"] == {"test": 80}
        assert result.settings["options"]["episodes"] == 50
        share, half = 100 * result.metrics["1-shot"], 100 * result.details["interval95"]["1-shot"]
        assert f" {share:.2f} ± {half:.2f} " in result_table(result)


def test_scores_are_those_of_the_episodes_drawn() -> None:
    features = np.random.default_rng(0).standard_normal((24, 5)).astype(np.float32)
    images = np.array([9, 7, 8])
    labels = np.repeat([0, 1, 2], images)
    split = SimpleNamespace(taps={"pooled": features}, labels=labels, classes=("a", "b", "c"))
    settings = FewShotSettings(ways=2, shots=(1, 2), queries=3, episodes=20, seed=4)
    scores = fewshot.score({"test": split}, settings)  # type: ignore[arg-type]
    classes, places = draw_episodes(images, ways=2, images=5, episodes=20, seed=4)
    rows = np.array([0, 9, 16])[classes][..., None] + places
    for shots, each in zip((1, 2), episode_accuracy(features, rows, queries=3, shots=(1, 2)), strict=True):
        found = scores.metrics[f"{shots}-shot"], scores.details["interval95"][f"{shots}-shot"]
        assert found == mean_and_interval(each)


def test_the_papers_rows_stand_beside_their_shots() -> None:
    def table(protocol_id: str, dataset: str | None, *shots: int) -> list[list[str]]:
        result = Result(
            protocol=protocol_id, protocol_version=1, metrics={f"{n}-shot": 0.5 for n in shots}, settings={},
            inputs={"dataset": dataset}, details={"interval95": {f"{n}-shot": 0.0021 for n in shots}}, versions={},
            device="cpu", created="", seconds=1,
        )  # fmt: skip
        return [line.split() for line in result_table(result).splitlines()]

    mini = table("fewshot/5way-1-5-10-50shot/miniimagenet-test", "miniimagenet", 1, 5, 10, 50)
    assert ["this", "run", *["50.00", "±", "0.21"] * 4, "cpu"] in mini
    assert ["paper:", "BoWNet", "x3", "48.6", "68.9", "75.3", "82.5", "Table", "2,", "WRN-28-4"] in mini
    assert ["paper:", "Random", "to", "BoWNet", "42.4", "62.0", "68.9", "78.1", "Table", "3,", "WRN-28-4"] in mini
    cifar = table("fewshot/5way-5-20shot/cifar-fs-test", "cifar100", 5, 20)
    assert ["paper:", "BoWNet", "86.3", "-", "Table", "1,", "WRN-28-10"] in cifar
    for protocol_id, dataset in (
        ("fewshot/5way-1-5-10-50shot/cifar-fs-test", None),
        ("fewshot/5way-1-5-10-50shot/all", "cifar100"),
        ("fewshot/10way-1-5-10-50shot/cifar-fs-test", "cifar100"),
    ):
        assert len(table(protocol_id, dataset, 1, 5, 10, 50)) == 3
