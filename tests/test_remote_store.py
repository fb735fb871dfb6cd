"""Copies of remote word stores: the same files, whole before they are used, renewed when the store changes."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from servers import Fault, FolderServer, serve
from shard_sets import ShardMaker, write_store

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, CorruptError, MismatchError, MissingError, UsageError
from bowstore.remote import fetch_store, transfer, tries
from bowstore.remote import store as remote_store
from bowstore.words.store import layer as store_layer
from bowstore.words.store.layer import LayerSpec
from bowstore.words.store.store import open_store
from bowstore.words.store.verify import verify
from bowstore.words.store.writer import StoreWriter


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(store_layer, "MIN_CHUNK_BYTES", 1)  # many chunks in small stores
    monkeypatch.setattr(store_layer, "CHUNK_STEP_ROWS", 16)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(make_shard_set: ShardMaker, tmp_path: Path) -> Iterator[FolderServer]:
    """A server that has the word store `words.zarr`."""
    write_store(tmp_path / "there" / "words.zarr", make_shard_set(60))
    with serve(tmp_path / "there") as server:
        yield server


FORMAT = {"format": "bowstore words", "format_version": 3}
DATASET = {"dataset": {"fingerprint": "f" * 32, "images": 1}}


def storage(tmp_path: Path, **values: object) -> StorageConfig:
    return StorageConfig(cache=tmp_path / "cache", timeout_s=0.5, **{"retries": 2, **values})


def fetch(server: FolderServer, tmp_path: Path, **values: object) -> Path:
    return fetch_store(Path(f"{server.url}/words.zarr"), storage(tmp_path, **values))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def add_unfinished_layer(store: Path) -> None:
    spec = LayerSpec(teacher={}, view={}, vocabulary={}, num_words=5, grid=(4, 4), channels=3)
    writer = StoreWriter(store)
    writer.add_layer("block2", spec, np.zeros((5, 3), np.float32))
    writer.write_chunk("block2", 1, np.ones((16, 4, 4), np.uint16))


def test_remote_store_has_the_same_files(server: FolderServer, tmp_path: Path) -> None:
    there = server.root / "words.zarr"
    copy = fetch(server, tmp_path)
    assert len(list((there / "block3" / "words").rglob("*"))) > 4
    assert files(copy) == files(there)  # so all names were worked out from the metadata, and no others
    assert {path.name for path in copy.parent.iterdir()} == {copy.name, f".{copy.name}.json", f".{copy.name}.lock"}
    assert copy.stat().st_mode == copy.parent.stat().st_mode  # whoever may read the cache may read the copy
    assert verify(copy).sound
    assert np.array_equal(open_store(copy).load_words(), open_store(there).load_words())
    requests = len(server.gets)
    assert fetch(server, tmp_path) == copy
    assert {name.rpartition("/")[2] for name, _ in server.gets[requests:]} == {"zarr.json"}


def test_remote_store_of_another_version_is_refused(server: FolderServer, tmp_path: Path) -> None:
    group = server.root / "words.zarr" / "zarr.json"
    value = json.loads(group.read_text())
    value["attributes"] |= {"format_version": 2}
    group.write_text(json.dumps(value))
    with pytest.raises(MismatchError, match=r"^word store http.* has format version 2 .*, this one reads 3; make"):
        fetch(server, tmp_path)


def test_remote_local_store_stays_where_it_is(tmp_path: Path) -> None:
    assert fetch_store(tmp_path / "words.zarr") == tmp_path / "words.zarr"


def test_remote_store_brings_only_layers_that_are_whole(server: FolderServer, tmp_path: Path) -> None:
    add_unfinished_layer(server.root / "words.zarr")
    store = open_store(fetch(server, tmp_path))
    assert store.layers == ("block3",)
    with pytest.raises(MismatchError, match=r"layer 'block2' .* is not complete"):
        store.layer("block2")


def test_remote_store_that_changed_is_fetched_anew(server: FolderServer, tmp_path: Path) -> None:
    there = server.root / "words.zarr"
    old = fetch(server, tmp_path)
    shutil.rmtree(there)
    index_like = open_store(old)

    class Rows:
        fingerprint, key_hash, label = "f" * 32, index_like.read_array("key_hash")[:50], np.zeros(50, np.int32)
        digest = key_hash

        def __len__(self) -> int:
            return 50

    write_store(there, Rows(), seed=5)  # type: ignore[arg-type]
    new = fetch(server, tmp_path)
    assert new != old
    assert files(new) == files(there)
    assert len(open_store(old)) == 60  # whoever reads the old copy goes on


def test_remote_store_survives_faults_and_is_whole_or_absent(
    server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PARALLEL", 1)
    name = "words.zarr/block3/words/c/2/0/0"
    server.always[name] = Fault(status=404)
    with pytest.raises(MissingError, match=r"c/2/0/0 is not there"):
        fetch(server, tmp_path)
    assert not list((tmp_path / "cache").glob("remote/*/*.zarr"))
    del server.always[name]
    server.faults[name] = [Fault(drop_at=20), Fault(status=503)]
    server.faults["words.zarr/zarr.json"] = [Fault(drop_at=3)]
    assert files(fetch(server, tmp_path)) == files(server.root / "words.zarr")
    assert server.count("words.zarr/block3/words/c/1/0/0") == 1  # what was there is kept


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda root: (root / "zarr.json").unlink(), MissingError, r"^http.*words\.zarr/zarr\.json is not there"),
        (
            lambda root: (root / "zarr.json").write_text("{"),
            CorruptError,
            r"^word store http.*words\.zarr cannot be read",
        ),
        (
            lambda root: (root / "zarr.json").write_text("[]"),
            CorruptError,
            r"^word store http.*words\.zarr cannot be read",
        ),
        (lambda root: edit(root / "zarr.json", "attributes", {}), MismatchError, r"^http.* not a bowstore word store"),
        (
            lambda root: edit(root / "zarr.json", "attributes", {**FORMAT, **DATASET, "layers": ["../../evil"]}),
            CorruptError,
            r"layers \['\.\./\.\./evil'\]",
        ),
        (lambda root: edit(root / "zarr.json", "attributes", FORMAT), CorruptError, "cannot be read .'layers'"),
        (
            lambda root: edit(root / "block3/words/zarr.json", "shape", [10**15, 4, 4]),
            CorruptError,
            r"^layer 'block3' of word store http.* has shape \(1000000000000000, 4, 4\), not \(60, 4, 4\)",
        ),
        (lambda root: edit(root / "key_hash/zarr.json", "shape", "x"), CorruptError, "cannot be read .*Got x"),
        (lambda root: edit(root / "key_hash/zarr.json", "chunk_grid", {"name": "odd"}), CorruptError, "'odd'"),
    ],
)
def test_remote_store_with_damaged_metadata(
    server: FolderServer, tmp_path: Path, change: object, error: type[BowstoreError], message: str
) -> None:
    change(server.root / "words.zarr")  # type: ignore[operator]
    with pytest.raises(error, match=message) as caught:
        fetch(server, tmp_path)
    assert "\n" not in str(caught.value)


def edit(path: Path, name: str, value: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))


def test_remote_store_keeps_to_the_bound(server: FolderServer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^word store http.* has 0\.\d\d MB, and the cache"):
        fetch(server, tmp_path, cache_gb=1e-6)
    size_bytes = sum(map(len, files(server.root / "words.zarr").values()))
    copy = fetch(server, tmp_path, cache_gb=1.5 * size_bytes / 1e9)
    os.utime(server.root / "words.zarr" / "zarr.json")
    shutil.copytree(server.root / "words.zarr", server.root / "other.zarr")
    other = Path(f"{server.url}/other.zarr")
    with pytest.raises(BowstoreError, match="in use; wait"):  # this process may still read the first
        fetch_store(other, storage(tmp_path, cache_gb=1.5 * size_bytes / 1e9))
    os.close(remote_store._HELD.pop(copy))
    fetch_store(other, storage(tmp_path, cache_gb=1.5 * size_bytes / 1e9))
    assert not copy.exists()
    assert not list(copy.parent.glob(".*.tmp-*"))
