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
from served import SERVER
from teacher_sets import IMAGES, write_shards, write_teacher

from bowstore.data.index import build_index, open_index
from bowstore.errors import BowstoreError, CorruptError, MismatchError, MissingError, UsageError
from bowstore.files import stagings
from bowstore.words import append as append_module
from bowstore.words import encode as encode_module
from bowstore.words import layer as layer_module
from bowstore.words.layer import Layer
from bowstore.words.store import join_rows, open_store
from bowstore.words.store_writer import StoreWriter
from bowstore.words.verify import digest, discard_damaged, verify

LAYERS: dict[str, Any] = {"layers": ("block2", "block3"), "k": (12, 24)}
NEW = 50


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of images that came later."""
    return write_shards(tmp_path_factory.mktemp("more") / "shards", NEW, seed=1, prefix="new")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, shards: Path) -> Path:
    """A store of two layers, in chunks of 20 rows; not to be changed."""
    path = tmp_path_factory.mktemp("first") / "words.zarr"
    with small_chunks_patch():
        run_encode(teacher=teacher_file, shards=shards, store=path, **LAYERS)
    return path


@pytest.fixture
def store(first: Path, tmp_path: Path, small_chunks: int) -> Path:
    return Path(shutil.copytree(first, tmp_path / "words.zarr"))


def small_chunks_patch() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(layer_module, "MIN_CHUNK_BYTES", 1)
    patch.setattr(layer_module, "CHUNK_STEP_ROWS", 20)

    class Context:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            patch.undo()

    return Context()


def test_new_images_get_the_words_of_the_old_vocabulary(
    store: Path, first: Path, teacher_file: Path, shards: Path, more: Path, tmp_path: Path
) -> None:
    report = run_encode(teacher=teacher_file, shards=more, store=store, append=True, layers=(), k=())
    assert (report.images, report.images_added, report.images_here) == (IMAGES + NEW, NEW, NEW)
    grown, old = open_store(store), open_store(first)
    other = tmp_path / "other.zarr"
    run_encode(teacher=teacher_file, shards=more, store=other, vocabulary=first, layers=LAYERS["layers"], k=())
    for name in LAYERS["layers"]:
        words = grown.load_words(name)
        assert np.array_equal(words[:IMAGES], old.load_words(name))
        assert np.array_equal(grown.vocabulary(name), old.vocabulary(name))
        alone = open_store(other).load_words(name)
        assert (words[IMAGES:] == alone).mean() > 0.999  # but for rounding at near ties: other batches
        counted = [int((words == word).any(axis=(1, 2)).sum()) for word in range(grown.layer(name).words)]
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


def interrupted_append(store: Path, teacher_file: Path, shards: Path, *, chunks: int = 0) -> None:
    """An append that ends like Ctrl-C when so many chunks are written."""
    plain, written = StoreWriter.write_chunk, []

    def failing(self: StoreWriter, layer: str, chunk: int, words: Any) -> None:
        if len(written) == chunks:
            raise KeyboardInterrupt
        written.append((layer, chunk))
        plain(self, layer, chunk, words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreWriter, "write_chunk", failing)
        with pytest.raises(KeyboardInterrupt):
            run_encode(teacher=teacher_file, shards=shards, store=store, append=True)


@pytest.mark.parametrize("change", ["another vocabulary", "another layer"])
def test_an_append_of_the_store_that_was_there_before_is_not_finished(
    store: Path, teacher_file: Path, shards: Path, more: Path, change: str
) -> None:
    interrupted_append(store, teacher_file, more)
    if change == "another vocabulary":
        shutil.rmtree(store)
        run_encode(teacher=teacher_file, shards=shards, store=store, seed=1, **LAYERS)
    else:
        run_encode(teacher=teacher_file, shards=shards, store=store, layers=("block1",), k=(8,))
    before = digest(store)
    with pytest.raises(MismatchError, match=r"unfinished --append of other images, or to another store; finish it"):
        run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    assert digest(store) == before
    append_module.drop_append(store)
    run_encode(teacher=teacher_file, shards=more, store=store, append=True)
    assert verify(store).sound


def test_the_chunk_of_a_small_store_grows(teacher_file: Path, more: Path, tmp_path: Path) -> None:
    small = write_shards(tmp_path / "small", 7, seed=4, prefix="small")
    path = tmp_path / "words.zarr"
    with small_chunks_patch():
        run_encode(teacher=teacher_file, shards=small, store=path, **LAYERS)
        old = open_store(path).load_words("block3")
        run_encode(teacher=teacher_file, shards=more, store=path, append=True)
    grown = open_store(path)
    assert grown.layer("block3").chunk_rows == 20
    assert np.array_equal(grown.load_words("block3")[:7], old)
    assert verify(path).sound


def damage(store: Path, layer: str, chunk: int) -> None:
    """Damage a chunk and take it back."""
    (store / f"{layer}/words/c/{chunk}/0/0").write_bytes(b"")
    assert discard_damaged(store, verify(store)) == 1


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


@pytest.mark.parametrize(("damaged", "other"), [("nothing", 16), ("a chunk", 16), ("everything", 15)])
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


def joined(first: Path, second: Path, folder: Path) -> Path:
    """Shards of two sets in one folder."""
    folder.mkdir()
    for part in (first, second):
        for tar in part.glob("*.tar"):
            shutil.copy(tar, folder / f"{part.parent.name}-{tar.name}")
    build_index(folder)
    return folder


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
    run_encode(teacher=teacher_file, shards=bigger, store=whole, vocabulary=store, layers=LAYERS["layers"], k=())
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


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


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


def test_what_does_not_fit_is_one_line(store: Path, teacher_file: Path, more: Path, tmp_path: Path) -> None:
    def refused(error: type[BowstoreError], message: str, **values: Any) -> None:
        with pytest.raises(error, match=message):
            run_encode(**{"teacher": teacher_file, "shards": more, "store": store, "append": True, **values})

    other = write_teacher(tmp_path / "other.safetensors", seed=1)
    refused(MismatchError, r"teacher weights [0-9a-f]{64}, now it is .*; --append needs the teacher", teacher=other)
    refused(MismatchError, r"precision float32, now it is bfloat16; --append needs", precision="bfloat16")
    refused(UsageError, r"all layers of word store .*: block2, block3; leave --layer out", layers=("block3",))
    refused(UsageError, r"--K 25 does not fit the vocabulary's 12 words of layer 'block2'; leave --K out", k=(25,))
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
