"""What 8 to 512 ranks of `bowstore encode` ask of rank 0: messages, bytes, and the share of the time that it writes.

A model of the pass over the images of bowstore/words/encode (crew, assign_pass): counts follow from the code, times of
single things are constants that were measured on one core, and that `--measure` measures here.

    python tools/simulate_scale.py [--images 1281167] [--rate 4600] [--measure] [--json]

Legend: K words, n images kept for each.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch.distributed

from bowstore.limits import KEPT_IMAGES
from bowstore.words.encode.config import BATCH
from bowstore.words.encode.crew import PIECE_BYTES
from bowstore.words.encode.forward import cut_units
from bowstore.words.store.layer import LayerSpec, chunk_rows
from bowstore.words.store.nearest import Cells, NearestImages, NearestSearch, save_nearest
from bowstore.words.store.writer import create_store

K = 20_000
GRID = (14, 14)
CELLS = GRID[0] * GRID[1]
IMAGES = (1_281_167, 14_000_000, 100_000_000)
RANKS = (8, 32, 128, 512)
RATE = 4600  # images/s a rank: on an H100 a bfloat16 ResNet-50 to conv4 was 0.34 of 13,600 (docs/results/gpu.md)
CELL_BYTES = 8 + 8 + 8 + 4  # of a cell that may be among the nearest: word, row, cell, distance
OLD_DISTANCES = 1.5  # so many times as many may be as with the newest distances: ranking waits (`NearestSearch`)


@dataclass(frozen=True)
class Costs:
    """What single things take on one core, as measured on an AMD EPYC and a virtual disk.

    Attributes:
        message_s: an operation of a c10d client, here over loopback.
        mebibyte_s: to get so many bytes.
        cell_s: rank 0's look at a cell that a rank sends as one that may be among the nearest.
        ranked_s: to rank it, where it is among the nearest of what all ranks have sent.
        chunk_s: to write and commit a chunk, and the nearest images before it.
    """

    message_s: float
    mebibyte_s: float
    cell_s: float
    ranked_s: float
    chunk_s: float


MEASURED = Costs(message_s=17e-6, mebibyte_s=0.3e-3, cell_s=1.1e-9, ranked_s=0.45e-6, chunk_s=19e-3)


def predict(images: int, ranks: int, rate: float, costs: Costs) -> dict[str, float]:
    """One pass over one layer of so many images, by so many ranks that take `rate` images/s each."""
    rows, batch = chunk_rows(images, GRID), BATCH["cuda"]
    chunks = math.ceil(images / rows)
    units = len(cut_units([slice(start, min(start + rows, images)) for start in range(0, images, rows)], batch, ranks))
    cells = ranks * K * near(images / ranks * CELLS / K)
    sent_bytes = 2 * CELLS * images + CELL_BYTES * cells
    pieces = math.ceil(sent_bytes / units / PIECE_BYTES)
    # Rank 0 for a unit: done, each piece, that there are no more, kept, next. Who made it: next, each piece, done, how
    # many are kept; for each batch whether it is wanted. Waiting is not counted.
    rank_0_messages = units * (4 + pieces)
    messages = rank_0_messages + units * (3 + pieces) + math.ceil(images / batch)
    rank_0_s = (
        rank_0_messages * costs.message_s
        + sent_bytes / 2**20 * costs.mebibyte_s
        + cells * costs.cell_s
        + K * near(images * CELLS / K) * costs.ranked_s
        + chunks * costs.chunk_s
    )
    encoded_s = images / (ranks * rate)
    return {
        "images": images,
        "ranks": ranks,
        "units": units,
        "messages": messages,
        "megabytes": sent_bytes / 1e6,
        "encode_s": encoded_s,
        "rank_0_s": rank_0_s,
        "share": rank_0_s / encoded_s,
    }


def near(cells: float) -> float:
    """How many of a word's cells may be among the n nearest when they come, in random order."""
    if cells <= KEPT_IMAGES:
        return cells
    return min(cells, OLD_DISTANCES * KEPT_IMAGES * (1 + math.log(cells / KEPT_IMAGES)))


def measure() -> Costs:
    """The costs on this machine."""
    random = np.random.default_rng(0)
    store: Any = torch.distributed.TCPStore("localhost", 0, None, True, wait_for_workers=False)
    store.set("value", bytes(2**20))
    scales = iter(2.0**-power for power in range(64))  # nearer and nearer: all of them count
    far = sent(random, 2.0)
    nearest = NearestSearch(K)
    ranked_s = timed(lambda: nearest.add(sent(random, next(scales))), 8) / (K * KEPT_IMAGES)
    cell_s = timed(lambda: nearest.add(far), 8) / (K * KEPT_IMAGES)
    with tempfile.TemporaryDirectory(prefix="bowstore-scale-") as name:
        chunk_s = timed(chunk_writer(Path(name), nearest.result(), random), 12)
    return Costs(
        message_s=timed(lambda: store.add("counter", 1), 1000),
        mebibyte_s=timed(lambda: store.get("value"), 50),
        cell_s=cell_s,
        ranked_s=ranked_s,
        chunk_s=chunk_s,
    )


def sent(random: np.random.Generator, scale: float) -> Cells:
    """Cells of as many random images as are kept for each word, at distances up to a scale."""
    words = np.arange(K, dtype=np.int64).repeat(KEPT_IMAGES)
    rows, places = random.integers(0, 2**40, words.shape), random.integers(0, CELLS, words.shape)
    return Cells(words, rows, places, np.float32(scale) * random.random(words.shape, np.float32))


def chunk_writer(folder: Path, nearest: NearestImages, random: np.random.Generator) -> Callable[[], None]:
    """What writes a chunk, each time the next one of a new store, as `assign_pass` does."""
    rows = chunk_rows(IMAGES[0], GRID)
    hashes_N = np.arange(64 * rows, dtype=np.uint64)
    writer = create_store(folder / "words.zarr", fingerprint="0", key_hash_N=hashes_N, image_digest_N=hashes_N)
    spec = LayerSpec({}, {}, {}, K, GRID, 1)
    writer.add_layer("conv4", spec, np.zeros((K, 1), np.float32))
    words_Nhw = random.integers(0, K, (rows, *GRID), np.uint16)
    chunks = iter(range(64))

    def write() -> None:
        save_nearest(folder / "nearest.npz", nearest)
        writer.write_chunk("conv4", next(chunks), words_Nhw)

    return write


def timed(call: Callable[[], object], times: int) -> float:
    """Median seconds of a call."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return median(taken)


@click.command()
@click.option("--images", type=click.IntRange(1), multiple=True, default=IMAGES, show_default=True)
@click.option("--ranks", type=click.IntRange(1), multiple=True, default=RANKS, show_default=True)
@click.option("--rate", type=click.FloatRange(1), default=RATE, show_default=True, help="Images/s of a rank.")
@click.option("--measure", "here", is_flag=True, help="Measure what single things take on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
def main(images: tuple[int, ...], ranks: tuple[int, ...], rate: float, here: bool, as_json: bool) -> None:
    """Predict what many ranks ask of rank 0."""
    costs = measure() if here else MEASURED
    rows = [predict(number, size, rate, costs) for number in images for size in ranks]
    if as_json:
        click.echo(json.dumps({"costs": asdict(costs), "rate": rate, "passes": rows}, indent=2))
        return
    click.echo(", ".join(f"{name} {value:.2g}" for name, value in asdict(costs).items()))
    click.echo("| images | ranks | units | messages | MB | encoding, s | rank 0's thread, s | its share |")
    click.echo("|" + "---:|" * 8)
    for row in rows:
        click.echo(
            f"| {row['images']:,} | {row['ranks']} | {row['units']:,} | {row['messages']:,} | {row['megabytes']:,.0f} "
            f"| {row['encode_s']:,.1f} | {row['rank_0_s']:,.1f} | {row['share']:.2g} |"
        )


if __name__ == "__main__":
    main()
