"""A layer's words as one file of rows in the cache, mapped into memory, for stores larger than memory.

The file holds uint16 (N, M), little-endian, row after row. Its name is the digest of its words, so that it never has
to be renewed, only made again if it is damaged. All processes of a machine map the same file, and so share what the
kernel keeps of it in memory.

Legend: N rows of the store, B rows of one batch, M slots (locations of the word map).
"""

import mmap
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from bowstore.config import StorageConfig
from bowstore.files import atomic_file, leftovers, waiting_lock
from bowstore.progress import QUIET_BYTES, Progress, say
from bowstore.remote.cache import cache_root, hold, is_as_recorded, lock_file, mark_used, reserve, write_record
from bowstore.words.store.arrays import array_digest
from bowstore.words.store.join import JoinedLayer
from bowstore.words.store.layer import Layer
from bowstore.words.targets.bags import words_bytes


class FlatWords:
    """The file of a layer's words, mapped.

    Attributes:
        path: the file.
        words_NM: uint16, read-only.
    """

    def __init__(self, path: Path, layer: Layer | JoinedLayer) -> None:
        self.path = path
        with open(path, "rb") as file:
            hold(file.fileno())  # until the map goes, which keeps a descriptor of the same open file
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.words_NM: NDArray[np.uint16] = np.frombuffer(self._map, "<u2").reshape(layer.images, -1)
        mark_used(path)

    def announce(self, rows_B: NDArray[np.int64]) -> None:
        """Tell the kernel which rows will be read, so that a disk works on all of them at once."""
        row_bytes = self.words_NM.strides[0]
        runs = np.flatnonzero(np.diff(rows_B, prepend=-2) != 1)  # rows in a row are one request
        for start, rows in zip(rows_B[runs].tolist(), np.diff(runs, append=len(rows_B)).tolist(), strict=True):
            page = row_bytes * start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, row_bytes * (start + rows) - page)


def open_flat(layer: Layer | JoinedLayer, storage: StorageConfig, *, shown: bool = True) -> FlatWords:
    """Open the file of a layer's words, unpacking the store first if there is no file, or not one of the same words.

    One process of a machine unpacks while the others wait. Each compares the words of a file that is there with the
    digests that the store records.

    Args:
        layer: a complete layer, of one store or of several.
        storage: says where the cache lies and how large it may be.
        shown: whether to say so when another process is waited for, and how far the comparison is.

    Raises:
        CorruptError: a damaged chunk of the store.
        UsageError: larger than the cache may grow.
        BowstoreError: the disk, or the rest of the cache, leaves no room for the file.
    """
    digests = layer.chunk_digests()
    about = f"{[layer.images, *layer.grid]} {layer.chunk_rows} ".encode()
    identity = xxhash.xxh3_128(about + digests.astype("<u8").tobytes()).hexdigest()
    path = cache_root(storage) / "words" / f"{identity}.u16"
    if _problem(path, layer, digests, shown=shown):
        with waiting_lock(lock_file(path), f"file {path} of unpacked words", shown=shown):
            if problem := _problem(path, layer, digests, shown=shown):
                if path.exists():
                    say(f"{path} {problem}: unpacking the words again")
                for old in (path, *leftovers(path, own=True)):
                    old.unlink(missing_ok=True)
                reserve(words_bytes(layer.images, layer.grid), f"the file of unpacked words of {layer.name}", storage)
                # The bar is of the process that unpacks, whichever rank it is.
                with atomic_file(path) as file, Progress("unpack words", len(digests), "chunks") as progress:
                    for chunk, digest in enumerate(digests.tolist()):
                        file.write(np.ascontiguousarray(layer.read_chunk(chunk, digest), "<u2").data)
                        progress.advance()
    if not is_as_recorded(path):
        with suppress(OSError):  # another user's cache can still be read
            write_record(path)
    return FlatWords(path, layer)


def _problem(path: Path, layer: Layer | JoinedLayer, digests: NDArray[np.uint64], *, shown: bool) -> str | None:
    """What is wrong with the file, by its size and its words."""
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    if size_bytes != (whole := words_bytes(layer.images, layer.grid)):
        return f"has {size_bytes} bytes, not {whole}"
    words_NM = FlatWords(path, layer).words_NM
    with Progress("check unpacked words", len(digests), "chunks", shown=shown and size_bytes > QUIET_BYTES) as progress:
        for chunk, digest in enumerate(digests.tolist()):
            rows = layer.rows(chunk)
            if array_digest(words_NM[rows]) != digest:
                return f"holds other words than the store in rows {rows.start}-{rows.stop - 1}"
            progress.advance()
    return None
