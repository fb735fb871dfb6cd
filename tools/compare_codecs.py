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

import asyncio
import json
import math
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal

import click
import numpy as np
import zarr
from numba import njit
from numpy.typing import NDArray
from zarr.abc.codec import ArrayArrayCodec, ArrayBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec, ZstdCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.storage import LocalStore

from bowstore.environment import cores, library_versions
from bowstore.errors import BowstoreError
from bowstore.progress import Progress
from bowstore.words.arrays import READ_ERRORS, stored_bytes
from bowstore.words.layer import NOT_WRITTEN, Layer
from bowstore.words.store import open_store

Words = NDArray[np.uint16]  # (rows, h, w)
BASE = "zstd1"  # the ratios are over this one
CHOSEN = "blosc_lz4_bitshuffle"
OTHER_CHUNK_ROWS = (256, 16384)  # for the chosen codec, beside the store's own
# A flipped length can ask for more memory than there is; that too is an error and no wrong words.
ERRORS = (*READ_ERRORS, MemoryError, BufferError)
EDGE_BYTES, INNER_BITS = 16, 200
# Of one round; a GB is of decoded words. CPU seconds are of all threads: other work on the machine moves them less.
FIGURES = ("write_mb_per_second", "read_mb_per_second", "write_cpu_s_per_gb", "read_cpu_s_per_gb")


@dataclass(frozen=True)
class MapDelta(ArrayArrayCodec):
    """Each word minus the one before it in its own image, row by row, modulo 2^16; the first as it is."""

    is_fixed_size = True

    def to_dict(self) -> dict[str, Any]:
        """Name in the array's metadata; no registry knows it."""
        return {"name": "bowstore.map_delta"}

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> NDBuffer:
        return chunk_data.from_numpy_array(await asyncio.to_thread(_delta, chunk_data.as_numpy_array()))

    async def _decode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> NDBuffer:
        return chunk_data.from_numpy_array(await asyncio.to_thread(_undo_delta, chunk_data.as_numpy_array()))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """As many bytes as before."""
        return input_byte_length


@dataclass(frozen=True)
class PackedWords(ArrayBytesCodec):
    """Words of `bits` bits without gaps, lowest bit first: the layout of the registered extension `packbits`."""

    bits: int
    is_fixed_size = True

    def to_dict(self) -> dict[str, Any]:
        """Name and configuration that zarr-extensions gives this layout."""
        return {"name": "packbits", "configuration": {"first_bit": 0, "last_bit": self.bits - 1}}

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        packed = await asyncio.to_thread(pack, chunk_data.as_numpy_array(), self.bits)
        return chunk_spec.prototype.buffer.from_array_like(packed)

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        words = await asyncio.to_thread(unpack, chunk_data.as_numpy_array(), self.bits, math.prod(chunk_spec.shape))
        return chunk_spec.prototype.nd_buffer.from_numpy_array(words.reshape(chunk_spec.shape))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Bytes of so many bytes of 16-bit words, packed."""
        return -(-input_byte_length // 2 * self.bits // 8)


def _delta(words: Words) -> Words:
    flat = words.reshape(len(words), -1)
    return np.diff(flat, axis=1, prepend=np.uint16(0)).reshape(words.shape)


def _undo_delta(deltas: Words) -> Words:
    return np.cumsum(deltas.reshape(len(deltas), -1), axis=1, dtype=np.uint16).reshape(deltas.shape)


def pack(words: Words, bits: int) -> NDArray[np.uint8]:
    """The low `bits` bits of each word, one after the other, uint8 (ceil(words * bits / 8),)."""
    packed = np.zeros(-(-words.size * bits // 64), np.uint64)
    _pack_into(np.ascontiguousarray(words).reshape(-1), bits, packed)
    return packed.view(np.uint8)[: -(-words.size * bits // 8)]


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> Words:
    """`count` words, uint16 (count,), from what `pack` made."""
    if len(packed) != -(-count * bits // 8):
        raise ValueError(f"{len(packed)} bytes do not hold {count} words of {bits} bits")
    whole = packed if len(packed) % 8 == 0 else np.pad(packed, (0, -len(packed) % 8))
    words = np.empty(count, np.uint16)
    _unpack_into(np.ascontiguousarray(whole).view(np.uint64), bits, words)
    return words


@njit(nogil=True)
def _pack_into(words: Any, bits: int, packed: Any) -> None:  # all uint64: numba makes uint64 and int64 into floats
    width, full = np.uint64(bits), np.uint64(64)
    mask = (np.uint64(1) << width) - np.uint64(1)
    held, gathered, place = np.uint64(0), np.uint64(0), 0
    for word in words:
        value = np.uint64(word) & mask
        gathered |= value << held
        held += width
        if held >= full:
            packed[place] = gathered
            place += 1
            held -= full
            gathered = value >> (width - held)
    if held > np.uint64(0):
        packed[place] = gathered


@njit(nogil=True)
def _unpack_into(packed: Any, bits: int, words: Any) -> None:
    width, full = np.uint64(bits), np.uint64(64)
    mask = (np.uint64(1) << width) - np.uint64(1)
    held, gathered, place = np.uint64(0), np.uint64(0), 0
    for number in range(len(words)):
        if held < width:
            following = packed[place]
            place += 1
            words[number] = (gathered | (following << held)) & mask
            gathered = following >> (width - held)
            held += full - width
        else:
            words[number] = gathered & mask
            gathered >>= width
            held -= width


@dataclass(frozen=True)
class Candidate:
    """One way to keep a chunk.

    Attributes:
        title: for the table.
        readers: which Zarr readers know it: "core" (in the Zarr v3 specification), "registered" (in its register of
            extensions, which a reader may leave out), "none".
        arguments: of `zarr.create_array`, for words of so many bits.
    """

    title: str
    readers: str
    arguments: Callable[[int], dict[str, Any]]


def _zstd(level: int, **more: Any) -> Callable[[int], dict[str, Any]]:
    return lambda bits: {"compressors": [ZstdCodec(level=level, checksum=True)], **more}


def _blosc(
    cname: Literal["lz4", "zstd"], clevel: int, shuffle: Literal["shuffle", "bitshuffle"]
) -> Callable[[int], dict[str, Any]]:
    codec = BloscCodec(typesize=2, cname=cname, clevel=clevel, shuffle=shuffle)
    return lambda bits: {"compressors": [codec, Crc32cCodec()]}


def _packed(bits: int) -> dict[str, Any]:
    return {"serializer": PackedWords(bits), "compressors": [Crc32cCodec()]}


CANDIDATES = {
    "none_crc32c": Candidate("no compression, crc32c", "core", lambda bits: {"compressors": [Crc32cCodec()]}),
    "zstd1": Candidate("zstd 1, checksum", "registered", _zstd(1)),
    "zstd3": Candidate("zstd 3, checksum", "registered", _zstd(3)),
    "zstd9": Candidate("zstd 9, checksum", "registered", _zstd(9)),
    "blosc_lz4_shuffle": Candidate("blosc lz4 5, shuffle, crc32c", "core", _blosc("lz4", 5, "shuffle")),
    "blosc_lz4_bitshuffle": Candidate("blosc lz4 5, bitshuffle, crc32c", "core", _blosc("lz4", 5, "bitshuffle")),
    "blosc_zstd1_shuffle": Candidate("blosc zstd 1, shuffle, crc32c", "core", _blosc("zstd", 1, "shuffle")),
    "blosc_zstd1_bitshuffle": Candidate("blosc zstd 1, bitshuffle, crc32c", "core", _blosc("zstd", 1, "bitshuffle")),
    "blosc_zstd5_shuffle": Candidate("blosc zstd 5, shuffle, crc32c", "core", _blosc("zstd", 5, "shuffle")),
    "blosc_zstd5_bitshuffle": Candidate("blosc zstd 5, bitshuffle, crc32c", "core", _blosc("zstd", 5, "bitshuffle")),
    "packed": Candidate("packed bits, crc32c", "registered", _packed),
    "delta_zstd1": Candidate("delta in the map, zstd 1, checksum", "none", _zstd(1, filters=[MapDelta()])),
    "transposed_zstd1": Candidate(
        "transposed, zstd 1, checksum", "registered", _zstd(1, filters=[TransposeCodec(order=(1, 2, 0))])
    ),
    # These two show what the test of damage finds where nothing guards.
    "zarr_default": Candidate("zarr's default: zstd 0, no checksum", "registered", lambda bits: {}),
    "none": Candidate("no compression, no checksum", "core", lambda bits: {"compressors": None}),
}


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
    bits = max(1, math.ceil(math.log2(layer.words)))
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
        "words": layer.words,
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
