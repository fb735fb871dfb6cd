"""A data set that grows by another folder of shards and another store: the targets are those of one store of all."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from encoding import run_encode
from growing import LAYERS, resealed, small_chunks_patch
from numpy.typing import NDArray
from teacher_sets import write_shards

from bowstore.config import StorageConfig
from bowstore.data.index import open_index
from bowstore.data.table import joint_fingerprint
from bowstore.errors import CorruptError, MismatchError
from bowstore.words.store.join import JoinedLayer, join_rows, layer_of
from bowstore.words.store.layer import Layer
from bowstore.words.store.store import open_store
from bowstore.words.store.verify import digest, verify
from bowstore.words.targets.tiers import TIERS, Targets, Tier

CPU = torch.device("cpu")
FIRST, LATER = 40, 30  # the first ends where a chunk and a batch end, so that both ways cut the same batches


class Grown:
    """Shards and stores of images that came first, of others that came later, and one store of all."""

    def __init__(self, folder: Path, teacher_file: Path) -> None:
        self.shards = [
            write_shards(folder / "first", FIRST),
            write_shards(folder / "later", LATER, seed=1, prefix="new"),
        ]
        self.stores = [folder / "first.zarr", folder / "later.zarr"]
        self.whole = folder / "whole.zarr"
        under: dict[str, Any] = {"teacher": teacher_file, "vocabulary": self.stores[0], "layers": (), "num_words": ()}
        with small_chunks_patch():
            run_encode(teacher=teacher_file, shards=self.shards[0], store=self.stores[0], **LAYERS)
            run_encode(shards=self.shards[1], store=self.stores[1], **under)
            run_encode(shards=self.shards, store=self.whole, **under)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path) -> Grown:
    return Grown(tmp_path_factory.mktemp("grown"), teacher_file)


def targets_of(stores: Sequence[Path], shards: Sequence[Path], tier: Tier, cache: Path) -> Targets:
    opened, index = [open_store(path) for path in stores], open_index(shards)
    rows = join_rows(opened, index)
    return Targets(tier, layer_of(opened, "block3"), rows, CPU, storage=StorageConfig(cache=cache), shown=False)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("tier", TIERS)
def test_growth_gives_the_targets_of_one_store_of_all(grown: Grown, tmp_path: Path, tier: Tier, turned: bool) -> None:
    shards = grown.shards[::-1] if turned else grown.shards
    one = targets_of([grown.whole], shards, tier, tmp_path)
    for stores in (grown.stores, grown.stores[::-1]):
        both = targets_of(stores, shards, tier, tmp_path)
        assert len(both) == FIRST + LATER
        blocks = list[NDArray[np.uint16]]()
        assert both.digest(blocks.append, shown=False) == one.digest(shown=False)
        assert list(map(len, blocks)) == [20, 20, 20, 10]
        rows_B = np.random.default_rng(0).integers(0, len(both), 33)
        assert torch.equal(both.words(rows_B), one.words(rows_B))


def test_growth_joins_rows_by_the_fingerprints_of_the_parts(grown: Grown) -> None:
    both, index = [open_store(path) for path in grown.stores], open_index(grown.shards)
    assert (
        joint_fingerprint([store.fingerprint for store in both])
        == index.fingerprint
        == open_store(grown.whole).fingerprint
    )
    assert np.array_equal(join_rows(both, index), np.arange(FIRST + LATER))
    later = join_rows(both, open_index(grown.shards[1]))
    assert np.array_equal(later, FIRST + np.arange(LATER))
    assert verify(grown.whole, grown.shards).sound
    assert "30 of 70 keys of" in verify(grown.stores[0], grown.shards).problems[0]


def test_growth_under_the_same_words_keeps_them(grown: Grown) -> None:
    first, later, whole = map(open_store, (*grown.stores, grown.whole))
    for name in LAYERS["layers"]:
        assert np.array_equal(first.vocabulary(name), later.vocabulary(name))
        words = np.concatenate([first.load_words(name), later.load_words(name)])
        assert np.array_equal(words, whole.load_words(name))
    assert later.layers == LAYERS["layers"]
    assert digest(grown.whole) != digest(grown.stores[0])


def test_growth_of_which_chunks_are_damaged_names_the_store(grown: Grown, tmp_path: Path) -> None:
    later = Path(shutil.copytree(grown.stores[1], tmp_path / "later.zarr"))
    (later / "block3/words/c/1/0/0").write_bytes(b"")
    for tier in TIERS:
        with pytest.raises(CorruptError, match=rf"chunk block3/words/c/1/0/0 \(rows 20-29\) of word store {later} "):
            targets_of([grown.stores[0], later], grown.shards, tier, tmp_path / "cache")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocabulary_digest": "0" * 16}, "vocabulary is [0-9a-f]{16} in the first and 0{16} in the second"),
        ({"projection_digest": "0" * 16}, r"projection is \[None, None\] in the first and \['0{16}', None\] in"),
        ({"words": 23}, "K is 24 in the first and 23 in the second"),
        ({"border": 1}, "border is 0 in the first and 1 in the second"),
        ({"teacher": {"weights_sha256": "0" * 64}}, "teacher weights is [0-9a-f]{64} in the first and 0{64} in the"),
        ({"view": {"size": 24}}, r"clean view is \{.*'size': 16.*\} in the first and \{.*'size': 24"),
    ],
)
def test_growth_refuses_words_that_mean_something_else(
    grown: Grown, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = Path(shutil.copytree(grown.stores[1], tmp_path / "other.zarr"))
    layer = zarr.open_group(path, mode="r+")["block3"]
    layer.update_attributes(
        {name: {**layer.attrs[name], **new} if isinstance(new, dict) else new for name, new in changed.items()}
    )
    with pytest.raises(MismatchError) as caught:
        layer_of([open_store(grown.stores[0]), open_store(resealed(path))], "block3")
    line = rf"layer 'block3' of word stores {grown.stores[0]} and {path} cannot be joined: {message}.*; encode the "
    assert re.match(
        rf"{line}second's images with --vocabulary {grown.stores[0]}, by the same teacher$", str(caught.value)
    )


def test_growth_refuses_a_key_in_two_stores(grown: Grown) -> None:
    twice = [open_store(path) for path in (*grown.stores, grown.whole)]
    message = (
        r"70 of 70 keys of the shards are more than once in word store .*first\.zarr, .*later\.zarr, .*whole\.zarr, for"
    )
    with pytest.raises(
        MismatchError, match=message + r" example img0000, .*; encode these shards into one store, or name"
    ):
        join_rows(twice, open_index(grown.shards))


def test_growth_refuses_other_images_under_the_same_keys(grown: Grown, tmp_path: Path) -> None:
    strange = write_shards(tmp_path / "strange", LATER, seed=9, prefix="new")
    with pytest.raises(
        MismatchError, match=rf"^{LATER} of {FIRST + LATER} images of the shards are not those that word"
    ):
        join_rows([open_store(path) for path in grown.stores], open_index([grown.shards[0], strange]))


def test_growth_of_one_store_is_that_store(grown: Grown) -> None:
    stores = [open_store(path) for path in grown.stores]
    assert isinstance(layer_of(stores[:1], "block3"), Layer)
    assert isinstance(layer_of(stores, "block3"), JoinedLayer)
