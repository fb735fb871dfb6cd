"""What counts as written survives a power cut: content before the name, the name before the next step."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from power_cut import watch
from servers import serve
from shard_sets import encode_jpeg, textured_image, write_store, write_tar

from bowstore.config import StorageConfig
from bowstore.data.config import ShardsConfig
from bowstore.data.index import build_index
from bowstore.data.shards import make_shards
from bowstore.files import atomic_file, file_digest, write_json
from bowstore.remote import RemoteFolder, Wanted, fetch_store
from bowstore.remote.cache import part_of
from bowstore.train.checkpoint import save_checkpoint
from bowstore.words.store.layer import LayerSpec
from bowstore.words.store.nearest import NearestSearch
from bowstore.words.store.statistics import word_statistics
from bowstore.words.store.store import open_store
from bowstore.words.store.writer import StoreWriter, create_store
from bowstore.words.targets.flat import open_flat


def hashes(count: int) -> dict[str, Any]:
    return {name: np.arange(count, dtype=np.uint64) for name in ("key_hash_N", "image_digest_N")}


def spec() -> LayerSpec:
    return LayerSpec(teacher={}, view={}, vocabulary={}, num_words=3, grid=(2, 2), channels=2)


def test_a_file_is_safe_before_it_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with watch() as disk:
        with atomic_file(tmp_path / "a") as file:
            file.write(b"new" * 10_000)
        assert disk.early == []
        assert disk.lost(tmp_path) == []
    assert disk.names("rename") == ["a"]
    assert [call.split()[0] for call in disk.calls] == ["fsync", "rename", "fsync"]
    assert disk.calls[-1] == f"fsync {tmp_path}"
    assert (tmp_path / "a").read_bytes() == b"new" * 10_000


def test_a_file_that_can_be_made_again_costs_no_fsync(tmp_path: Path) -> None:
    with watch() as disk, atomic_file(tmp_path / "a", durable=False) as file:
        file.write(b"new")
    assert disk.calls == [f"rename {tmp_path}/a"]
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="Input/output error"), atomic_file(tmp_path / "a") as file:
        file.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_that_cannot_be_synced_is_told_unless_the_file_system_knows_no_such_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, number = os.fsync, errno.EINVAL

    def fsync(file: Any) -> None:
        if Path(os.readlink(f"/proc/self/fd/{file}")).is_dir() or number == errno.ENOTSUP:
            raise OSError(number, os.strerror(number))
        plain(file)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a", 1)
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        write_json(tmp_path / "a", 2)
    number = errno.ENOTSUP  # of a file it is no answer
    with pytest.raises(OSError, match="not supported"):
        write_json(tmp_path / "a", 3)


def test_a_checkpoint_is_safe_when_it_is_saved(tmp_path: Path) -> None:
    with watch() as disk:
        save_checkpoint(tmp_path, {"step": 3, "config": {}, "backbone": {}, "head": {}})
        assert disk.early == []
        assert disk.lost(tmp_path) == []


def test_a_chunk_is_safe_before_it_is_committed(tmp_path: Path) -> None:
    with watch() as disk:
        writer = create_store(tmp_path / "s", fingerprint="f", **hashes(4))
        assert disk.early == []
        assert disk.lost(tmp_path) == []
        writer.add_layer("conv4", spec(), np.zeros((3, 2), np.float32))
        assert disk.lost(tmp_path) == []
        assert disk.calls[-2:] == [f"rename {tmp_path}/s/zarr.json", f"fsync {tmp_path}/s"]  # the list of layers last
        begun = len(disk.calls)
        writer.write_chunk("conv4", 0, np.zeros((4, 2, 2), np.uint16))
        assert disk.early == []
        assert disk.lost(tmp_path) == []
        calls = disk.calls[begun:]
        words = calls.index(f"rename {tmp_path}/s/conv4/words/c/0/0/0")
        digest = calls.index(f"rename {tmp_path}/s/conv4/chunk_digest/c/0")
        assert words < calls.index(f"fsync {tmp_path}/s/conv4/words/c/0/0") < digest
        for folder in ("c/0", "c", "."):  # each gained an entry
            assert calls.index(f"fsync {(tmp_path / 's/conv4/words' / folder).resolve()}") < digest
        statistics = word_statistics(iter([np.zeros((4, 2, 2), np.uint16)]), 3)
        begun = len(disk.calls)
        writer.mark_complete("conv4", statistics, NearestSearch(3).result())
        assert disk.early == []
        assert disk.lost(tmp_path) == []
        renamed = [call for call in disk.calls[begun:] if call.startswith("rename ")]
        assert renamed[0] == renamed[-1] == f"rename {tmp_path}/s/conv4/zarr.json"  # taken back first, given last
    # Chunks of nothing but fill values are written: one that is gone must not pass for one of those.
    assert {path.name for path in (tmp_path / "s/conv4").iterdir() if not (path / "c").is_dir()} == {"zarr.json"}


def test_chunks_are_taken_back_before_they_go(tmp_path: Path) -> None:
    writer = create_store(tmp_path / "s", fingerprint="f", **hashes(4))
    writer.add_layer("conv4", spec(), np.zeros((3, 2), np.float32))
    writer.write_chunk("conv4", 0, np.zeros((4, 2, 2), np.uint16))
    with watch() as disk:
        StoreWriter(tmp_path / "s").discard_chunks("conv4", [0])
        assert disk.early == []
        assert disk.lost(tmp_path / "s" / "conv4" / "chunk_digest") == [
            line for line in disk.lost(tmp_path / "s" / "conv4" / "chunk_digest") if "zarr.json" in line
        ]
    assert disk.names("rename")[0] == "zarr.json"


def test_a_shard_is_safe_before_its_record_and_all_before_the_manifest(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / "source" / "train" / f"c{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_jpeg(textured_image(number, 24, 24)))
    (tmp_path / "out").mkdir()
    with watch() as disk:
        make_shards(tmp_path / "source", tmp_path / "out", ShardsConfig(per_shard=2, workers=1))
        assert disk.early == []
        assert [line for line in disk.lost(tmp_path / "out") if ".lock" not in line] == []
    named = disk.names("rename")
    for tar in ("train-000000", "train-000001"):
        assert named.index(f"{tar}.tar") < named.index(f"{tar}.json") < named.index("index.safetensors")
    assert named[-1] == "manifest.json"
    for call in disk.calls:
        if call.startswith("rename "):  # each name is safe before the next is given
            place = disk.calls.index(call)
            assert disk.calls[place + 1] == f"fsync {Path(call[7:]).parent}"


def test_an_index_is_safe(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("k", encode_jpeg(textured_image(0, 24, 24)), 0)])
    with watch() as disk:
        build_index(tmp_path)
        assert disk.early == []
        assert [line for line in disk.lost(tmp_path) if "a.tar" not in line] == []


def test_copies_of_remote_files_are_safe(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "a.tar").write_bytes(b"a" * 5000)
    storage = StorageConfig(cache=tmp_path / "cache", retries=0)
    folder = RemoteFolder(f"file://{there}", storage)
    part_of(folder.folder / "a.tar").parent.mkdir(parents=True)
    part_of(folder.folder / "a.tar").write_bytes(b"a" * 100)  # is gone on with
    with watch() as disk:
        path = folder.fetch("a.tar", Wanted(5000, file_digest(there / "a.tar")))
        index = folder.fetch("a.tar")
        assert disk.early == []
        assert [line for line in disk.lost(folder.folder) if ".lock" not in line] == []
    named = disk.names("rename")
    assert named.index(".a.tar.json") < named.index("a.tar")  # never a copy without a record
    assert path == index


def test_a_copy_of_a_remote_store_is_safe_as_a_whole(tmp_path: Path, make_shard_set: Any) -> None:
    index = make_shard_set(8)
    write_store(tmp_path / "there" / "words.zarr", index)
    with serve(tmp_path / "there") as server, watch() as disk:
        storage = StorageConfig(cache=tmp_path / "cache", retries=0)
        copy = fetch_store(Path(f"{server.url}/words.zarr"), storage, display=False)
        assert disk.early == []
        assert disk.lost(copy) == []
        assert f"fsync {copy.parent}" in disk.calls[disk.calls.index(f"rename {copy}") :]
    with watch() as disk:
        open_flat(open_store(copy).layer(), storage, shown=False)
        assert disk.early == []
        assert [line for line in disk.lost(tmp_path / "cache" / "words") if ".lock" not in line] == []
    shutil.rmtree(tmp_path / "cache")
