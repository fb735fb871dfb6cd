"""Ways to keep a chunk of words that `compare_codecs.py` compares, those that Zarr has and two of its own.

Legend: a word is uint16; bits is ceil(log2 K).
"""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray
from zarr.abc.codec import ArrayArrayCodec, ArrayBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec, ZstdCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer

Words = NDArray[np.uint16]  # (rows, h, w)


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
