"""Files that are each in order and do not belong together: parts of two states of a store, images of two sets."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zarr
from encoding import run_encode
from growing import LAYERS, small_chunks_patch
from teacher_sets import IMAGES, write_shards

from bowstore.data.index import open_index
from bowstore.errors import CorruptError, MismatchError
from bowstore.verify import verify_path
from bowstore.words.store.join import join_rows
from bowstore.words.store.layer import Layer
from bowstore.words.store.store import Store, open_store
from bowstore.words.store.verify import digest, verify


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, shards: Path) -> Path:
    """A store of the same images and shapes with other words, as an earlier run may have left it."""
    path = tmp_path_factory.mktemp("other") / "words.zarr"
    with small_chunks_patch():
        run_encode(teacher=teacher_file, shards=shards, store=path, **LAYERS, seed=5)
    return path


def a_chunk(store: Path, other: Path) -> None:
    for name in ("block3/words/c/1/0/0", "block3/chunk_digest/c/1"):
        shutil.copyfile(other / name, store / name)


def all_chunks(store: Path, other: Path) -> None:
    for name in ("block3/words", "block3/chunk_digest"):
        shutil.copytree(other / name, store / name, dirs_exist_ok=True)


def the_attributes(store: Path, other: Path) -> None:
    shutil.copyfile(other / "block3/zarr.json", store / "block3/zarr.json")


def a_vocabulary_with_its_attributes(store: Path, other: Path) -> None:
    the_attributes(store, other)
    shutil.copytree(other / "block3/vocabulary", store / "block3/vocabulary", dirs_exist_ok=True)


def one_attribute(store: Path, other: Path) -> None:
    path = store / "block3/zarr.json"
    metadata = json.loads(path.read_text())
    metadata["attributes"]["teacher"]["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(metadata))


def the_rows(store: Path, other: Path) -> None:
    """Keys in another order, with their own digest, as of a store of the same images that was sharded otherwise."""
    group = zarr.open_group(store, mode="r+")
    for name in ("key_hash", "image_digest"):
        values = np.asarray(group[name][:])[::-1].copy()
        group[name][:] = values
        group.attrs[f"{name}_digest"] = f"{xxhash.xxh3_64_intdigest(values.astype('<u8').tobytes()):016x}"


CHANGES = [a_chunk, all_chunks, the_attributes, a_vocabulary_with_its_attributes, one_attribute, the_rows]


@pytest.mark.parametrize("change", CHANGES)
def test_parts_of_two_states_are_never_taken_for_one(
    store: Path, other: Path, change: Callable[[Path, Path], None]
) -> None:
    assert verify(store).sound
    change(store, other)
    message = r"layer 'block3' of word store .* is not as it was when it was completed: some of its files are from .*"
    with pytest.raises(CorruptError, match=message):
        open_store(store, "block3")
    with pytest.raises(CorruptError, match=message):
        Store(store).vocabulary("block3")
    assert change is the_rows or Store(store).layer("block2").complete
    problems = verify(store).problems
    assert any("is not as it was when it was completed" in problem for problem in problems), problems
    report = verify_path(store)
    assert not report.sound


def test_repair_of_an_exchanged_chunk_gives_the_words_of_before(
    store: Path, other: Path, teacher_file: Path, shards: Path
) -> None:
    before = digest(store)
    a_chunk(store, other)
    report = verify_path(store, repair=True)
    assert report.repairs == [
        f"{-(-IMAGES // 20)} damaged chunks were taken back; run `bowstore encode` again with the same settings, to "
        "write just that"
    ]
    run_encode(teacher=teacher_file, shards=shards, store=store, **LAYERS)
    assert verify(store).sound
    assert digest(store) == before


def test_the_digest_over_all_is_what_the_format_says(store: Path) -> None:
    """docs/store-format.md, from the files alone."""
    root = json.loads((store / "zarr.json").read_text())["attributes"]
    own = json.loads((store / "block3/zarr.json").read_text())["attributes"]
    recorded = own.pop("content_digest")
    rows = [root["dataset"], root["key_hash_digest"], root["image_digest_digest"]]
    total = xxhash.xxh3_128(json.dumps([rows, "block3", own], sort_keys=True).encode())
    chunks = zarr.open_group(store, mode="r")["block3/chunk_digest"]
    total.update(np.asarray(chunks[:]).astype("<u8").tobytes())
    assert total.hexdigest() == recorded


def test_equal_keys_of_other_images_are_refused_everywhere(store: Path, tmp_path: Path) -> None:
    strange = write_shards(tmp_path / "strange", IMAGES, seed=7)
    index = open_index(strange)
    message = (
        rf"^{IMAGES} of {IMAGES} images of the shards are not those that word store {store} was made of, though they "
        r"have their keys, for example img0000, .*img0004; .*--set task\.reencoded=true in training, --reencoded"
    )
    with pytest.raises(MismatchError, match=message):
        join_rows([open_store(store)], index)
    assert np.array_equal(join_rows([open_store(store)], index, reencoded=True), np.arange(IMAGES))
    assert [problem for problem in verify(store, strange).problems if "are not those that word store" in problem]
    assert verify(store, strange, reencoded=True).sound


def test_one_other_image_among_many_is_named(store: Path, shards: Path, tmp_path: Path) -> None:
    index = open_index(shards)
    digests = np.array(index.digest)
    digests[41] ^= np.uint64(1)
    changed = replace(index, fingerprint="of other shards", digest=digests)
    with pytest.raises(MismatchError, match=rf"^1 of {IMAGES} images of the shards .* for example {index.key(41)};"):
        join_rows([open_store(store)], changed)


@pytest.mark.parametrize("version", [2, "3", 3.0, True, None, [3], 4])
def test_stores_of_other_formats_are_refused_with_the_way_on(store: Path, version: object) -> None:
    path = store / "zarr.json"
    metadata = json.loads(path.read_text())
    metadata["attributes"]["format_version"] = version
    path.write_text(json.dumps(metadata))
    message = (
        rf"^word store {store} has format version {re.escape(repr(version))} \(written by bowstore .*\), this one "
        r"reads 3; make its words anew: `bowstore encode --store` with another path$"
    )
    with pytest.raises(MismatchError, match=message):
        open_store(store)
    assert len(verify(store).problems) == 1


def test_stores_that_were_appended_to_are_refused_with_the_way_on(store: Path) -> None:
    group = zarr.open_group(store, mode="r+")
    group.update_attributes({"dataset": {**group.attrs["dataset"], "parts": []}})
    message = (
        r"has grown by --append \(written by .*\), which is gone; make its words anew: .* one store for each folder"
    )
    with pytest.raises(MismatchError, match=message):
        open_store(store)


def test_layer_without_a_digest_over_all_is_refused(store: Path) -> None:
    path = store / "block3/zarr.json"
    metadata = json.loads(path.read_text())
    del metadata["attributes"]["content_digest"]
    path.write_text(json.dumps(metadata))
    with pytest.raises(CorruptError, match="is not as it was when it was completed"):
        open_store(store, "block3")
    assert isinstance(open_store(store, "block2").layer("block2"), Layer)
