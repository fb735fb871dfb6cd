import mmap
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
from numpy.typing import NDArray
from shard_sets import write_words

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, CorruptError
from bowstore.words.store.layer import Layer
from bowstore.words.store.store import open_store
from bowstore.words.targets.flat import FlatWords, open_flat

ROWS, GRID, WORDS = 110, (3, 2), 12


def some_maps(seed: int = 0) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(0, WORDS, (ROWS, *GRID)).astype(np.uint16)


def layer_of(path: Path) -> Layer:
    return open_store(path).layer()


@pytest.fixture
def store(tmp_path: Path, small_chunks: int) -> Path:
    """A store of 110 rows in six chunks."""
    return write_words(tmp_path / "words.zarr", some_maps())


@pytest.fixture
def storage(tmp_path: Path) -> StorageConfig:
    return StorageConfig(cache=tmp_path / "cache")


def files(storage: StorageConfig) -> list[Path]:
    """Everything in the cache but locks and records."""
    assert storage.cache is not None
    return sorted(path for path in (storage.cache / "words").glob("*") if path.suffix not in (".lock", ".json"))


def maps_of(opened: FlatWords) -> NDArray[np.uint16]:
    return opened.words_NM.reshape(-1, *GRID)


def test_the_second_time_nothing_is_unpacked(
    store: Path, storage: StorageConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    open_flat(layer_of(store), storage)
    assert "unpack words: 6/6 chunks" in capfd.readouterr().err
    monkeypatch.setattr(Layer, "read_chunk", None)
    moved = Path(shutil.move(store, store.with_name("elsewhere.zarr")))
    opened = open_flat(layer_of(moved), storage)
    assert opened.path.stat().st_size == 2 * ROWS * 6
    assert capfd.readouterr().err == ""


def test_the_cache_is_where_the_environment_says(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOWSTORE_CACHE", str(tmp_path / "there"))
    assert open_flat(layer_of(store), StorageConfig()).path.parent == tmp_path / "there" / "words"
    monkeypatch.delenv("BOWSTORE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_flat(layer_of(store), StorageConfig()).path.parent == tmp_path / "home/.cache/bowstore/words"


def test_processes_unpack_once(
    store: Path, storage: StorageConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The lock holds between open files, so that threads stand for processes."""
    read_chunk, chunks, opened = Layer.read_chunk, [], []

    def slow(self: Layer, chunk: int, digest: int) -> NDArray[np.uint16]:
        chunks.append(chunk)
        time.sleep(0.02)
        return read_chunk(self, chunk, digest)

    monkeypatch.setattr(Layer, "read_chunk", slow)
    threads = [
        threading.Thread(target=lambda: opened.append(open_flat(layer_of(store), storage, shown=True)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chunks == list(range(6))
    assert all(np.array_equal(maps_of(each)[[77]], some_maps()[[77]]) for each in opened)
    assert len(opened) == 4
    assert capfd.readouterr().err.count("waiting: file ") == 3


def test_a_damaged_chunk_of_the_store_leaves_no_file(store: Path, storage: StorageConfig) -> None:
    chunk = store / "block3/words/c/3/0/0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(
        CorruptError, match=r"chunk block3/words/c/3/0/0 \(rows 60-79\) of word store .* cannot be read"
    ):
        open_flat(layer_of(store), storage)
    assert files(storage) == []


def test_a_killed_unpacking_is_begun_again(store: Path, storage: StorageConfig) -> None:
    code = """
import sys, time
from pathlib import Path
from bowstore.config import StorageConfig
from bowstore.words.targets.flat import open_flat
from bowstore.words.store.layer import Layer
from bowstore.words.store.store import open_store
read_chunk = Layer.read_chunk
def slow(self, chunk, digest):
    if chunk == 4:
        print("here", flush=True)
        time.sleep(60)
    return read_chunk(self, chunk, digest)
Layer.read_chunk = slow
open_flat(open_store(Path(sys.argv[1])).layer(), StorageConfig(cache=Path(sys.argv[2])))
"""
    command = [sys.executable, "-c", code, str(store), str(storage.cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGKILL)
    (left,) = files(storage) or [None]
    assert left is None or ".tmp-" in left.name
    opened = open_flat(layer_of(store), storage)
    assert np.array_equal(maps_of(opened), some_maps())
    assert files(storage) == [opened.path]


def test_rows_are_announced_by_the_pages_they_lie_in(store: Path, storage: StorageConfig) -> None:
    opened = open_flat(layer_of(store), storage)
    opened._map = Mock()
    opened.announce(np.array([109, 0, 3, 4, 5]))
    assert opened._map.madvise.call_args_list == [
        call(mmap.MADV_WILLNEED, 0, 1320), call(mmap.MADV_WILLNEED, 0, 12), call(mmap.MADV_WILLNEED, 0, 72)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("cut", r"has 1001 bytes, not 1320: unpacking the words again"),
        ("bit", r"holds other words than the store in rows 60-79: unpacking the words again"),
        ("other", r"holds other words than the store in rows 0-19: unpacking the words again"),
    ],
)
def test_a_file_that_is_not_whole_or_of_other_words_is_made_again(
    store: Path, storage: StorageConfig, capfd: pytest.CaptureFixture[str], tmp_path: Path, damage: str, said: str
) -> None:
    path = open_flat(layer_of(store), storage).path
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1001])
    elif damage == "bit":
        data = bytearray(path.read_bytes())
        data[65 * 12] ^= 1
        path.write_bytes(data)
    else:
        other = layer_of(write_words(tmp_path / "other.zarr", some_maps(1)))
        shutil.copy(open_flat(other, storage).path, path)
    capfd.readouterr()
    opened = open_flat(layer_of(store), storage)
    assert said in capfd.readouterr().err
    assert np.array_equal(maps_of(opened), some_maps())


def test_stores_that_differ_by_one_word_have_files_of_their_own(
    store: Path, storage: StorageConfig, tmp_path: Path
) -> None:
    maps = some_maps()
    maps[50, 1, 1] = (maps[50, 1, 1] + 1) % WORDS
    other = open_flat(layer_of(write_words(tmp_path / "other.zarr", maps)), storage)
    own = open_flat(layer_of(store), storage)
    assert np.array_equal(maps_of(other)[[50]], maps[[50]])
    assert np.array_equal(maps_of(own)[[50]], some_maps()[[50]])
    assert len(files(storage)) == 2


def test_a_disk_without_room_is_told_before_anything_is_written(
    store: Path, storage: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(store)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * ROWS * 6 - 1))
        patch.setattr(Layer, "read_chunk", None)
        with pytest.raises(
            BowstoreError,
            match=r"file of unpacked words .* needs 0\.00 MB, and the disk .* has 0\.00 MB free; free some",
        ):
            open_flat(layer_of(store), storage)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        tight = storage.model_copy(update={"cache_gb": 1e-6})
        with pytest.raises(BowstoreError, match=r"the file of unpacked words of .* may hold 1e-06 GB; raise"):
            open_flat(layer_of(store), tight)
    assert files(storage) == []
