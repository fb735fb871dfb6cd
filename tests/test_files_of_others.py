"""Places where a command writes and a user's file lies: it is named, and never written over or removed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from left_behind import left_behind
from shard_sets import ShardMaker, encode_jpeg, textured_image, write_tar

from bowstore.data import downloads
from bowstore.data.config import ShardsConfig
from bowstore.data.index import build_index
from bowstore.data.shards import make_shards
from bowstore.data.verify import _free_name, verify_folder
from bowstore.errors import BowstoreError, CorruptError, DataError, UsageError
from bowstore.files import check_free
from bowstore.words.store.layer import LayerSpec
from bowstore.words.store.writer import create_store

PRECIOUS = b"three years of work"
HASHES = {name: np.arange(4, dtype=np.uint64) for name in ("key_hash_N", "image_digest_N")}


def source(tmp_path: Path) -> Path:
    for name in ("ant", "bee"):
        folder = tmp_path / "source" / "train" / name
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(encode_jpeg(textured_image(0, 24, 24)))
    return tmp_path / "source"


def tars(root: Path, count: int = 2) -> Path:
    for number in range(count):
        write_tar(root / f"{number}.tar", [(f"k{number}", encode_jpeg(textured_image(number, 24, 24)), number)])
    return root


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    def check(out: Path) -> None:
        check_free(out, mark=b"Made by bowstore ", command="bowstore words", example="words.html")

    out = tmp_path / "words.html"
    check(out)
    out.write_bytes(b"<!DOCTYPE html>...Made by bowstore 1 with ...")
    check(out)
    out.write_bytes(PRECIOUS)
    with pytest.raises(UsageError, match=r"words\.html is there, and `bowstore words` did not write it; name another"):
        check(out)
    (tmp_path / "link.html").symlink_to(out)
    with pytest.raises(UsageError, match=r"link\.html is a link; name the file to write itself, or another one"):
        check(tmp_path / "link.html")
    (tmp_path / "dangling.html").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is a link"):
        check(tmp_path / "dangling.html")


@pytest.mark.parametrize("name", ["manifest.json", "index.safetensors", "quarantine.jsonl", ".parts/plan.json"])
@pytest.mark.parametrize("content", [PRECIOUS, b'{"name": "my web app"}'])
def test_shards_write_over_nothing_of_others(tmp_path: Path, name: str, content: bytes) -> None:
    place = tmp_path / "out" / "train" / name
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    with pytest.raises(DataError) as caught:
        make_shards(source(tmp_path), tmp_path / "out", ShardsConfig(workers=1))
    assert str(place) in str(caught.value) or str(place.parent) in str(caught.value)
    assert "move it away" in str(caught.value)
    assert place.read_bytes() == content
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_shards_clear_only_their_own_records(tmp_path: Path) -> None:
    make_shards(source(tmp_path), tmp_path / "out", ShardsConfig(workers=1))
    (tmp_path / "out/train/train-000000.tar").unlink()
    notes = tmp_path / "out/train/.parts/notes.txt"
    notes.write_bytes(PRECIOUS)
    make_shards(tmp_path / "source", tmp_path / "out", ShardsConfig(workers=1))
    assert notes.read_bytes() == PRECIOUS
    assert (tmp_path / "out/train/train-000000.tar").exists()


def test_index_does_not_replace_a_list_of_others(tmp_path: Path) -> None:
    root, line = tars(tmp_path / "shards"), json.dumps({"path": "a.jpg", "reason": "ugly", "who": "me"})
    (root / "quarantine.jsonl").write_text(line)
    with pytest.raises(CorruptError, match=r"quarantine\.jsonl is no list of bowstore's, or a damaged one .*move it"):
        build_index(root)
    assert (root / "quarantine.jsonl").read_text() == line


def test_what_was_set_aside_before_stays(tmp_path: Path) -> None:
    make_shards(source(tmp_path), tmp_path / "out", ShardsConfig(workers=1))
    tar = tmp_path / "out/train/train-000000.tar"
    earlier = tar.with_name(f"{tar.name}.damaged")
    earlier.write_bytes(PRECIOUS)
    tar.write_bytes(tar.read_bytes()[:-1000])
    verify_folder(tmp_path / "out/train", repair=True)
    assert earlier.read_bytes() == PRECIOUS
    assert tar.with_name(f"{tar.name}.damaged-2").exists()
    assert _free_name(tar).name == f"{tar.name}.damaged-3"


def test_a_download_clears_no_linked_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads.Download, "fetch", lambda self, folder: None, raising=False)
    photos = tmp_path / "photos" / "summer"
    photos.mkdir(parents=True)
    (tmp_path / ".download-cifar10").symlink_to(tmp_path / "photos")
    with pytest.raises(BowstoreError, match=r"\.download-cifar10 is a link, and bowstore downloads there and cl"):
        downloads.fetch("cifar10", tmp_path)
    assert photos.exists()


def test_a_layer_takes_no_folder_of_others(tmp_path: Path) -> None:
    writer = create_store(tmp_path / "s", fingerprint="f", **HASHES)
    spec = LayerSpec(teacher={}, view={}, vocabulary={}, num_words=3, grid=(2, 2), channels=2)
    vocabulary = np.zeros((3, 2), np.float32)
    (tmp_path / "s" / "conv4" / "c").mkdir(parents=True)
    notes = tmp_path / "s" / "conv4" / "notes.txt"
    notes.write_bytes(PRECIOUS)
    with pytest.raises(UsageError, match=r"s/conv4/notes\.txt lies where layer 'conv4' goes, and bowstore did not"):
        writer.add_layer("conv4", spec, vocabulary)
    assert notes.read_bytes() == PRECIOUS
    notes.unlink()
    (tmp_path / "s" / "conv4" / "words" / "c").mkdir(parents=True)  # what a killed writer leaves
    (tmp_path / "s" / "conv4" / "words" / "c" / "0").write_bytes(b"")
    (tmp_path / "s" / "conv4" / "words" / "zarr.json").write_bytes(b"")
    assert writer.add_layer("conv4", spec, vocabulary).num_words == 3


def test_a_new_store_sweeps_only_what_is_proven(tmp_path: Path) -> None:
    mine = tmp_path / ".s.tmp-backup" / "notes.txt"
    mine.parent.mkdir()
    mine.write_bytes(PRECIOUS)
    dead, alive = left_behind(tmp_path / "s"), left_behind(tmp_path / "s", process=os.getppid())
    for left in (dead, alive):
        left.unlink()
        (left / "key_hash").mkdir(parents=True)
    create_store(tmp_path / "s", fingerprint="f", **HASHES)
    assert mine.read_bytes() == PRECIOUS
    assert (dead.exists(), alive.exists()) == (False, True)


def test_a_page_over_a_thesis_is_refused_before_any_work(make_shard_set: ShardMaker, tmp_path: Path) -> None:
    from bowstore.report.page import write_words_page
    from bowstore.report.words import Wish

    (tmp_path / "thesis.docx").write_bytes(PRECIOUS)
    with pytest.raises(UsageError, match=r"thesis\.docx is there, and `bowstore words` did not write it"):
        write_words_page(tmp_path / "no.zarr", tmp_path / "no", tmp_path / "thesis.docx", Wish())
    assert (tmp_path / "thesis.docx").read_bytes() == PRECIOUS
