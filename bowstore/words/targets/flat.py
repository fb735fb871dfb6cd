"""A layer's words as one flat file of rows, for stores larger than memory.

    4096 bytes of header    one line of JSON: format, identity of the words, shape
    uint16 (N, M)           little-endian, row after row

The file lies in the cache under the identity of its words, so that it never has to be renewed, only made again if it
is damaged. All processes of a machine read the same file, and so share what the kernel keeps of it in memory.

Legend: N rows of the store, B rows of one batch, M slots (locations of the word map).
"""

import errno
import json
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, CorruptError
from bowstore.files import atomic_file, leftovers, waiting_lock
from bowstore.progress import Progress, say
from bowstore.remote.cache import cache_root, hold, is_as_recorded, lock_file, mark_used, reserve, write_record
from bowstore.words.store.arrays import array_digest
from bowstore.words.store.join import JoinedLayer
from bowstore.words.store.layer import Layer

SUFFIX = ".u16"
_HEADER_BYTES = 4096  # a page, so that rows and pages keep their relative places
_VERSION = 1
_MAX_BUFFERS = os.sysconf("SC_IOV_MAX")
_REMEDY = "free some, or name a folder on a larger disk in storage.cache"


class FlatWords:
    """An unpacked layer, opened for reading rows.

    Attributes:
        path: the file.
        slots: M.
    """

    def __init__(self, path: Path, layer: Layer, chunk_digests: NDArray[np.uint64]) -> None:
        self.path, self._layer, self._chunk_digests = path, layer, chunk_digests
        self.slots = layer.grid[0] * layer.grid[1]
        self._row_bytes = 2 * self.slots
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        hold(self._file)
        mark_used(path)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # single rows are read, not their neighbours

    def read(
        self, rows_B: NDArray[np.int64], out_BM: NDArray[np.uint16], places_B: NDArray[np.int64] | None = None
    ) -> None:
        """Read rows of the store into rows of a C-contiguous array, `places_B` or in order; adjacent rows by one call.

        All reads are announced to the kernel first, so that a disk works on them at once.

        Raises:
            CorruptError: the file ended early.
        """
        order_B = np.argsort(rows_B, kind="stable")
        sorted_B = rows_B[order_B]
        starts = np.flatnonzero(np.diff(sorted_B, prepend=-2) != 1).tolist()
        runs = list(pairwise([*starts, len(rows_B)]))
        first_row, place = sorted_B.tolist(), (order_B if places_B is None else places_B[order_B]).tolist()
        for start, stop in runs:
            bytes_ = (stop - start) * self._row_bytes
            os.posix_fadvise(self._file, self._offset(first_row[start]), bytes_, os.POSIX_FADV_WILLNEED)
        memory = out_BM.view(np.uint8).reshape(-1).data
        for start, stop in runs:
            for some in range(start, stop, _MAX_BUFFERS):
                buffers = [self._slot(memory, place[at]) for at in range(some, min(some + _MAX_BUFFERS, stop))]
                if os.preadv(self._file, buffers, self._offset(first_row[some])) < len(buffers) * self._row_bytes:
                    for at, buffer in enumerate(buffers, first_row[some]):
                        self._fill(buffer, self._offset(at))

    def chunk(self, chunk: int) -> NDArray[np.uint16]:
        """Words of a chunk of the store, uint16 (rows, M), checked against the digest that the store records.

        Raises:
            CorruptError: other words than the store's; names the file and its rows.
        """
        rows = self._layer.rows(chunk)
        words = np.empty((rows.stop - rows.start, self.slots), "<u2")
        self._fill(words.view(np.uint8).reshape(-1).data, self._offset(rows.start))
        if array_digest(words) != self._chunk_digests[chunk]:
            raise CorruptError(
                f"rows {rows.start}-{rows.stop - 1} of {self.path} differ from word store {self._layer.path}; remove "
                f"that file, it is made again at the next start"
            )
        return words

    def _offset(self, row: int) -> int:
        return _HEADER_BYTES + row * self._row_bytes

    def _slot(self, memory: memoryview, place: int) -> memoryview:
        return memory[place * self._row_bytes : (place + 1) * self._row_bytes]

    def _fill(self, buffer: memoryview, offset: int) -> None:
        """Read until the buffer is full: network file systems may give less than was asked for."""
        done = 0
        while done < len(buffer):
            got = os.preadv(self._file, [buffer[done:]], offset + done)
            if got == 0:
                raise CorruptError(
                    f"{self.path} ends at byte {offset + done}, within its rows: it was cut while in use; run again"
                )
            done += got


class JoinedFlatWords:
    """The flat files of several stores as one, each of which serves other runs too.

    Attributes:
        files: of the stores, in their order.
    """

    def __init__(self, layer: JoinedLayer, files: Sequence[FlatWords]) -> None:
        self.files = tuple(files)
        self._starts = np.cumsum([0, *(part.images for part in layer.layers)])
        self._chunks = [
            (file, chunk) for file, part in zip(files, layer.layers, strict=True) for chunk in range(part.chunks)
        ]

    def read(self, rows_B: NDArray[np.int64], out_BM: NDArray[np.uint16]) -> None:
        """As of one file; rows are counted through all stores."""
        of_B = np.searchsorted(self._starts, rows_B, side="right") - 1
        for number, file in enumerate(self.files):
            mine = np.flatnonzero(of_B == number)
            file.read(rows_B[mine] - self._starts[number], out_BM, mine)

    def chunk(self, chunk: int) -> NDArray[np.uint16]:
        """As of one file; chunks are counted through all stores."""
        file, own = self._chunks[chunk]
        return file.chunk(own)


def open_flat_words(
    layer: Layer | JoinedLayer, storage: StorageConfig, *, shown: bool = True
) -> FlatWords | JoinedFlatWords:
    """`open_flat`, of one store or several."""
    if isinstance(layer, Layer):
        return open_flat(layer, storage, shown=shown)
    return JoinedFlatWords(layer, [open_flat(part, storage, shown=shown) for part in layer.layers])


def open_flat(layer: Layer, storage: StorageConfig, *, shown: bool = True) -> FlatWords:
    """Open the flat file of a layer, unpacking the store first if there is no file, or no whole one.

    One process of a machine unpacks while the others wait. Of the file, header and size are checked;
    `FlatWords.chunk` checks the words.

    Args:
        layer: a complete layer.
        storage: says where the cache lies and how large it may be.
        shown: whether to say so when another process is waited for.

    Raises:
        CorruptError: a damaged chunk of the store.
        UsageError: larger than the cache may grow.
        BowstoreError: the disk, or the rest of the cache, leaves no room for the file.
    """
    folder = cache_root(storage) / "words"
    chunk_digests = layer.chunk_digests()
    header = _header(layer, chunk_digests)
    path = folder / f"{json.loads(header)['identity']}{SUFFIX}"
    if _problem(path, layer, header):
        with waiting_lock(lock_file(path), f"file {path} of unpacked words", shown=shown):
            problem = _problem(path, layer, header)
            if problem:
                if path.exists():
                    say(f"{path} {problem}: unpacking the words again")
                _clear(path, flat_bytes(layer), f"the file of unpacked words of {layer.path}", storage)
                _unpack(layer, path, header, chunk_digests)
    if not is_as_recorded(path):
        with suppress(OSError):  # another user's cache can still be read
            write_record(path)
    return FlatWords(path, layer, chunk_digests)


def flat_bytes(layer: Layer) -> int:
    """Size of a layer's flat file, bytes."""
    return _HEADER_BYTES + 2 * layer.images * layer.grid[0] * layer.grid[1]


def _header(layer: Layer, chunk_digests: NDArray[np.uint64]) -> bytes:
    """The header of this layer's file; its identity is the words', not that of the store's path."""
    shape = [layer.images, *layer.grid]
    digests = chunk_digests.astype("<u8").tobytes()
    identity = xxhash.xxh3_128(f"{shape} {layer.chunk_rows} ".encode() + digests).hexdigest()
    text = json.dumps({"format": "bowstore flat words", "version": _VERSION, "identity": identity, "shape": shape})
    return (text + "\n").encode().ljust(_HEADER_BYTES, b" ")


def _problem(path: Path, layer: Layer, header: bytes) -> str | None:
    """What is wrong with the file, by its header and size."""
    try:
        with open(path, "rb") as file:
            size_bytes, found = os.fstat(file.fileno()).st_size, file.read(_HEADER_BYTES)
    except FileNotFoundError:
        return "is missing"
    if size_bytes != flat_bytes(layer):
        return f"has {size_bytes} bytes, not {flat_bytes(layer)}"
    return None if found == header else "holds other words"


def _clear(path: Path, needed: int, what: str, storage: StorageConfig) -> None:
    """Remove what is left of this file, and refuse to start what cannot finish; call it under the file's lock."""
    for old in (path, *leftovers(path, own=True)):
        old.unlink(missing_ok=True)
    reserve(needed, what, storage)


def _unpack(layer: Layer, path: Path, header: bytes, chunk_digests: NDArray[np.uint64]) -> None:
    """Write the flat file, chunk by chunk with every digest checked; call it under the file's lock.

    Progress is shown by the process that unpacks, whichever rank it is.
    """
    try:
        with atomic_file(path) as file, Progress("unpack words", layer.chunks, "chunks") as progress:
            file.write(header)
            for chunk, digest in enumerate(chunk_digests.tolist()):
                file.write(np.ascontiguousarray(layer.read_chunk(chunk, digest), "<u2").data)
                progress.advance()
    except OSError as error:
        if isinstance(error, BowstoreError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BowstoreError(f"no space left on the disk of {path.parent}; {_REMEDY}") from error
