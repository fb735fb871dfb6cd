"""What the data plane costs at 1.28, 14, 100 and 400 million rows, measured on this machine.

For each number of rows an index is written (made-up columns, sparse tars of the recorded sizes), and what grows with
the rows is timed, each number in a process of its own. What does not fit into memory or onto the disk is extrapolated
and marked.

    python tools/simulate_scale.py [--rows 1281167,14000000] [--folder /fast/disk] [--json]

Legend: N rows, B samples of a batch.
"""

import io
import json
import math
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowstore.config import ViewConfig
from bowstore.data import plan
from bowstore.data.index import Index, build_index, open_index
from bowstore.data.plan import Schedule, epoch_order
from bowstore.data.table import COLUMNS, INDEX_FILE, read_header, write_table
from bowstore.environment import available_memory, cores, library_versions
from bowstore.progress import say
from bowstore.words.store.join import join_rows

BATCH = 256
BATCHES = 20
PER_SHARD = 4096
KEY_BYTES = 25  # n01440764/n01440764_10026
BUILD_ROWS = 60_000
BLOCK = 1 << 22  # elements written at once
INDEX_BYTES_A_ROW, JOIN_BYTES_A_ROW = 80, 85  # to judge beforehand what fits; the true figures are measured
MEMORY_SHARE, DISK_SHARE = 0.6, 0.4  # of what is free
READER_COLUMNS = ("shard", "offset", "size", "key_start")
# What is printed: title with its unit, and digits.
FIGURES = {
    "order_s": ("epoch order, CPU s", 3),
    "order_peak_bytes": ("epoch order, peak bytes", 0),
    "index_bytes": ("index file, bytes", 0),
    "open_cold_s": ("open the index from the disk, s", 3),
    "open_s": ("open it from the page cache, s", 3),
    "open_private_bytes": ("open: private bytes a rank", 0),
    "plan_first_ms": ("plan of a batch, the first after a cold start, ms", 2),
    "plan_cold_ms": ("the 19 after it, median, ms", 2),
    "plan_ms": ("the same again, columns in memory, ms", 2),
    "reader_first_ms": ("the reader's columns of a batch, the first, ms", 2),
    "reader_cold_ms": ("the 19 after it, median, ms", 2),
    "reader_ms": ("the same again, columns in memory, ms", 2),
    "join_s": ("join of a store in another order, CPU s", 2),
    "join_peak_bytes": ("join, peak bytes with its inputs", 0),
}


@dataclass(frozen=True)
class Keyed:
    """Keys and images as `join_rows` needs them of a store.

    Attributes:
        fingerprint: identity of the order.
        hashes_N: uint64 (N,).
    """

    fingerprint: str
    hashes_N: NDArray[np.uint64]

    def key_hash(self) -> NDArray[np.uint64]:
        """Hashes of a store's keys."""
        return self.hashes_N

    def image_digest(self) -> NDArray[np.uint64]:
        """Digests of a store's images: those of the keys serve as well."""
        return self.hashes_N


@click.command()
@click.option("--rows", default="1281167,14000000,100000000,400000000", show_default=True, help="Numbers of rows.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where indexes are written; default: temporary files.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
def main(rows: str, folder: Path | None, as_json: bool) -> None:
    """Measure what grows with the number of rows."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bowstore-scale-", dir=folder) as name:
        build = isolated(measure_build, Path(name))
        for number in sorted(int(number) for number in rows.split(",")):
            say(f"{number:,} rows")
            results.append(isolated(measure, number, Path(name)))
    extrapolate(results)
    report = {"cores": cores(), "versions": library_versions(), "batch": BATCH, "rows": results, "build_index": build}
    click.echo(json.dumps(report, indent=2) if as_json else table(results, build))


def isolated(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run in a process of its own, whose memory starts from nothing."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(rows: int, folder: Path) -> dict[str, Any]:
    """All figures of one number of rows that fit into memory and onto the disk."""
    result: dict[str, Any] = {"rows": rows, "shards": math.ceil(rows / PER_SHARD)}
    if 4 * rows < MEMORY_SHARE * available_memory():
        result |= measure_order(rows)
    if INDEX_BYTES_A_ROW * rows < DISK_SHARE * shutil.disk_usage(folder).free:
        root = folder / str(rows)
        write_index(root, rows)
        result |= measure_open(root) | measure_plans(root)
        shutil.rmtree(root)
    if JOIN_BYTES_A_ROW * rows < MEMORY_SHARE * available_memory():
        result |= measure_join(rows)
    return result


def measure_order(rows: int) -> dict[str, float]:
    """Time (best of five, or one long one) and peak memory of an epoch's order."""
    seconds, peak_bytes = timed(lambda: epoch_order(rows, 0, 0), time.process_time)
    if seconds < 2:
        seconds = min(timed(lambda: epoch_order(rows, 0, 1), time.process_time)[0] for _ in range(5))
    return {"order_s": seconds, "order_peak_bytes": peak_bytes}


def measure_open(root: Path) -> dict[str, float]:
    """Time and private memory of opening an index."""
    before_bytes = memory("RssAnon")
    drop_pages(root / INDEX_FILE)
    cold_s, _ = timed(lambda: open_index(root))
    index = open_index(root)
    private_bytes = memory("RssAnon") - before_bytes
    warm_s = min(timed(lambda: open_index(root))[0] for _ in range(5))
    size_bytes = (index.root / INDEX_FILE).stat().st_size
    return {"index_bytes": size_bytes, "open_cold_s": cold_s, "open_s": warm_s, "open_private_bytes": private_bytes}


def measure_plans(root: Path) -> dict[str, float]:
    """Time of a batch's plan, and of the look-up of its reader's columns, with pages on the disk and in memory."""
    drop_pages(root / INDEX_FILE)
    index = open_index(root)
    order_N = epoch_order(len(index), 0, 0)
    times: list[tuple[float, float]] = []
    with patch.object(plan, "epoch_order", lambda images, seed, epoch: order_N):  # its time is told apart
        for _ in range(2):  # the second time, the same rows are in memory
            steps = plan.plans(Schedule(len(index), BATCH, 0), index, ViewConfig(), start=0, stop=BATCHES)
            for _ in range(BATCHES):
                begun = time.perf_counter()
                rows_B = next(steps).rows
                planned = time.perf_counter()
                look_up(index, rows_B)
                times.append((1e3 * (planned - begun), 1e3 * (time.perf_counter() - planned)))
    plan_ms, reader_ms = zip(*times, strict=True)
    return {
        "plan_first_ms": plan_ms[0],
        "plan_cold_ms": median(plan_ms[1:BATCHES]),
        "plan_ms": median(plan_ms[BATCHES:]),
        "reader_first_ms": reader_ms[0],
        "reader_cold_ms": median(reader_ms[1:BATCHES]),
        "reader_ms": median(reader_ms[BATCHES:]),
    }


def look_up(index: Index, rows_B: NDArray[np.int64]) -> None:
    """Touch what a reader needs of each row: its place and its key."""
    for name in READER_COLUMNS:
        getattr(index, name)[rows_B]
    index.key_bytes[index.key_start[rows_B]]


def measure_join(rows: int) -> dict[str, float]:
    """Time and peak memory of joining a store of the same keys in another order."""
    random = np.random.default_rng(0)
    hashes_N = random.integers(0, 2**64, rows, dtype=np.uint64)
    store: Any = Keyed("store", random.permutation(hashes_N))
    index: Any = type("Wanted", (), {"fingerprint": "index", "key_hash": hashes_N, "digest": hashes_N})
    seconds, peak_bytes = timed(lambda: join_rows(store, index), time.process_time)
    return {"join_s": seconds, "join_peak_bytes": peak_bytes + 2 * hashes_N.nbytes}


def measure_build(folder: Path) -> dict[str, float]:
    """Time and peak memory of building an index, a row: headers of tiny images."""
    write_tars(folder / "warm", 1)
    build_index(folder / "warm", workers=1)  # what is imported and set up once is not a row's
    write_tars(folder / "build", BUILD_ROWS)
    seconds, peak_bytes = timed(lambda: build_index(folder / "build", workers=1))
    return {"rows": BUILD_ROWS, "us_a_row": 1e6 * seconds / BUILD_ROWS, "peak_bytes_a_row": peak_bytes / BUILD_ROWS}


def write_tars(root: Path, rows: int) -> None:
    """Tars of one-pixel images."""
    root.mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    for shard, start in enumerate(range(0, rows, PER_SHARD)):
        with tarfile.open(root / shard_name(shard), "w", format=tarfile.USTAR_FORMAT) as archive:
            for row in range(start, min(start + PER_SHARD, rows)):
                info = tarfile.TarInfo(f"n{row % 1000:08d}/n{row % 1000:08d}_{row:06d}.png")
                info.size = buffer.tell()
                archive.addfile(info, io.BytesIO(buffer.getvalue()))


def shard_name(shard: int) -> str:
    """File name of a tar."""
    return f"train-{shard:06d}.tar"


def write_index(root: Path, rows: int) -> None:
    """Write an index of so many rows, and sparse tars of the size that it records."""
    write_tars(root, 1)
    build_index(root, workers=1)
    meta = read_header(root / INDEX_FILE).meta
    (entry,) = meta["shards"]
    meta["shards"] = [[shard_name(shard), PER_SHARD, *entry[2:]] for shard in range(math.ceil(rows / PER_SHARD))]
    for name, *_ in meta["shards"][1:]:
        with open(root / name, "wb") as file:
            file.truncate(entry[2])
    lengths = {**dict.fromkeys(COLUMNS, rows), "key_start": rows + 1, "key_bytes": rows * KEY_BYTES}
    write_table(root / INDEX_FILE, meta, lengths, lambda name: made_up(name, lengths[name]))


def made_up(name: str, count: int) -> Iterator[NDArray[Any]]:
    """Values of a column, in blocks: sides of 200 to 800 pixels, starts of keys, else small numbers."""
    random = np.random.default_rng(0)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        if name == "key_start":
            yield KEY_BYTES * np.arange(start, start + size)
        else:
            low, high = (200, 800) if name in ("height", "width") else (0, 100)
            yield random.integers(low, high, size, COLUMNS[name])


def drop_pages(path: Path) -> None:
    """Take a file's pages out of the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> tuple[float, int]:
    """Seconds of a call, and the bytes by which it raised this process's peak of resident memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from now
    before_bytes = memory("VmRSS")
    begun = clock()
    call()
    return clock() - begun, memory("VmHWM") - before_bytes


def memory(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def extrapolate(results: list[dict[str, Any]]) -> None:
    """Fill in what did not fit, by the power of the rows that the two largest measured numbers show."""
    for result in results:
        result["extrapolated"] = [name for name in FIGURES if name not in result]
    for name in FIGURES:
        known = [result for result in results if name not in result["extrapolated"]]
        if len(known) < 2:
            continue
        one, two = known[-2:]
        power = math.log(two[name] / one[name]) / math.log(two["rows"] / one["rows"])
        for result in results:
            if name in result["extrapolated"]:
                result[name] = two[name] * (result["rows"] / two["rows"]) ** power


def table(results: list[dict[str, Any]], build: dict[str, Any]) -> str:
    """A Markdown table, a row a figure; extrapolated ones in parentheses."""
    lines = ["| what | " + " | ".join(f"{result['rows']:,}" for result in results) + " |"]
    lines += ["|---|" + "---:|" * len(results)]
    for name, (title, digits) in FIGURES.items():
        cells = [f"{result[name]:,.{digits}f}" if name in result else "" for result in results]
        cells = [f"({c})" if name in r["extrapolated"] else c for c, r in zip(cells, results, strict=True)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", f"`bowstore index`: {build['us_a_row']:.0f} µs and {build['peak_bytes_a_row']:.0f} bytes a row"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
