"""What a word store can do: bulk load with every check, and the join with an index."""

import statistics
from functools import partial
from pathlib import Path

import torch

from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.benchmarks.rounds import Way, interleaved
from bowstore.config import SomePaths, StorageConfig
from bowstore.data.index import open_index
from bowstore.environment import cores
from bowstore.remote import fetch_store
from bowstore.words.store.arrays import stored_bytes
from bowstore.words.store.join import join_rows
from bowstore.words.store.store import open_store


def bench_store(
    store: Path,
    shards: SomePaths | None,
    *,
    rounds: int,
    layer: str | None = None,
    storage: StorageConfig | None = None,
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
    ways: dict[str, Way] = {"bulk load": what.read_words}
    if index is not None:
        ways["join by key"] = partial(join_rows, [opened], index)
    found = interleaved("bench store", ways, rounds, torch.device("cpu"))
    median = {name: statistics.median(values) for name, values in found.items()}
    seconds = median["bulk load"]
    details = {"bulk load": f", {words_bytes / seconds / 1e6:.0f} MB/s of words"}
    timings = [
        Timing(name, [len(opened) / spent for spent in values], f"{median[name]:.3g} s{details.get(name, '')}")
        for name, values in found.items()
    ]
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
