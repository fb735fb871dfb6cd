import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xxhash
from numpy.typing import NDArray
from shard_sets import write_words

from bowstore.benchmarks.targets import time_batches
from bowstore.config import StorageConfig
from bowstore.errors import CorruptError, UsageError
from bowstore.torchrun import Ranks
from bowstore.words.store.layer import Layer
from bowstore.words.store.store import open_store
from bowstore.words.targets import tiers as targets
from bowstore.words.targets.bags import unpacked
from bowstore.words.targets.tiers import TIERS, Targets, Tier, choose_tier, describe

ROWS, GRID, WORDS = 110, (3, 4), 65535
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MAPS = np.random.default_rng(0).integers(0, WORDS, (ROWS, *GRID)).astype(np.uint16)
MAPS[::3] = np.random.default_rng(1).integers(0, 5, MAPS[::3].shape)  # words that stand more than once in a map
MAPS[7] = 65534
JOINS = {
    "identity": np.arange(ROWS),
    "permuted": np.random.default_rng(2).permutation(ROWS),
    "part": np.random.default_rng(3).permutation(ROWS)[:37],
    "first": np.arange(45),
}
Open = Callable[..., Targets]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bowstore.words.store.layer.MIN_CHUNK_BYTES", 1)
        patch.setattr("bowstore.words.store.layer.CHUNK_STEP_ROWS", 20)
        return write_words(tmp_path_factory.mktemp("store") / "words.zarr", MAPS, words=WORDS)


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    """A store of 110 rows in six chunks, to do with as one likes."""
    return Path(shutil.copytree(sound, tmp_path / "words.zarr"))


@pytest.fixture
def open_tier(store: Path, tmp_path: Path) -> Open:
    """Opens the store's words: open_tier(tier, join=...)."""

    def open_tier(tier: Tier, join: str = "identity") -> Targets:
        storage = StorageConfig(cache=tmp_path / "cache")
        return Targets(tier, open_store(store).layer(), JOINS[join], CPU, storage=storage)

    return open_tier


@pytest.mark.parametrize("join", JOINS)
def test_all_tiers_give_the_same_bits(open_tier: Open, join: str) -> None:
    rows_N = JOINS[join]
    tiers = [open_tier(tier, join) for tier in TIERS]
    assert [each.tier for each in tiers] == list(TIERS)
    draw = np.random.default_rng(5)
    for rows_B in (draw.integers(0, len(rows_N), 32), np.arange(10, 30), np.array([3, 3, 3]), np.array([0])):
        expected = MAPS[rows_N[rows_B]].reshape(len(rows_B), -1).astype(np.int64)
        for each in tiers:
            for packed_BM in (each.words(rows_B, each.ahead(rows_B)), each.words(rows_B)):
                assert np.array_equal(unpacked(packed_BM).numpy(), expected)


@pytest.mark.parametrize("join", JOINS)
def test_all_tiers_have_the_same_identity_and_hand_on_the_same_words(open_tier: Open, join: str) -> None:
    ordered = np.ascontiguousarray(MAPS[JOINS[join]])
    expected = xxhash.xxh3_128(ordered.data).hexdigest()  # what checkpoints of earlier versions hold
    for tier in TIERS:
        opened, blocks = open_tier(tier, join), list[NDArray[np.uint16]]()
        assert len(opened) == len(ordered)
        assert opened.digest(blocks.append, used=30) == expected
        assert opened.digest() == expected
        assert np.array_equal(np.concatenate(blocks), ordered[:30].reshape(30, -1))


def test_nothing_is_copied_for_a_join(open_tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed keeps a number a row; the others read only the chunks that are wanted, into their places."""
    streamed = open_tier("streamed", "permuted")
    assert streamed._store_row_N is not None
    assert streamed._store_row_N.dtype == np.uint8
    assert open_tier("streamed", "identity")._store_row_N is None
    read_chunk, chunks = Layer.read_chunk, []

    def noting(self: Layer, chunk: int, digest: int) -> NDArray[np.uint16]:
        chunks.append(chunk)
        return read_chunk(self, chunk, digest)

    monkeypatch.setattr(Layer, "read_chunk", noting)
    open_tier("host", "first")
    assert chunks == [0, 1, 2]


@pytest.mark.parametrize("tier", ["resident", "host"])
def test_a_damaged_chunk_is_named(open_tier: Open, store: Path, tier: Tier) -> None:
    chunk = store / "block3/words/c/3/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(CorruptError, match=r"chunk block3/words/c/3/0/0 \(rows 60-79\) of word store .*words\.zarr"):
        open_tier(tier)


def test_a_store_larger_than_memory_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data memory is bounded to 16 MB more than Python has: 47 MB of words pass through, but do not fit."""
    maps = np.random.default_rng(0).integers(0, 8, (120_000, 14, 14)).astype(np.uint16)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # for speed alone
    store = write_words(tmp_path / "words.zarr", maps, words=8)
    code = """
import resource, sys, threading
threading.stack_size(1 << 18)
from pathlib import Path
import numpy as np, torch
from bowstore.config import StorageConfig
from bowstore.words.store.store import open_store
from bowstore.words.targets.tiers import Targets
torch.set_num_threads(1)
storage, cpu = StorageConfig(cache=Path(sys.argv[2])), torch.device("cpu")
def layer(): return open_store(Path(sys.argv[1])).layer()
def run(tier, layer, rows):
    targets = Targets(tier, layer, rows, cpu, storage=storage)
    for seed in range(20):
        rows_B = np.random.default_rng(seed).integers(0, len(targets), 64)
        targets.words(rows_B, targets.ahead(rows_B))
    return targets.digest()
small = open_store(Path(sys.argv[3])).layer()
run("streamed", small, np.arange(small.images))  # threads and their stacks
data_kb = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, ((data_kb << 10) + (16 << 20),) * 2)
identity = np.arange(120_000)
print(run("streamed", layer(), identity))
print(run("streamed", layer(), identity[::-1].copy()))
try:
    run("host", layer(), identity)
except (MemoryError, RuntimeError) as error:
    print("host:", type(error).__name__)
"""
    small = write_words(tmp_path / "small.zarr", maps[:6000], words=8)
    command = [sys.executable, "-c", code, str(store), str(tmp_path / "cache"), str(small)]
    alone = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=alone)
    assert result.returncode == 0, result.stderr
    forward, backward, host = result.stdout.splitlines()
    assert forward == xxhash.xxh3_128(maps.data).hexdigest()
    assert backward == xxhash.xxh3_128(np.ascontiguousarray(maps[::-1]).data).hexdigest()
    assert host in ("host: RuntimeError", "host: MemoryError")


def test_the_host_gathers_a_batch_in_time() -> None:
    """The figure is 100 microseconds for 256 rows of 196 words on a quiet machine; words beyond any cache."""
    rows = 400_000
    words = np.arange(rows * 196, dtype=np.uint32).astype(np.uint16).reshape(rows, 14, 14)
    layer = SimpleNamespace(
        grid=(14, 14),
        images=rows,
        chunk_rows=rows,
        rows=lambda chunk: slice(0, rows),
        read_chunk=lambda chunk, digest: words,
        chunk_digests=lambda: np.ones(1, np.uint64),
    )
    opened = Targets("host", layer, np.arange(rows), CPU, storage=StorageConfig())  # type: ignore[arg-type]
    ahead_s, step_s = time_batches(opened, batch=256, batches=200, seed=0)
    assert len(ahead_s) == len(step_s) == 200
    assert np.median(ahead_s) < 400e-6


@pytest.mark.parametrize(
    ("setting", "size", "device", "tier", "reason"),
    [
        ("auto", 25, CPU, "resident", r"at most a quarter of this rank's 100\.00 GB of memory \(2 ranks share the"),
        ("auto", 26, CPU, "host", r"more than a quarter of this rank's 100\.00 GB of memory .*, at most half of"),
        ("auto", 51, CPU, "streamed", r"more than half of this rank's 100\.00 GB of memory \(2 ranks share the"),
        ("auto", 10, GPU, "resident", r"at most a quarter of the 40\.00 GB free on cuda:0\)$"),
        ("auto", 50, GPU, "host", r"more than a quarter of the 40\.00 GB free on cuda:0, at most half of this rank's"),
        ("auto", 51, GPU, "streamed", r"more than half of this rank's 100\.00 GB of memory \(2 ranks share the"),
        ("resident", 99, CPU, "resident", "as set"),
        ("host", 99, GPU, "host", "as set"),
        ("streamed", 999, GPU, "streamed", "as set"),
    ],
)
def test_the_tier_follows_from_sizes(
    monkeypatch: pytest.MonkeyPatch, setting: Tier, size: int, device: torch.device, tier: Tier, reason: str
) -> None:
    machine(monkeypatch)
    chosen, why = choose_tier(setting, size * 10**9, device)
    assert chosen == tier
    line = describe(chosen, why, size * 10**9)
    assert re.match(rf"targets: {tier}, {size}\.00 GB of words \({reason}", line), line


@pytest.mark.parametrize(
    ("setting", "size", "device", "message"),
    [
        (
            "resident",
            41,
            GPU,
            r"resident: the words take 41\.00 GB, more than the 40\.00 GB free on cuda:0; .* to host",
        ),
        ("resident", 101, CPU, r"resident: the words take 101\.00 GB, more than this rank's 100\.00 GB .* to streamed"),
        (
            "host",
            101,
            GPU,
            r"runtime\.targets host: the words take 101\.00 GB, more than this rank's 100\.00 GB of mem",
        ),
    ],
)
def test_a_tier_that_cannot_hold_the_words_is_refused(
    monkeypatch: pytest.MonkeyPatch, setting: Tier, size: int, device: torch.device, message: str
) -> None:
    machine(monkeypatch)
    with pytest.raises(UsageError, match=message):
        choose_tier(setting, size * 10**9, device)


def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 GB of memory, two ranks, a GPU with 40 GB free."""
    monkeypatch.setattr(targets, "ranks", lambda: Ranks(0, 2, 0, 2))
    monkeypatch.setattr(targets, "available_memory", lambda: 200 * 10**9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * 10**9, 80 * 10**9))
