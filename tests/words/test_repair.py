"""Damage that is taken back, and stores of which nothing can be encoded again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from encoding import run_encode
from growing import LAYERS, as_grown
from teacher_sets import IMAGES

from bowstore.data.index import open_index
from bowstore.errors import MismatchError
from bowstore.verify import verify_path
from bowstore.words.store.join import join_rows
from bowstore.words.store.store import open_store
from bowstore.words.store.verify import digest, discard_damaged, verify
from bowstore.words.store.writer import StoreWriter


def test_lost_nearest_images_are_found_again(store: Path, teacher_file: Path, shards: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(store, tmp_path / "whole.zarr"))
    (store / "block2/nearest/c/0/0/0").write_bytes(b"x")
    (store / "block2/words/c/1/0/0").write_bytes(b"x")
    (store / "block3/document_frequency/c/0").write_bytes(b"x")
    report = verify(store)
    assert len(report.problems) == 3
    assert discard_damaged(store, report) == open_store(whole).layer("block2").chunks
    run_encode(teacher=teacher_file, shards=shards, store=store, **LAYERS)
    assert verify(store).sound
    assert digest(store) == digest(whole)
    for layer in LAYERS["layers"]:
        for found, wanted in zip(open_store(store).nearest(layer), open_store(whole).nearest(layer), strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_a_lost_vocabulary_is_no_reason_to_take_words_back(store: Path) -> None:
    (store / "block2/vocabulary/c/0/0").write_bytes(b"x")
    (store / "block2/words/c/1/0/0").write_bytes(b"x")
    report = verify(store)
    assert len(report.problems) == 2
    assert report.damaged == {}


def test_a_store_that_was_appended_to_is_read_and_never_taken_apart(
    store: Path, teacher_file: Path, shards: Path
) -> None:
    before = digest(store)
    assert digest(as_grown(store)) == before
    assert verify(store, shards).sound
    assert np.array_equal(join_rows(open_store(store), open_index(shards)), np.arange(IMAGES))
    with pytest.raises(
        MismatchError,
        match=rf"was made of data set 0{{32}} .* encode into a new --store, .* --vocabulary {store}$",
    ):
        run_encode(teacher=teacher_file, shards=shards, store=store, **LAYERS)
    (store / "block2/words/c/1/0/0").write_bytes(b"")
    report = verify_path(store, repair=True)
    assert report.repairs == []
    assert report.problems[-1].message == (
        f"nothing was taken back from word store {store}: it has grown by --append, which is gone: encode its images "
        f"anew, with --vocabulary {store}"
    )
    StoreWriter(store).discard_chunks("block2", [1])  # as an earlier version took it back
    with pytest.raises(MismatchError, match=r"4 of 5 chunks are written; it has grown by --append, which is gone"):
        open_store(store).layer("block2")
