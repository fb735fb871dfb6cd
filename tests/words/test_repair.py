"""Damage of stores that have grown, or grow at the moment."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoding import run_encode
from growing import LAYERS, NEW, damage, interrupt, interrupted_append, joined
from teacher_sets import IMAGES, write_shards

from bowstore.data.index import open_index
from bowstore.errors import CorruptError, MismatchError
from bowstore.files import stagings
from bowstore.words import encode as encode_module
from bowstore.words.layer import Layer
from bowstore.words.store import open_store
from bowstore.words.store_writer import StoreWriter
from bowstore.words.verify import digest, discard_damaged, verify


def test_damage_of_a_grown_store_is_made_good(store: Path, teacher_file: Path, shards: Path, more: Path) -> None:
    run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    before, nearest = digest(store), open_store(store).nearest("block3").row_Kn
    damage(store, "block3", 1)
    way = r"not complete: 7 of 8 chunks .*; run `bowstore encode --append` with shards that hold their images"
    with pytest.raises(MismatchError, match=way):
        open_store(store).layer("block3")
    report = run_encode(teacher=teacher_file, shards=shards, store=store, append=True)
    assert (report.images_here, report.images_added) == (20, 0)  # just the images of the chunk
    assert digest(store) == before
    assert np.array_equal(open_store(store).nearest("block3").row_Kn, nearest)
    assert verify(store).sound


@pytest.mark.parametrize(("damaged", "other"), [("nothing", 16), ("a chunk", 16), ("everything", 14)])
def test_other_images_under_the_same_keys_are_refused(
    store: Path, teacher_file: Path, more: Path, tmp_path: Path, damaged: str, other: int
) -> None:
    run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    before = digest(store)
    if damaged == "a chunk":
        damage(store, "block3", 1)
    elif damaged == "everything":
        StoreWriter(store).discard_chunks("block2", range(8))
        StoreWriter(store).discard_chunks("block3", range(8))
    strange = write_shards(tmp_path / "other", IMAGES + 10, seed=7)  # the first ones have the names of old images
    message = rf"holds other images than word store .* under the same keys: of 16 compared {other} have .*, .* img0"
    with pytest.raises(MismatchError, match=message):
        run_encode(teacher=teacher_file, shards=strange, store=store, append=True)
    assert not stagings(store)
    assert damaged != "nothing" or digest(store) == before


@pytest.mark.parametrize("grown", [True, False])
def test_lost_nearest_images_are_found_again(
    store: Path, teacher_file: Path, shards: Path, more: Path, tmp_path: Path, grown: bool
) -> None:
    again: dict[str, Any] = {"teacher": teacher_file, "shards": shards, **LAYERS}
    if grown:
        run_encode(teacher=teacher_file, shards=more, store=store, append=True)
        again = {"teacher": teacher_file, "shards": joined(shards, more, tmp_path / "both"), "append": True}
    whole = Path(shutil.copytree(store, tmp_path / "whole.zarr"))
    (store / "block2/nearest/c/0/0/0").write_bytes(b"x")
    (store / "block2/words/c/1/0/0").write_bytes(b"x")
    (store / "block3/document_frequency/c/0").write_bytes(b"x")
    report = verify(store)
    assert len(report.problems) == 3
    assert discard_damaged(store, report) == len(store_chunks(whole))
    run_encode(store=store, **again)
    assert verify(store).sound
    assert digest(store) == digest(whole)
    for layer in LAYERS["layers"]:
        for found, wanted in zip(open_store(store).nearest(layer), open_store(whole).nearest(layer), strict=True):
            np.testing.assert_array_equal(found, wanted)


def store_chunks(store: Path) -> list[int]:
    return list(range(open_store(store).layer("block2").chunks))


def test_a_lost_vocabulary_is_no_reason_to_take_words_back(store: Path) -> None:
    (store / "block2/vocabulary/c/0/0").write_bytes(b"x")
    (store / "block2/words/c/1/0/0").write_bytes(b"x")
    report = verify(store)
    assert len(report.problems) == 2
    assert report.damaged == {}


def test_damage_where_two_sets_meet_needs_the_images_of_both(
    store: Path, teacher_file: Path, shards: Path, more: Path, tmp_path: Path
) -> None:
    run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    before = digest(store)
    damage(store, "block2", IMAGES // 20)
    for part in (shards, more):
        with pytest.raises(
            MismatchError, match=r"lacks \d+ images of damaged chunks of .* rows \d+, .*`bowstore index`"
        ):
            run_encode(teacher=teacher_file, shards=part, store=store, append=True)
    both, late = joined(shards, more, tmp_path / "both"), write_shards(tmp_path / "late", 30, seed=2, prefix="late")
    assert run_encode(teacher=teacher_file, shards=both, store=store, append=True).images_added == 0
    assert digest(store) == before
    run_encode(teacher=teacher_file, shards=late, store=store, append=True)
    assert verify(store).sound


def test_what_is_taken_back_comes_before_what_is_new(
    store: Path, teacher_file: Path, shards: Path, more: Path, tmp_path: Path
) -> None:
    run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    bigger = write_shards(tmp_path / "bigger", NEW + 30, seed=1, prefix="new")
    interrupted_append(store, teacher_file, bigger)
    damage(store, "block3", 6)
    assert not stagings(store)  # it shared the damaged file
    report = run_encode(teacher=teacher_file, shards=bigger, store=store, append=True)
    assert report.images_added == 30
    assert report.images_here > 30
    grown, whole = open_store(store), tmp_path / "whole.zarr"
    assert verify(store).sound
    assert len(grown) == IMAGES + NEW + 30
    run_encode(
        teacher=teacher_file, shards=bigger, store=whole, vocabulary=store, layers=LAYERS["layers"], num_words=()
    )
    assert (grown.load_words("block3")[IMAGES:] == open_store(whole).load_words("block3")).mean() > 0.999


def test_a_refill_leaves_alone_what_an_append_has_seen(
    store: Path, teacher_file: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    bigger = write_shards(tmp_path / "bigger", NEW + 30, seed=1, prefix="new")
    whole = Path(shutil.copytree(store, tmp_path / "whole.zarr"))
    run_encode(teacher=teacher_file, shards=bigger, store=whole, append=True)
    interrupted_append(store, teacher_file, bigger, chunks=3)
    seen = set((tmp_path / ".words.zarr.work").glob("nearest.*"))
    StoreWriter(store).discard_chunks("block3", [6])
    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "begin_append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_encode(teacher=teacher_file, shards=bigger, store=store, append=True)
    assert seen == set((tmp_path / ".words.zarr.work").glob("nearest.*"))
    run_encode(teacher=teacher_file, shards=bigger, store=store, append=True)
    assert digest(store) == digest(whole)
    for layer in LAYERS["layers"]:
        for found, wanted in zip(open_store(store).nearest(layer), open_store(whole).nearest(layer), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("name", "remedy"), [("nearest", "run"), ("nearest_distance", "run"), ("vocabulary", "restore it from a copy")]
)
@pytest.mark.parametrize("begun", [True, False])
def test_damaged_arrays_are_not_carried_on(
    store: Path, teacher_file: Path, more: Path, name: str, remedy: str, begun: bool
) -> None:
    if begun:
        interrupted_append(store, teacher_file, more)
    (file,) = (path for path in (store / "block3" / name / "c").rglob("*") if path.is_file())
    file.unlink()
    with pytest.raises(CorruptError, match=rf"array block3/{name} of word store .*words\.zarr differs .*; {remedy}"):
        run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    assert len(stagings(store)) == begun


def test_an_append_in_between_is_not_taken_for_damage(
    store: Path, teacher_file: Path, shards: Path, more: Path
) -> None:
    opened, last = open_store(store), open_index(shards).key(IMAGES - 1)
    opened.words(last, "block2")
    (store / "block3/words/c/1/0/0").write_bytes(b"")
    report = verify(store)
    assert discard_damaged(store, report) == 1
    run_encode(teacher=teacher_file, shards=shards, store=store, **LAYERS)
    run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    with pytest.raises(MismatchError, match=r"changed after it was read \(an --append ended\); run the same again"):
        discard_damaged(store, report)
    assert verify(store).sound
    with pytest.raises(MismatchError, match=r"was grown by --append since it was opened; open it again"):
        opened.words(last, "block3")


def test_a_store_that_is_replaced_while_it_is_read_is_read_again(
    store: Path, teacher_file: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = Layer.read_chunk, []

    def straddling(self: Layer, chunk: int, value: int) -> Any:
        calls.append(chunk)
        if len(calls) == 3:
            run_encode(teacher=teacher_file, shards=more, store=store, append=True)
        return plain(self, chunk, value)

    monkeypatch.setattr(Layer, "read_chunk", straddling)
    report = verify(store)
    assert report.problems == []
    assert report.images == IMAGES + NEW
