"""Encoded bytes of given rows.

Legend: B rows of one batch.
"""

import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from bowstore.data.index import Index
from bowstore.data.tar import BLOCK_BYTES
from bowstore.errors import MismatchError, MissingError

T = TypeVar("T")
_NAME_BYTES = 100  # of a USTAR header; longer names are split over the prefix field
_PREFIX = slice(345, 500)


class ImageSource(Protocol):
    """Whatever gives the encoded bytes of numbered images."""

    def __len__(self) -> int: ...

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Encoded bytes, one uint8 array a row."""
        ...

    def name(self, row: int) -> str:
        """Name of a row for messages: its key or path."""
        ...


class ShardReader:
    """Rows of an index, read through memory maps of its tars.

    Each read compares the tar header's name with the key, so that bytes of another sample are never handed out.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._maps: list[NDArray[np.uint8] | None] = [None] * len(index.shards)

    def __len__(self) -> int:
        return len(self._index)

    def name(self, row: int) -> str:
        """The row's key."""
        return self._index.key(row)

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Encoded bytes of `rows` (B,), views into the memory maps.

        Raises:
            MismatchError: the tar holds another member at that place.
        """
        index = self._index
        shards, offsets, sizes = index.shard[rows], index.offset[rows], index.size[rows]
        result = []
        for row, shard, offset, size in zip(
            rows.tolist(), shards.tolist(), offsets.tolist(), sizes.tolist(), strict=True
        ):
            data = self._maps[shard]
            if data is None:
                data = self._maps[shard] = _map_file(index.root / index.shards[shard].name)
            self._check_name(data, row, offset)
            result.append(data[offset : offset + size])
        return result

    def _check_name(self, data: NDArray[np.uint8], row: int, offset: int) -> None:
        header = data[offset - BLOCK_BYTES : offset].tobytes()
        name = header[:_NAME_BYTES].rstrip(b"\0")
        prefix = header[_PREFIX].rstrip(b"\0") if header[257:263] == b"ustar\0" else b""
        found = prefix + b"/" + name if prefix else name
        start, stop = self._index.key_start[row], self._index.key_start[row + 1]
        key = self._index.key_bytes[start:stop].tobytes()
        # A GNU or PAX long name leaves only its first 100 bytes in the plain header.
        if not found.startswith(key + b".") and not (len(found) >= _NAME_BYTES and key.startswith(found)):
            shard = self._index.shards[self._index.shard[row]].name
            raise MismatchError(
                f"shard {self._index.root / shard} holds {found.decode(errors='replace')!r} at byte {offset}, the "
                f"index says {key.decode()!r}: the tar changed after indexing; run `bowstore index {self._index.root}`"
            )


class FileReader:
    """Images that lie as files, in the order given (evaluation sets)."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, row: int) -> str:
        """The row's path."""
        return str(self._paths[row])

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Encoded bytes of `rows` (B,).

        Raises:
            MissingError: a file is gone.
        """
        try:
            return [np.fromfile(self._paths[row], dtype=np.uint8) for row in rows.tolist()]
        except FileNotFoundError as error:
            raise MissingError(f"no image {error.filename}; is the data set complete?") from error


def _map_file(path: Path) -> NDArray[np.uint8]:
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype=np.uint8)


def touch(arrays: Iterable[NDArray[np.uint8]]) -> None:
    """Fault in the pages behind memory-mapped arrays, so that the disk waits in the calling thread."""
    for array in arrays:
        array[:: mmap.PAGESIZE].sum()


def prefetched(jobs: Iterable[Callable[[], T]], depth: int) -> Iterator[T]:
    """Run each job in one background thread, keeping up to `depth` results ready, in order."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
