"""What the reader can do: encoded bytes of random rows, from memory maps and by single reads."""

import time
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from bowstore.benchmarks.config import ReaderBench
from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.benchmarks.rounds import in_rounds
from bowstore.config import SomePaths, StorageConfig
from bowstore.data.index import open_index
from bowstore.data.reader import ShardReader
from bowstore.data.table import image_digest
from bowstore.environment import cores, device_name
from bowstore.errors import UsageError


def bench_reader(shards: SomePaths, config: ReaderBench, storage: StorageConfig | None = None) -> BenchResult:
    """Images/s of reading random rows, with header and image checked and every page touched, for each way to read.

    Comparing an image with its digest is timed separately, on the bytes just read.
    """
    batch, batches = config.batch, config.batches
    given = storage or StorageConfig()
    readers = {}
    for way in ("mmap", "pread"):
        index = open_index(shards, given.model_copy(update={"read": way}))
        readers[way] = ShardReader(index)
    if len(index) < batch:
        raise UsageError(f"{shards} holds {len(index)} images, fewer than one batch of {batch}; lower --batch")
    rows = np.random.default_rng(0)

    def rate_and_share(reader: ShardReader) -> tuple[float, float]:
        """Images/s, and what digests are of that time."""
        orders = [rows.choice(len(index), batch, replace=False) for _ in range(batches)]
        read_s, check_s = zip(*(_time(reader, order) for order in orders), strict=True)
        return batches * batch / sum(read_s), sum(check_s) / sum(read_s)

    ways = {way: partial(rate_and_share, reader) for way, reader in readers.items()}
    found = in_rounds("bench reader", ways, config.rounds, lambda one: f"{one[0]:.0f} images/s")
    rates = {way: [rate for rate, _ in values] for way, values in found.items()}
    shares = {way: [share for _, share in values] for way, values in found.items()}
    size = float(index.size.mean())
    return BenchResult(
        protocol="bench/reader",
        device=f"{device_name(torch.device('cpu'))}, {cores()} cores",
        inputs={"shards": index.fingerprint},
        settings={
            "batch": batch,
            "read_threads": given.read_threads,
            "images": len(index),
            "mean_image_bytes": size,
        },
        unit="images",
        timings=[
            Timing(
                way, values, f"{np.median(values) * size / 1e6:.0f} MB/s, {100 * np.median(shares[way]):.1f} % digests"
            )
            for way, values in rates.items()
        ],
        figures={f"digest_share_{way}": float(np.median(values)) for way, values in shares.items()},
        notes=["from the page cache after the first round, if the shards fit in memory"],
    )


def _time(reader: ShardReader, rows_B: NDArray[np.int64]) -> tuple[float, float]:
    """Seconds of reading rows with every check, and of computing the digests of their images once more."""
    begun = time.perf_counter()
    images = reader.read(rows_B)
    read = time.perf_counter()
    for image in images:
        image_digest(image.data)
    return read - begun, time.perf_counter() - read
