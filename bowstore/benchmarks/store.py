"""What a word store can do: bulk load with every check, and the join with an index."""

import time
from pathlib import Path

import numpy as np

from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.config import StorageConfig
from bowstore.data.index import open_index
from bowstore.environment import cores
from bowstore.progress import Progress
from bowstore.remote import fetch_store
from bowstore.words.arrays import stored_bytes
from bowstore.words.store import join_rows, open_store


def bench_store(
    store: Path, shards: Path | None, *, rounds: int, layer: str | None = None, storage: StorageConfig | None = None
) -> BenchResult:
    """Images/s of loading all words of a layer, digests checked, and of joining their keys with an index.

    Args:
        store: word store.
        shards: folder of indexed shards to join with; None leaves the join out.
        rounds: how often each is timed.
        layer: which layer; None for the only one.
        storage: settings of the reads.
    """
    opened = open_store(fetch_store(store, storage))
    what = opened.layer(layer)
    index = open_index(shards, storage) if shards else None
    words_bytes = 2 * len(opened) * what.grid[0] * what.grid[1]
    parts = ("key_hash", "image_digest", f"{what.name}/words", f"{what.name}/chunk_digest")
    disk_bytes = sum(stored_bytes(opened.path / part) for part in parts)
    load: list[float] = []
    join: list[float] = []
    with Progress("bench store", rounds + 1, "rounds") as progress:
        for number in range(rounds + 1):
            begun = time.perf_counter()
            what.read_words()
            loaded = time.perf_counter()
            if index is not None:
                join_rows(opened, index)
            joined = time.perf_counter()
            if number:
                load.append(len(opened) / (loaded - begun))
                join.append(len(opened) / max(joined - loaded, 1e-9))
            progress.advance()
    seconds = len(opened) / float(np.median(load))
    timings = [Timing("bulk load", load, f"{seconds:.3g} s, {words_bytes / seconds / 1e6:.0f} MB/s of words")]
    if index is not None:
        timings.append(Timing("join by key", join, f"{len(opened) / float(np.median(join)):.3g} s"))
    return BenchResult(
        protocol="bench/store",
        device=f"cpu, {cores()} cores",
        inputs={"dataset": opened.fingerprint, **({"shards": index.fingerprint} if index else {})},
        settings={"images": len(opened), "layer": what.name, "grid": list(what.grid), "words": what.num_words},
        unit="images",
        timings=timings,
        figures={"seconds_to_load": seconds, "bytes_per_image": disk_bytes / len(opened)},
        notes=["from the page cache after the first round"],
    )
