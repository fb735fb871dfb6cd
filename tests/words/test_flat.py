import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from shard_sets import write_words

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, CorruptError
from bowstore.words.store.layer import Layer
from bowstore.words.store.store import open_store
from bowstore.words.targets import flat
from bowstore.words.targets.flat import FlatWords, flat_bytes, open_flat

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


def read(opened: FlatWords, rows: list[int]) -> NDArray[np.uint16]:
    out = np.zeros((len(rows), opened.slots), np.uint16)
    opened.read(np.array(rows, np.int64), out)
    return out.reshape(-1, *GRID)


@pytest.mark.parametrize(
    "rows", [[7], [0, ROWS - 1], [5, 4, 3, 2], [9, 9, 9], [40, 41, 42, 3, 43, 3, 4], list(range(ROWS)), []]
)
def test_rows_come_back_in_the_order_asked(store: Path, storage: StorageConfig, rows: list[int]) -> None:
    assert np.array_equal(read(open_flat(layer_of(store), storage), rows), some_maps()[np.array(rows, np.int64)])


def test_adjacent_rows_are_one_call_and_all_are_announced(
    store: Path, storage: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_flat(layer_of(store), storage)
    calls: list[str] = []
    preadv, fadvise = os.preadv, os.posix_fadvise

    def counting(file: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(f"read {len(buffers)}")
        return preadv(file, buffers, offset)

    def noting(file: int, offset: int, size: int, advice: int) -> None:
        calls.append(f"announce {size // (2 * opened.slots)}")
        fadvise(file, offset, size, advice)

    monkeypatch.setattr(os, "preadv", counting)
    monkeypatch.setattr(os, "posix_fadvise", noting)
    monkeypatch.setattr(flat, "_MAX_BUFFERS", 3)
    read(opened, [50, 12, 10, 11, 13, 51, 90])
    assert calls == ["announce 4", "announce 2", "announce 1", "read 3", "read 1", "read 2", "read 1"]


def test_a_file_system_that_gives_less_than_asked(
    store: Path, storage: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_flat(layer_of(store), storage)
    preadv = os.preadv

    def short(file: int, buffers: list[Any], offset: int) -> int:
        return preadv(file, [memoryview(buffers[0])[:5]], offset)

    monkeypatch.setattr(os, "preadv", short)
    assert np.array_equal(read(opened, [3, 4, 80]), some_maps()[[3, 4, 80]])
    assert np.array_equal(opened.chunk(5).reshape(-1, *GRID), some_maps()[100:])


def test_the_second_time_nothing_is_unpacked(
    store: Path, storage: StorageConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    open_flat(layer_of(store), storage)
    assert "unpack words: 6/6 chunks" in capfd.readouterr().err
    monkeypatch.setattr(Layer, "read_chunk", None)
    moved = Path(shutil.move(store, store.with_name("elsewhere.zarr")))
    opened = open_flat(layer_of(moved), storage)
    assert opened.path.stat().st_size == flat_bytes(layer_of(moved)) == 4096 + 2 * ROWS * 6
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
    assert all(np.array_equal(read(each, [77]), some_maps()[[77]]) for each in opened)
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
    assert np.array_equal(read(opened, list(range(ROWS))), some_maps())
    assert files(storage) == [opened.path]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("cut", r"has 4997 bytes, not 5416: unpacking the words again"),
        ("header", r"holds other words: unpacking the words again"),
        ("other", r"holds other words: unpacking the words again"),
    ],
)
def test_a_file_that_is_not_whole_or_of_other_words_is_made_again(
    store: Path, storage: StorageConfig, capfd: pytest.CaptureFixture[str], tmp_path: Path, damage: str, said: str
) -> None:
    path = open_flat(layer_of(store), storage).path
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:4997])
    elif damage == "header":
        path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 0'))
    else:
        other = layer_of(write_words(tmp_path / "other.zarr", some_maps(1)))
        shutil.copy(open_flat(other, storage).path, path)
    capfd.readouterr()
    opened = open_flat(layer_of(store), storage)
    assert said in capfd.readouterr().err
    assert np.array_equal(read(opened, list(range(ROWS))), some_maps())


def test_stores_that_differ_by_one_word_have_files_of_their_own(
    store: Path, storage: StorageConfig, tmp_path: Path
) -> None:
    maps = some_maps()
    maps[50, 1, 1] = (maps[50, 1, 1] + 1) % WORDS
    other = open_flat(layer_of(write_words(tmp_path / "other.zarr", maps)), storage)
    own = open_flat(layer_of(store), storage)
    assert np.array_equal(read(other, [50]), maps[[50]])
    assert np.array_equal(read(own, [50]), some_maps()[[50]])
    assert len(files(storage)) == 2


def test_a_flipped_bit_is_found_and_named(store: Path, storage: StorageConfig) -> None:
    opened = open_flat(layer_of(store), storage)
    with open(opened.path, "r+b") as file:
        file.seek(4096 + 65 * 12)
        file.write(b"\xff")
    assert np.array_equal(opened.chunk(2).reshape(-1, *GRID), some_maps()[40:60])
    with pytest.raises(CorruptError, match=r"rows 60-79 of .*\.u16 differ from word store .*words\.zarr; remove that"):
        opened.chunk(3)


def test_a_file_that_is_cut_while_in_use(store: Path, storage: StorageConfig) -> None:
    opened = open_flat(layer_of(store), storage)
    os.truncate(opened.path, 4096 + 100)
    with pytest.raises(CorruptError, match=r"ends at byte 4196, within its rows: it was cut while in use; run again"):
        read(opened, [8])


def test_a_disk_without_room_is_told_before_anything_is_written(
    store: Path, storage: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(store)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=flat_bytes(layer_of(store)) - 1))
        patch.setattr(Layer, "read_chunk", None)
        with pytest.raises(
            BowstoreError,
            match=r"file of unpacked words .* needs 0\.01 MB, and the disk .* has 0\.01 MB free; free some",
        ):
            open_flat(layer_of(store), storage)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        tight = storage.model_copy(update={"cache_gb": 5e-6})
        with pytest.raises(BowstoreError, match=r"the file of unpacked words of .* may hold 5e-06 GB; raise"):
            open_flat(layer_of(store), tight)
    assert files(storage) == []


def test_a_disk_that_fills_up_leaves_no_file(
    store: Path, storage: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = flat.atomic_file

    @contextmanager
    def full(path: Path) -> Iterator[IO[bytes]]:
        with original(path) as file:
            file.write(b"x")
            raise OSError(errno.ENOSPC, "No space left on device")
            yield file

    monkeypatch.setattr(flat, "atomic_file", full)
    with pytest.raises(BowstoreError, match=r"no space left on the disk of .*cache/words; free some, or name a folder"):
        open_flat(layer_of(store), storage)
    assert files(storage) == []
