"""What the words of a store cost under other codecs: bytes an image, MB/s, and whether damage is noticed.

    python tools/compare_codecs.py data/words.zarr [--layer conv4] [--rounds 5] [--json]

Every candidate writes the same words through zarr, in chunks as large as the store's, one chunk after the other as
the store's writer does, and reads them back in one call as the store's reader does. Bytes an image come from the
words as they are, in whole chunks. MB/s (10^6 bytes of decoded words) come from the words repeated to `--tile-mb`, in
interleaved rounds, written to and read from the page cache, without the store's fsync and digests: they cost all
candidates the same. Each round compares what came back with what was written. The ratio of a round is a candidate's
rate over zstd level 1 with checksum in the same round; medians count.

Damage is done to one chunk: each bit of its first and last 16 bytes and 200 bits in between flipped one at a time, the
chunk cut short, the chunk emptied. What is read must be an error, or the right words after all.

Legend: N images, h w word grid, K words.
"""

import json
import math
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import zarr
from codec_candidates import CANDIDATES, Words
from zarr.storage import LocalStore

from bowstore.environment import cores, library_versions
from bowstore.errors import BowstoreError
from bowstore.progress import Progress
from bowstore.words.store.arrays import READ_ERRORS, stored_bytes
from bowstore.words.store.layer import Layer
from bowstore.words.store.schema import NOT_WRITTEN
from bowstore.words.store.store import open_store

BASE = "zstd1"  # the ratios are over this one
CHOSEN = "blosc_lz4_bitshuffle"
OTHER_CHUNK_ROWS = (256, 16384)  # for the chosen codec, beside the store's own
# A flipped length can ask for more memory than there is; that too is an error and no wrong words.
ERRORS = (*READ_ERRORS, MemoryError, BufferError)
EDGE_BYTES, INNER_BITS = 16, 200
# Of one round; a GB is of decoded words. CPU seconds are of all threads: other work on the machine moves them less.
FIGURES = ("write_mb_per_second", "read_mb_per_second", "write_cpu_s_per_gb", "read_cpu_s_per_gb")
NAMES = click.Choice(list(CANDIDATES))


@dataclass(frozen=True)
class Cut:
    """A candidate with a chunk size: a row of the table."""

    name: str
    chunk_rows: int

    def row(self) -> dict[str, Any]:
        """What is known of it before measuring."""
        candidate = CANDIDATES[self.name]
        names = {"codec": self.name, "title": candidate.title, "readers": candidate.readers}
        return {**names, "chunk_rows": self.chunk_rows, **{figure: [] for figure in FIGURES}}


def new_array(folder: Path, cut: Cut, shape: tuple[int, ...], bits: int) -> zarr.Array[Any]:
    """An empty array of the store's kind below `folder`, with the candidate's codecs."""
    return zarr.create_array(
        LocalStore(folder),
        shape=shape,
        chunks=(min(cut.chunk_rows, shape[0]), *shape[1:]),
        dtype=np.uint16,
        fill_value=NOT_WRITTEN,
        config={"write_empty_chunks": True},
        **CANDIDATES[cut.name].arguments(bits),
    )


def write(array: zarr.Array[Any], words: Words) -> None:
    """Write chunk after chunk, as the store's writer does."""
    rows = array.chunks[0]
    for start in range(0, len(words), rows):
        array[start : start + rows] = words[start : start + rows]


def bytes_per_image(folder: Path, cut: Cut, words: Words, bits: int) -> float:
    """Bytes of the chunks over images; rows that fill no whole chunk are left out, unless they are all there are."""
    whole = len(words) // cut.chunk_rows * cut.chunk_rows or len(words)
    write(new_array(folder, cut, (whole, *words.shape[1:]), bits), words[:whole])
    size = stored_bytes(folder / "c") / whole
    shutil.rmtree(folder)
    return size


def time_round(folder: Path, cut: Cut, words: Words, bits: int) -> tuple[float, ...]:
    """`FIGURES` of writing and of reading all words once.

    Raises:
        BowstoreError: what was read is not what was written.
    """
    array = new_array(folder, cut, words.shape, bits)
    clocks = [(time.perf_counter(), time.process_time())]
    write(array, words)
    clocks.append((time.perf_counter(), time.process_time()))
    back = np.asarray(array[:])
    clocks.append((time.perf_counter(), time.process_time()))
    if not np.array_equal(back, words):
        raise BowstoreError(f"{cut.name} with {cut.chunk_rows} rows a chunk gave back other words than were written")
    shutil.rmtree(folder)
    (write_s, write_cpu_s), (read_s, read_cpu_s) = np.diff(clocks, axis=0).tolist()
    gigabytes = words.nbytes / 1e9
    return 1e3 * gigabytes / write_s, 1e3 * gigabytes / read_s, write_cpu_s / gigabytes, read_cpu_s / gigabytes


def damages(chunk: bytes) -> Iterator[tuple[str, bytes]]:
    """Kinds of damage and the damaged chunk."""
    length, edge = len(chunk), 8 * min(EDGE_BYTES, len(chunk))
    inner = np.random.default_rng(0).integers(0, 8 * length, INNER_BITS).tolist()
    for bit in sorted({*range(edge), *range(8 * length - edge, 8 * length), *inner}):
        flipped = bytearray(chunk)
        flipped[bit // 8] ^= 1 << bit % 8
        yield "flipped", bytes(flipped)
    for kept in (length - 1, length - 4, length - 8, length // 2, 16, 4):
        yield "truncated", chunk[:kept]
    yield "emptied", b""


def damage_counts(folder: Path, cut: Cut, words: Words, bits: int) -> dict[str, dict[str, int]]:
    """What reading a damaged chunk did, by kind of damage: an error, the right words, or wrong words without a word."""
    some = words[: cut.chunk_rows]
    array = new_array(folder, cut, some.shape, bits)
    write(array, some)
    path = next(file for file in (folder / "c").rglob("*") if file.is_file())
    counts: dict[str, Counter[str]] = {}
    for kind, data in damages(path.read_bytes()):
        path.write_bytes(data)
        try:
            outcome = "right" if np.array_equal(np.asarray(array[:]), some) else "silent"
        except ERRORS:
            outcome = "error"
        counts.setdefault(kind, Counter())[outcome] += 1
    shutil.rmtree(folder)
    return {kind: dict(count) for kind, count in counts.items()}


def entropy_bits(words: Words) -> float:
    """Bits a word of an ideal coder that knows how often each word is used, and nothing of its neighbours."""
    share = np.bincount(words.reshape(-1)) / words.size
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())


def compare(
    layer: Layer,
    names: Sequence[str],
    *,
    chosen: str,
    rows: int | None,
    own_rows: int | None,
    rounds: int,
    tile_mb: float,
) -> dict[str, Any]:
    """All measurements of one layer's words, in chunks of `own_rows` rows (None: the store's)."""
    words = layer.read_words()[:rows]
    bits = max(1, math.ceil(math.log2(layer.num_words)))
    own_rows = min(own_rows or layer.chunk_rows, len(words))
    cuts = [Cut(name, own_rows) for name in dict.fromkeys((BASE, chosen, *names))]
    cuts += [Cut(chosen, other) for other in OTHER_CHUNK_ROWS if other != own_rows]
    results = [cut.row() for cut in cuts]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "words"
        _measure_bytes(folder, cuts, results, words, bits)
        _time_rounds(folder, cuts, results, _tiled(words, tile_mb, cuts), bits=bits, rounds=rounds)
    return {
        "protocol": "bench/compare_codecs",
        "protocol_version": 1,
        "device": f"cpu, {cores()} cores",
        "versions": _versions(),
        "inputs": {"vocabulary": layer.attributes.get("vocabulary_digest")},
        "teacher": {name: layer.attributes["teacher"].get(name) for name in ("arch", "layer", "name")},
        "images": len(words),
        "grid": list(layer.grid),
        "words": layer.num_words,
        "bits_per_word": bits,
        "entropy_bits_per_word": entropy_bits(words),
        "same_as_left_neighbour": float((words[:, :, 1:] == words[:, :, :-1]).sum() / max(1, words[:, :, 1:].size)),
        "rounds": rounds,
        "tile_mb": tile_mb,
        "codecs": results,
    }


def _measure_bytes(folder: Path, cuts: list[Cut], results: list[dict[str, Any]], words: Words, bits: int) -> None:
    """Fill in sizes and what damage did."""
    with Progress("size and damage", len(cuts), "codecs") as progress:
        for cut, result in zip(cuts, results, strict=True):
            result["bytes_per_image"] = bytes_per_image(folder, cut, words, bits)
            result["damage"] = damage_counts(folder, cut, words, bits)
            result["notices_damage"] = not any("silent" in count for count in result["damage"].values())
            progress.advance(note=f"{cut.name} {result['bytes_per_image']:.1f} bytes an image")


def _tiled(words: Words, tile_mb: float, cuts: list[Cut]) -> Words:
    """The words repeated to about `tile_mb` MB, a whole number of chunks of each size where they fit."""
    step = math.lcm(*(cut.chunk_rows for cut in cuts))
    wanted = max(len(words), round(1e6 * tile_mb / words[0].nbytes))
    count = wanted // step * step or wanted
    return np.resize(words, (count, *words.shape[1:]))


def _time_rounds(
    folder: Path, cuts: list[Cut], results: list[dict[str, Any]], tiled: Words, *, bits: int, rounds: int
) -> None:
    """Fill in the rates, in interleaved rounds; every other round backwards, so that none always follows the same."""
    pairs = list(zip(cuts, results, strict=True))
    with Progress("time codecs", rounds * len(cuts), "timings") as progress:
        time_round(folder, cuts[0], tiled, bits)  # the first of all would pay for fresh memory
        for number in range(rounds):
            for cut, result in pairs if number % 2 == 0 else pairs[::-1]:
                figures = time_round(folder, cut, tiled, bits)
                for name, figure in zip(FIGURES, figures, strict=True):
                    result[name].append(figure)
                progress.advance(note=f"{cut.name} {figures[0]:.0f} and {figures[1]:.0f} MB/s")
    for result in results:
        for which in ("write", "read"):
            rates, base = result[f"{which}_mb_per_second"], results[0][f"{which}_mb_per_second"]
            result[f"{which}_ratios_over_{BASE}"] = [a / b for a, b in zip(rates, base, strict=True)]


def _versions() -> dict[str, str]:
    names = ("zarr", "numcodecs", "google-crc32c", "numba")
    return {**library_versions(), **{name: metadata.version(name) for name in names}}


def table(result: dict[str, Any]) -> str:
    """A Markdown table, a row a codec."""
    head = ["codec", "rows a chunk", "bytes an image"]
    for which in ("write", "bulk read"):
        head += [f"{which} MB/s", "over zstd 1", "CPU s/GB"]
    lines = ["| " + " | ".join((*head, "notices damage", "in Zarr's registers")) + " |"]
    lines += ["|---|" + "---:|" * (len(head) - 1) + "---|---|"]
    for row in result["codecs"]:
        cells = [row["title"], str(row["chunk_rows"]), f"{row['bytes_per_image']:.1f}"]
        for which in ("write", "read"):
            cells += [_spread(row[f"{which}_mb_per_second"], 0), _spread(row[f"{which}_ratios_over_{BASE}"], 2)]
            cells.append(f"{median(row[f'{which}_cpu_s_per_gb']):.1f}")
        lines.append("| " + " | ".join((*cells, _notices(row), row["readers"])) + " |")
    (height, width), bits, entropy = result["grid"], result["bits_per_word"], result["entropy_bits_per_word"]
    lines += [
        "",
        f"{result['images']} images, {height}x{width} maps, K = {result['words']}: {2 * height * width} bytes an image "
        f"as uint16, {height * width * bits / 8:.1f} packed to {bits} bits, {height * width * entropy / 8:.1f} at the "
        f"words' entropy of {entropy:.2f} bits; {100 * result['same_as_left_neighbour']:.1f} % of the words equal "
        f"their left neighbour.",
    ]
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _notices(row: dict[str, Any]) -> str:
    if row["notices_damage"]:
        return "yes"
    missed = (
        f"{count['silent']} of {sum(count.values())} {kind}"
        for kind, count in row["damage"].items()
        if "silent" in count
    )
    return "**no**: not " + ", ".join(missed)


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--layer", help="Layer of the store.  [default: its only one]")
@click.option("--rows", type=click.IntRange(1), help="Only the first rows.  [default: all]")
@click.option("--chunk-rows", type=click.IntRange(1), help="Rows of a chunk.  [default: the store's]")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--tile-mb", type=float, default=300.0, show_default=True, help="Words to time, 10^6 bytes.")
@click.option("--codec", "names", type=NAMES, multiple=True, help="Only these.  [default: all]")
@click.option("--chosen", type=NAMES, default=CHOSEN, show_default=True, help="Shown in other chunks too.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone.")
def main(
    store: Path,
    layer: str | None,
    rows: int | None,
    chunk_rows: int | None,
    rounds: int,
    tile_mb: float,
    names: tuple[str, ...],
    chosen: str,
    as_json: bool,
) -> None:
    """The words of STORE under other codecs: size, speed, damage."""
    try:
        result = compare(
            open_store(store, layer).layer(layer),
            names or list(CANDIDATES),
            chosen=chosen,
            rows=rows,
            own_rows=chunk_rows,
            rounds=rounds,
            tile_mb=tile_mb,
        )
    except BowstoreError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(json.dumps(result, indent=2) if as_json else table(result))


if __name__ == "__main__":
    main()
