"""The index as a file: columns behind a JSON header, in the safetensors format, written in a stream and mapped.

The library's own loader copies every tensor into private memory and its writer wants all of it twice; the format
(8 bytes of header length, JSON, flat little-endian tensors) is plain enough to write and to map, which lets the
ranks of one machine share the pages.
"""

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from bowstore.files import atomic_file, check_plain_file

INDEX_FILE = "index.safetensors"
INDEX_VERSION = 2
COLUMNS: dict[str, Any] = {  # in the order of the file: wide types first, so that each column is aligned
    "offset": np.int64,
    "key_start": np.int64,
    "key_hash": np.uint64,
    "digest": np.uint64,
    "shard": np.int32,
    "size": np.int32,
    "height": np.int32,
    "width": np.int32,
    "label": np.int32,
    "key_bytes": np.uint8,
}
_TYPE_NAMES = {np.int64: "I64", np.uint64: "U64", np.int32: "I32", np.uint8: "U8"}
_ALIGNMENT_BYTES = 8
_LENGTH = struct.Struct("<Q")
Pieces = Callable[[str], Iterator[NDArray[Any]]]


def write_table(path: Path, meta: dict[str, Any], lengths: dict[str, int], pieces: Pieces) -> None:
    """Write columns and what is known of them, atomically.

    Args:
        path: the file.
        meta: plain values; the digest of the columns is added under "columns".
        lengths: number of elements of each column.
        pieces: gives a column's elements, by its name, in pieces; called more than once.
    """
    digest = xxhash.xxh3_128()
    for name in COLUMNS:
        for piece in pieces(name):
            digest.update(piece.data)
    header = _header({**meta, "columns": digest.hexdigest()}, lengths)
    with atomic_file(path) as file:
        file.write(header)
        for name in COLUMNS:
            for piece in pieces(name):
                file.write(piece.data)


class TableHeader(NamedTuple):
    """Start of a table's file.

    Attributes:
        meta: what is known of the columns; not to be trusted before `map_columns` has checked it.
        raw: the bytes it came from.
        size_bytes: length of the file.
    """

    meta: dict[str, Any]
    raw: bytes
    size_bytes: int

    @property
    def rows(self) -> int:
        """Length of the columns.

        Raises:
            KeyError, TypeError, IndexError: the header is damaged.
        """
        return int(json.loads(self.raw[_LENGTH.size :])["key_hash"]["shape"][0])


def read_header(path: Path) -> TableHeader:
    """The header of a table, of any version.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such header.
    """
    check_plain_file(path)
    size_bytes = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else 0
        if not 0 < length <= size_bytes - _LENGTH.size:
            raise ValueError(f"a header of {length} bytes in a file of {size_bytes}")
        raw = start + file.read(length)
    try:
        entries = json.loads(raw[_LENGTH.size :])
        meta = json.loads(entries["__metadata__"]["bowstore"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"a header without {error}") from error
    except RecursionError as error:
        raise ValueError("a header of many levels") from error
    if not isinstance(meta, dict):
        raise ValueError(f"a header that holds a {type(meta).__name__}")
    return TableHeader(meta, raw, size_bytes)


def map_columns(path: Path, header: TableHeader) -> dict[str, NDArray[Any]]:
    """The columns behind a header, memory-mapped and read-only.

    Raises:
        ValueError: the header is damaged, or the file is cut.
    """
    try:
        entries = json.loads(header.raw[_LENGTH.size :])
        lengths = {name: entries[name]["shape"][0] for name in COLUMNS}
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"a header without {error}") from error
    if wrong := [name for name, length in lengths.items() if type(length) is not int or length < 0]:
        raise ValueError(f"a header with a length of {lengths[wrong[0]]!r} for column {wrong[0]!r}")
    if header.raw != _header(header.meta, lengths):
        raise ValueError("its header is not the one that was written")
    blob = np.memmap(path, dtype=np.uint8, mode="r")
    columns: dict[str, NDArray[Any]] = {}
    start = len(header.raw)
    for name, dtype in COLUMNS.items():
        stop = start + lengths[name] * np.dtype(dtype).itemsize
        columns[name] = blob[start:stop].view(dtype)
        start = stop
    if start != header.size_bytes:
        raise ValueError(f"its columns end at byte {start} of {header.size_bytes}")
    return columns


def image_digest(data: bytes | memoryview) -> int:
    """What the index keeps of an image's bytes, in column "digest": their xxh3-64."""
    return xxhash.xxh3_64_intdigest(data)


def joint_fingerprint(parts: Sequence[str]) -> str:
    """Of several tables, or stores, whose rows follow each other: theirs in order; that of one alone is its own."""
    return parts[0] if len(parts) == 1 else xxhash.xxh3_128_hexdigest(" ".join(parts).encode())


def digest_columns(columns: Callable[[str], NDArray[Any]]) -> str:
    """xxh3-128 over all columns, hex; reads them once."""
    digest = xxhash.xxh3_128()
    for name in COLUMNS:
        digest.update(columns(name).data)
    return digest.hexdigest()


def _header(meta: dict[str, Any], lengths: dict[str, int]) -> bytes:
    """The 8 bytes of length and the JSON, a function of its arguments so that a reader can compare."""
    text = json.dumps(meta)
    entries: dict[str, Any] = {"__metadata__": {"bowstore": text, "digest": xxhash.xxh3_128_hexdigest(text.encode())}}
    start = 0
    for name, dtype in COLUMNS.items():
        end = start + lengths[name] * np.dtype(dtype).itemsize
        entries[name] = {"dtype": _TYPE_NAMES[dtype], "shape": [lengths[name]], "data_offsets": [start, end]}
        start = end
    body = json.dumps(entries).encode()
    body += b" " * (-len(body) % _ALIGNMENT_BYTES)
    return _LENGTH.pack(len(body)) + body
