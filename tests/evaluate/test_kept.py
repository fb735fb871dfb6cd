"""Feature sets are taken once: in memory, or in the cache, from which nothing damaged or foreign is ever used."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bowstore.config import StorageConfig
from bowstore.data.views import CleanView
from bowstore.errors import DataError
from bowstore.evaluate import kept
from bowstore.evaluate.features import Extraction
from bowstore.evaluate.kept import FeatureSets
from bowstore.evaluate.protocol import DataSets, Features, LabelledSplit
from bowstore.models.pooling import POOLED, GridPool, Tap, WindowPool
from bowstore.remote.cache import reserve

TAPS = {**POOLED, "all": Tap("all", GridPool(2, 2))}


class Levels(nn.Module):
    """The mean of each channel; has what the taking of features asks of a backbone."""

    arch, layers = "levels", ("all",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.mean(dim=(2, 3)) * self.scale

    def feature_maps(self, images_BCHW: Tensor, layers: list[str]) -> dict[str, Tensor]:
        return dict.fromkeys(layers, images_BCHW)


def split(images: int = 5, **changed: Any) -> LabelledSplit:
    values: dict[str, Any] = {
        "open": lambda: None,
        "rows": np.arange(images),
        "labels": np.arange(images) % 2,
        "classes": ("a", "b"),
        "fingerprint": "f",
    }
    return LabelledSplit(**(values | changed))


def how(**changed: Any) -> Extraction:
    values: dict[str, Any] = {
        "backbone": Levels(),
        "identity": "w",
        "view": CleanView(size=8, resize=8, squash=False, mean=(0, 0, 0), std=(1, 1, 1)),
        "taps": TAPS,
        "batch": 2,
        "device": torch.device("cpu"),
    }
    return Extraction(**(values | changed))


DATA = DataSets(splits={"train": split(), "test": split(4, fingerprint="g")})


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was taken anew, in order; features are noise of the row's seed."""
    names: list[str] = []

    def take(_how: Extraction, split: LabelledSplit, *, what: str, into: Any = None, **_: Any) -> dict[str, Any]:
        names.append(what.removesuffix(" features"))
        time.sleep(0.05)
        features = dict(into or {})
        for tap, width in {"pooled": 3, "all": 12}.items():
            values = np.stack([np.random.default_rng(row).random(width) for row in split.rows]).astype(np.float32)
            features.setdefault(tap, np.empty_like(values, dtype=_how.dtype))[:] = values
        return features

    monkeypatch.setattr(Extraction, "features", take)
    return names


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StorageConfig:
    """Every feature set is a large one."""
    monkeypatch.setattr(kept, "LARGE_BYTES", 1)
    return StorageConfig(cache=tmp_path / "cache")


def files(storage: StorageConfig) -> list[Path]:
    assert storage.cache
    return sorted(path for path in (storage.cache / "features").iterdir() if not path.name.startswith("."))


def same(one: Features, other: Features) -> bool:
    return all(
        np.array_equal(one[name][tap], other[name][tap]) and one[name].variation == other[name].variation
        for name in one.splits
        for tap in TAPS
    )


def test_a_command_takes_a_set_once_and_writes_no_small_one(tmp_path: Path, taken: list[str]) -> None:
    sets = FeatureSets(StorageConfig(cache=tmp_path / "cache"))
    (one, trunk), (two, _) = sets.take(how(), DATA), sets.take(how(), DATA)
    assert (taken, trunk) == (["train", "test"], "eager")
    assert same(one, two)
    assert one["test"]["all"].shape == (4, 12)
    assert one["test"].labels.tolist() == [0, 1, 0, 1]
    assert min(one["train"].variation.values()) > 0.1
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changed", "of_split"),
    [
        ({"identity": "v"}, {}),
        ({"view": CleanView(size=8, resize=9, squash=False, mean=(0, 0, 0), std=(1, 1, 1))}, {}),
        ({"taps": {**POOLED, "all": Tap("all", GridPool(4, 1))}}, {}),
        ({"batch": 3}, {}),
        ({"dtype": "float16"}, {}),
        ({}, {"fingerprint": "h"}),
        ({}, {"content": "other"}),
        ({}, {"rows": np.arange(5)[::-1]}),
    ],
)
def test_whatever_changes_the_numbers_is_in_the_key(changed: dict[str, Any], of_split: dict[str, Any]) -> None:
    assert how(**changed).key(split(**of_split), "eager") != how().key(split(), "eager")
    pools = [WindowPool(2, 2, 1, count_padding) for count_padding in (True, False)]
    one, other = (how(taps={"all": Tap("all", pool)}).key(split(), "eager") for pool in pools)
    assert one != other
    assert how().key(split(), "inductor freezing") != how().key(split(), "eager")
    assert how(threads=3).key(split(labels=np.zeros(5, int)), "eager") == how().key(split(), "eager")


def test_the_oldest_leave_the_memory_first(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_MEMORY_BYTES", 4 * 15 * 9)  # nine images
    sets = FeatureSets()
    for network in "wvw":
        sets.take(how(identity=network), DATA)
    assert len(taken) == 6
    sets.take(how(), DATA)
    assert len(taken) == 6


def test_a_large_set_is_mapped_from_the_cache_by_other_commands(storage: StorageConfig, taken: list[str]) -> None:
    one, _ = FeatureSets(storage).take(how(), DATA)
    assert len(files(storage)) == 4
    two, _ = FeatureSets(storage).take(how(), DATA)
    assert taken == ["train", "test"]
    assert same(one, two)
    for found in (one, two):
        assert isinstance(found["train"]["pooled"], np.memmap)
        assert torch.from_numpy(found["train"]["pooled"]).sum() > 0  # no warning of an array that cannot be written
    FeatureSets(storage).take(how(identity="v"), DATA)
    assert len(files(storage)) == 8


def test_a_small_set_that_took_long_is_kept_for_other_commands(
    tmp_path: Path, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "LONG_SECONDS", 0.01)
    storage = StorageConfig(cache=tmp_path / "cache")
    one, _ = FeatureSets(storage).take(how(), DATA)
    assert not isinstance(one["train"]["pooled"], np.memmap)
    two, _ = FeatureSets(storage).take(how(), DATA)
    assert taken == ["train", "test"]
    assert same(one, two)
    assert len(files(storage)) == 4
    FeatureSets(storage, files=False).take(how(), DATA)
    assert len(taken) == 4


def test_float16_is_kept_as_such_in_half_the_bytes_and_read_as_float32(
    storage: StorageConfig, taken: list[str]
) -> None:
    whole, _ = FeatureSets(storage).take(how(), DATA)
    sizes = [path.stat().st_size for path in files(storage)]
    half, _ = FeatureSets(storage).take(how(dtype="float16"), DATA)
    again, _ = FeatureSets(storage).take(how(dtype="float16"), DATA)
    in_memory, _ = FeatureSets(StorageConfig(cache=Path("/dev/null"))).take(how(dtype="float16"), DATA)
    assert taken == ["train", "test"] * 3
    added = sum(path.stat().st_size for path in files(storage)) - sum(sizes)
    assert added == sum(sizes) - 2 * (5 + 4) * (3 + 12)  # headers stay
    for found in (half, again, in_memory):
        assert found["train"].taps["all"].dtype == np.float16
        assert found["train"]["all"].dtype == np.float32
        assert np.array_equal(found["train"]["all"], whole["train"]["all"].astype(np.float16).astype(np.float32))
    assert not np.array_equal(half["train"]["all"], whole["train"]["all"])
    assert isinstance(again["train"].taps["all"], np.memmap)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _foreign(path: Path) -> None:
    """Another tap's file and its record."""
    for name in (path.name, f".{path.name}.json"):
        path.with_name(name).write_bytes(path.with_name(name.replace("-1.npy", "-0.npy")).read_bytes())


def _no_record(path: Path) -> None:
    path.with_name(f".{path.name}.json").unlink()


@pytest.mark.parametrize("damage", [_flip, _cut, _foreign, _no_record])
def test_what_is_damaged_or_another_file_is_taken_again(
    storage: StorageConfig, taken: list[str], damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    data = DataSets(splits={"test": split()})
    one, _ = FeatureSets(storage).take(how(), data)
    expected = {tap: values.copy() for tap, values in one["test"].taps.items()}
    damage(path := files(storage)[1])
    two, _ = FeatureSets(storage).take(how(), data)
    assert taken == ["test", "test"]
    assert f"{path} is damaged, or not the file that was recorded" in capsys.readouterr().err
    assert all(np.array_equal(two["test"][tap], values) for tap, values in expected.items())
    FeatureSets(storage).take(how(), data)
    assert taken == ["test", "test"]


def test_two_processes_at_once_take_it_once(storage: StorageConfig, taken: list[str]) -> None:
    found: list[Features] = []

    def take() -> None:
        found.append(FeatureSets(storage).take(how(), DataSets(splits={"test": split()}))[0])

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == ["test"]
    assert same(*found)


def test_a_cache_without_room_is_done_without(
    storage: StorageConfig, taken: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = storage.model_copy(update={"cache_gb": 1e-9})
    sets = FeatureSets(small)
    sets.take(how(), DATA)
    sets.take(how(), DATA)
    assert taken == ["train", "test"]
    assert files(storage) == []
    told = capsys.readouterr().err
    assert "warning: train features are held in memory and not kept: train features has 0.00 MB, and the cache" in told
    blocked = storage.model_copy(update={"cache": Path("/dev/null")})
    FeatureSets(blocked).take(how(), DATA)
    assert "not kept: " in capsys.readouterr().err


def test_the_bound_of_the_cache_holds_and_what_is_in_use_stays(storage: StorageConfig, taken: list[str]) -> None:
    features, _ = FeatureSets(storage).take(how(), DATA)
    tight = storage.model_copy(update={"cache_gb": 2e-6})
    with pytest.raises(Exception, match="are in use"):
        reserve(1900, "something", tight)
    assert len(files(storage)) == 4
    del features
    reserve(1900, "something", tight)
    assert files(storage) == []


def test_an_error_leaves_nothing_behind(storage: StorageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(*_: Any, into: Mapping[str, NDArray[np.float32]], **__: Any) -> None:
        into["pooled"][:] = 1
        raise DataError("NaN or infinity")

    monkeypatch.setattr(Extraction, "features", take)
    with pytest.raises(DataError, match="NaN or infinity"):
        FeatureSets(storage).take(how(), DATA)
    assert storage.cache
    assert [path.name for path in (storage.cache / "features").iterdir() if ".tmp-" in path.name] == []
    assert files(storage) == []
