"""Damage that is taken back, and stores of which nothing can be encoded again."""

import shutil
from pathlib import Path

import numpy as np
from encoding import run_encode
from growing import LAYERS

from bowstore.words.store.store import open_store
from bowstore.words.store.verify import digest, discard_damaged, verify


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
        for found, wanted in zip(
            *(open_store(path).layer(layer).read_nearest() for path in (store, whole)), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)


def test_a_lost_vocabulary_is_no_reason_to_take_words_back(store: Path) -> None:
    (store / "block2/vocabulary/c/0/0").write_bytes(b"x")
    (store / "block2/words/c/1/0/0").write_bytes(b"x")
    report = verify(store)
    assert len(report.problems) == 2
    assert report.damaged == {}
