"""Stores that grow by new images under their own vocabularies."""

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from encoding import encode_in_process, run_encode
from growing import LAYERS, NEW, interrupted_append, older_provenance, small_chunks_patch
from served import SERVER
from teacher_sets import IMAGES, write_shards, write_teacher

from bowstore.data.index import open_index
from bowstore.errors import BowstoreError, MismatchError, MissingError, UsageError
from bowstore.files import stagings
from bowstore.words import append as append_module
from bowstore.words import encode as encode_module
from bowstore.words.store import join_rows, open_store
from bowstore.words.store_writer import StoreWriter
from bowstore.words.verify import digest, verify


def test_new_images_get_the_words_of_the_old_vocabulary(
    store: Path, first: Path, teacher_file: Path, shards: Path, more: Path, tmp_path: Path
) -> None:
    report = run_encode(teacher=teacher_file, shards=more, store=store, append=True, layers=(), num_words=())
    assert (report.images, report.images_added, report.images_here) == (IMAGES + NEW, NEW, NEW)
    grown, old = open_store(store), open_store(first)
    other = tmp_path / "other.zarr"
    run_encode(teacher=teacher_file, shards=more, store=other, vocabulary=first, layers=LAYERS["layers"], num_words=())
    for name in LAYERS["layers"]:
        words = grown.load_words(name)
        assert np.array_equal(words[:IMAGES], old.load_words(name))
        assert np.array_equal(grown.vocabulary(name), old.vocabulary(name))
        alone = open_store(other).load_words(name)
        assert (words[IMAGES:] == alone).mean() > 0.999  # but for rounding at near ties: other batches
        counted = [int((words == word).any(axis=(1, 2)).sum()) for word in range(grown.layer(name).num_words)]
        assert grown.document_frequency(name).tolist() == counted
        assert grown.nearest(name).row_Kn.max() >= IMAGES  # new images are among the nearest
    assert verify(store).sound
    assert np.array_equal(join_rows(grown, open_index(more)), np.arange(IMAGES, IMAGES + NEW))
    assert np.array_equal(join_rows(grown, open_index(shards)), np.arange(IMAGES))
    assert [part["images"] for part in grown.parts] == [IMAGES, NEW]
    assert grown.parts[0]["fingerprint"] == old.fingerprint != grown.fingerprint
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_same_images_again_change_nothing(store: Path, first: Path, teacher_file: Path, shards: Path) -> None:
    before = digest(store)
    report = run_encode(teacher=teacher_file, shards=shards, store=store, append=True)
    assert (report.images, report.images_added, report.images_here) == (IMAGES, 0, 0)
    assert digest(store) == before


def test_grown_twice_and_by_shards_that_hold_old_images_too(
    store: Path, teacher_file: Path, more: Path, tmp_path: Path
) -> None:
    bigger = write_shards(tmp_path / "bigger", NEW + 30, seed=1, prefix="new")
    run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    report = run_encode(teacher=teacher_file, shards=bigger, store=store, append=True)
    assert (report.images, report.images_added) == (IMAGES + NEW + 30, 30)
    assert verify(store).sound
    assert [part["images"] for part in open_store(store).parts] == [IMAGES, NEW, 30]
    assert len(join_rows(open_store(store), open_index(bigger))) == NEW + 30


def test_the_old_store_stays_usable_until_the_end(
    store: Path, teacher_file: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plain, written = digest(store), StoreWriter.write_chunk, []
    interrupted_append(store, teacher_file, more, chunks=4)
    assert digest(store) == before
    assert verify(store).sound

    def counting(self: StoreWriter, layer: str, chunk: int, words: Any) -> None:
        written.append((layer, chunk))
        plain(self, layer, chunk, words)

    monkeypatch.setattr(StoreWriter, "write_chunk", counting)
    run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    assert len(written) <= 8 - 4  # of the eight new chunks those that were there are not written again
    assert len(open_store(store)) == IMAGES + NEW


def test_another_append_meanwhile_is_refused(store: Path, teacher_file: Path, more: Path, tmp_path: Path) -> None:
    interrupted_append(store, teacher_file, more)
    others = write_shards(tmp_path / "others", 20, seed=2, prefix="other")
    with pytest.raises(MismatchError, match=r"\.append-\w+ is an unfinished --append of other images, or to"):
        run_encode(teacher=teacher_file, shards=others, store=store, append=True)


@pytest.mark.parametrize("change", ["another vocabulary", "another layer"])
def test_an_append_of_the_store_that_was_there_before_is_not_finished(
    store: Path, teacher_file: Path, shards: Path, more: Path, change: str
) -> None:
    interrupted_append(store, teacher_file, more)
    if change == "another vocabulary":
        shutil.rmtree(store)
        run_encode(teacher=teacher_file, shards=shards, store=store, seed=1, **LAYERS)
    else:
        run_encode(teacher=teacher_file, shards=shards, store=store, layers=("block1",), num_words=(8,))
    before = digest(store)
    with pytest.raises(MismatchError, match=r"unfinished --append of other images, or to another store; finish it"):
        run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    assert digest(store) == before
    append_module.drop_append(store)
    run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    assert verify(store).sound


def test_a_process_that_slept_through_the_end_does_not_end_another_append(
    store: Path, teacher_file: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bigger = write_shards(tmp_path / "bigger", NEW + 30, seed=1, prefix="new")
    plain, digests = append_module.end_append, []

    def asleep(*arguments: Any) -> None:
        plain(*arguments)  # what another process does meanwhile, and then begins
        digests.append(digest(store))
        interrupted_append(store, teacher_file, bigger, chunks=2)
        plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "end_append", asleep)
        run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    assert digest(store) == digests[0]
    assert len(stagings(store)) == 1
    run_encode(teacher=teacher_file, shards=bigger, store=store, append=True)
    assert len(open_store(store)) == IMAGES + NEW + 30


def test_the_chunk_of_a_small_store_grows(teacher_file: Path, more: Path, tmp_path: Path) -> None:
    small = write_shards(tmp_path / "small", 7, seed=4, prefix="small")
    path = tmp_path / "words.zarr"
    with small_chunks_patch():
        with older_provenance():
            run_encode(teacher=teacher_file, shards=small, store=path, **LAYERS)
        old = open_store(path).load_words("block3")
        run_encode(teacher=teacher_file, shards=more, store=path, append=True)
    grown = open_store(path)
    assert grown.layer("block3").attributes["teacher"]["student"] == "tiny-bownet"  # as it was recorded
    assert grown.layer("block3").chunk_rows == 20
    assert np.array_equal(grown.load_words("block3")[:7], old)
    assert verify(path).sound


def test_a_death_while_the_end_is_recorded_loses_no_nearest_image(
    store: Path, teacher_file: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(shutil.copytree(store, tmp_path / "whole.zarr"))
    run_encode(teacher=teacher_file, shards=more, store=whole, append=True)
    plain, calls = zarr.Group.update_attributes, []

    def deadly(self: zarr.Group, values: dict[str, Any]) -> zarr.Group:
        calls.append(values)
        if values.get("complete"):
            raise KeyboardInterrupt
        return plain(self, values)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Group, "update_attributes", deadly)
        with pytest.raises(KeyboardInterrupt):
            run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    assert {"nearest_digest": None}.items() <= calls[-2].items()
    run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    for layer in LAYERS["layers"]:
        for found, wanted in zip(open_store(store).nearest(layer), open_store(whole).nearest(layer), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert verify(store).sound


def test_what_does_not_fit_is_one_line(store: Path, teacher_file: Path, more: Path, tmp_path: Path) -> None:
    def refused(error: type[BowstoreError], message: str, **values: Any) -> None:
        with pytest.raises(error, match=message):
            run_encode(**{"teacher": teacher_file, "shards": more, "store": store, "append": True, **values})

    other = write_teacher(tmp_path / "other.safetensors", seed=1)
    refused(MismatchError, r"teacher weights [0-9a-f]{64}, now it is .*; --append needs the teacher", teacher=other)
    refused(MismatchError, r"precision float32, now it is bfloat16; --append needs", precision="bfloat16")
    refused(UsageError, r"all layers of word store .*: block2, block3; leave --layer out", layers=("block3",))
    refused(
        UsageError, r"--K 25 does not fit the vocabulary's 12 words of layer 'block2'; leave --K out", num_words=(25,)
    )
    refused(UsageError, r"no layer 'block2'.*--append needs the teacher of word store .*, wrn-", teacher="resnet18")
    refused(UsageError, r"--vocabulary does not go with --append", vocabulary=store)
    refused(MissingError, r"no word store .*none\.zarr", store=tmp_path / "none.zarr")
    assert digest(store)


def test_an_unfinished_layer_is_not_appended_to(store: Path, teacher_file: Path, more: Path) -> None:
    StoreWriter(store).discard_chunks("block3", [1])
    with pytest.raises(MismatchError, match=r"'block3' .* is not complete: 4 of 5 chunks are written; run `bowstore"):
        run_encode(teacher=teacher_file, shards=more, store=store, append=True, layers=("block2", "block3"))


def test_a_disk_that_is_too_small_is_refused_at_the_start(
    store: Path, teacher_file: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=NEW * 2 * (64 + 16) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BowstoreError, match=r"has 0\.01 MB free, the words need 0\.\d\d MB; free some"):
        run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert verify(store).sound


def test_without_links_chunks_are_copied(
    store: Path, teacher_file: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    assert verify(store).sound


@pytest.mark.parametrize("finished", [True, False])
def test_death_between_the_two_renames_is_made_good(
    store: Path, teacher_file: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    plain = Path.rename

    def deadly(self: Path, target: Path) -> Path:
        if self.name.startswith(".words.zarr.append-"):
            raise KeyboardInterrupt
        return plain(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", deadly)
        with pytest.raises(KeyboardInterrupt):
            run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    assert not store.exists()
    if not finished:
        append_module.drop_append(store)
    append_module.recover_append(store)
    assert len(open_store(store)) == (IMAGES + NEW if finished else IMAGES)
    run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    assert len(open_store(store)) == IMAGES + NEW
    assert verify(store).sound


def test_a_store_that_is_missing_between_the_renames_says_so(store: Path) -> None:
    store.rename(store.with_name(".words.zarr.old"))
    message = r"no word store .*: an --append was interrupted as it took the name; run it again"
    with pytest.raises(MissingError, match=message):
        open_store(store)


def test_killed_while_appending(store: Path, teacher_file: Path, more: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(store, tmp_path / "whole.zarr"))
    run_encode(teacher=teacher_file, shards=more, store=whole, append=True)
    before = digest(store)
    values = {"teacher": teacher_file, "shards": more, "store": store, "append": True}
    deaths = 0
    for renames in (3, 9, 20, 4, 6, 10_000):
        process = SERVER.Process(target=encode_in_process, args=(values, renames))
        process.start()
        process.join(300)
        if process.exitcode == 0:
            break
        deaths += 1
        assert digest(store) == before
    assert deaths >= 3
    assert digest(store) == digest(whole)
    assert re.findall(r"\.words\.zarr\S*", str(list(tmp_path.iterdir()))) == []
