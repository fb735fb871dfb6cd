"""Encoded bytes of given rows.

Legend: B rows of one batch.
"""

import mmap
import os
import re
import resource
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from bowstore.data.image_header import check_before_decoding
from bowstore.data.index import Index
from bowstore.data.table import image_digest
from bowstore.data.tar import BLOCK_BYTES, header_names, plain_name
from bowstore.errors import CorruptError, DataError, MismatchError, MissingError, UsageError
from bowstore.remote import Wanted, hold
from bowstore.remote.cache import check_fits

Tar = TypeVar("Tar")
_PREFIX_BYTE = 345  # of a USTAR header: not zero where a long name is split
_MAX_OPEN = 1024
_FETCH_TRIES = 3
_PAGE = mmap.PAGESIZE
# Where a page fault asks another machine, and a tar cut there kills the process: mount types of /proc/self/mountinfo.
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "9p", "glusterfs", "orangefs"}
_NETWORK |= {"afs", "panfs", "wekafs", "virtiofs", "fuse"}


class ImageSource(Protocol):
    """Whatever gives the encoded bytes of numbered images."""

    def __len__(self) -> int: ...

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Encoded bytes, one uint8 array a row."""
        ...

    def name(self, row: int) -> str:
        """Name of a row for messages: its key or path."""
        ...

    def pixels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many pixels each of the rows has (B,), without decoding."""
        ...


class ShardReader:
    """Rows of an index, from its tars; what `read` returns lies in memory.

    Each read compares the tar header's name with the key and the image's bytes with the index's digest, so that neither
    another sample's bytes nor damaged ones are ever handed out: a flipped bit may change pixels without an error of
    any decoder.

    Two ways, with equal bytes (`storage.read`): memory maps, quickest where the tars lie on a local disk; or one
    `pread` an image by many threads, for network file systems. A tar that somebody cuts short while it is mapped is
    refused at the next read. Only a cut between a read and the use of its bytes, some milliseconds later, still ends
    the process with SIGBUS: with maps that cannot be prevented, while `pread` has copied the bytes by then.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        # As plain arrays, because slices of np.memmap cost several times as much.
        self._shard, self._offset, self._size = map(np.asarray, (index.shard, index.offset, index.size))
        self._digest = np.asarray(index.digest)
        # For an index of an earlier bowstore. No format needs a look at fewer pixels a byte, and photographs have ten.
        self._crowded = np.asarray(index.height).astype(np.int64) * index.width // 64 > self._size
        self._key_start, self._key_bytes = np.asarray(index.key_start), np.asarray(index.key_bytes).data
        self._tars: _MappedTars | _OpenTars
        if read_mode(index) == "mmap":
            self._tars = _MappedTars(index, open_limit(index))
        else:
            self._tars = _OpenTars(index, open_limit(index))

    def __len__(self) -> int:
        return len(self._index)

    def name(self, row: int) -> str:
        """The row's key."""
        return self._index.key(row)

    def pixels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many pixels each of the rows has, from the index."""
        return self._index.height[rows].astype(np.int64) * self._index.width[rows]

    def largest(self) -> tuple[int, int]:
        """The largest height and the largest width of an image, pixels."""
        return int(self._index.height.max()), int(self._index.width.max())

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Encoded bytes of `rows` (B,), read-only.

        Raises:
            MismatchError: the tar holds another member at that place, or ends before it.
            CorruptError: an image's bytes are not those that were indexed.
            MissingError: the tar is gone.
            DataError: the disk or the network fails, or a header claims more pixels than its bytes can tell.
        """
        offsets_B, keys, starts_B = self._offset[rows], self._key_bytes, self._key_start[rows]
        places = [
            _Place(row, shard, header, stop, bytes(keys[key_start:key_stop]) + b".")
            for row, shard, header, stop, key_start, key_stop in zip(
                rows.tolist(),
                self._shard[rows].tolist(),
                (offsets_B - BLOCK_BYTES).tolist(),
                (offsets_B + self._size[rows]).tolist(),
                starts_B.tolist(),
                self._key_start[rows + 1].tolist(),
                strict=True,
            )
        ]
        images = self._tars.read(places)
        for place, image, digest in zip(places, images, self._digest[rows].tolist(), strict=True):
            if image_digest(image.data) != digest:
                raise _damaged(self._index, place)
        for number in np.flatnonzero(self._crowded[rows]).tolist():
            place = places[number]
            check_before_decoding(images[number].data, f"{self.name(place.row)!r} of {_root(self._index, place)}")
        return images


class _Place(NamedTuple):
    """Where a row lies: a block of header from byte `header` of a tar on, then its image up to byte `stop`."""

    row: int
    shard: int
    header: int
    stop: int
    name: bytes  # what the member's name starts with: key and dot


class _MappedTars:
    """Reads through memory maps."""

    def __init__(self, index: Index, limit: int) -> None:
        self._index = index
        self._tar = lru_cache(limit)(partial(_open_tar, index, _MappedTar))

    def read(self, places: Sequence[_Place]) -> list[NDArray[np.uint8]]:
        """Headers and images, touched; then the headers are cut off."""
        found = []
        for place in places:
            tar = self._tar(place.shard)
            if tar.map.size() < place.stop:
                raise _cut(self._index, place, tar.map.size())
            # All of a batch is asked for before the first byte is waited for: 27 pages an image, read one by one, and
            # image after image, make a disk ten times slower than it is.
            page = place.header & -_PAGE
            tar.map.madvise(mmap.MADV_WILLNEED, page, place.stop - page)
            found.append(tar.bytes[place.header : place.stop])
        touch(found)
        for place, block in zip(places, found, strict=True):
            _check_name(self._index, place, block[:BLOCK_BYTES].tobytes())
        return [block[BLOCK_BYTES:] for block in found]


class _MappedTar:
    """A tar in a memory map; unmapped once nothing refers to it."""

    def __init__(self, descriptor: int) -> None:
        self.map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self.map.madvise(mmap.MADV_RANDOM)
        self.bytes = np.frombuffer(self.map, dtype=np.uint8)
        os.close(descriptor)  # the map has its own


class _OpenTars:
    """Reads by `pread`: at once what the kernel has, the rest by many threads.

    Where a read is a question to another machine, waiting is what takes the time.
    """

    def __init__(self, index: Index, limit: int) -> None:
        self._index, self._at_once = index, index.storage.read_threads
        self._tar = lru_cache(limit)(partial(_open_tar, index, _OpenTar))
        self._threads = ThreadPoolExecutor(self._at_once, "read")

    def read(self, places: Sequence[_Place]) -> list[NDArray[np.uint8]]:
        """Headers and images, by one read each; then the headers are cut off."""
        tars = [self._tar(place.shard) for place in places]  # not closed before the end
        found = [np.empty(place.stop - place.header, np.uint8) for place in places]
        missing = [n for n, place in enumerate(places) if not _read_cached(tars[n].descriptor, found[n], place.header)]
        todo = iter(missing)  # shared: each thread takes the next

        def work() -> None:
            for number in todo:
                self._fill(tars[number].descriptor, found[number], places[number])

        for done in [self._threads.submit(work) for _ in range(min(self._at_once, len(missing)))]:
            done.result()
        for place, block in zip(places, found, strict=True):
            _check_name(self._index, place, block[:BLOCK_BYTES].tobytes())
        return [block[BLOCK_BYTES:] for block in found]

    def _fill(self, descriptor: int, block: NDArray[np.uint8], place: _Place) -> None:
        buffer, done = block.data, 0
        try:
            while done < len(buffer):
                got = os.preadv(descriptor, [buffer[done:]], place.header + done)
                if not got:
                    raise _cut(self._index, place, os.fstat(descriptor).st_size)
                done += got
        except OSError as error:
            path = self._index.tar_path(place.shard)
            raise DataError(
                f"shard {path} cannot be read at byte {place.header} ({error.strerror}); check the disk or the mount"
            ) from error


def _read_cached(descriptor: int, block: NDArray[np.uint8], start: int) -> bool:
    """Read without waiting; False where that gives not all of it, or the file system cannot."""
    try:
        return os.preadv(descriptor, [block.data], start, os.RWF_NOWAIT) == len(block)
    except OSError:
        return False


class _OpenTar:
    """An open tar; closed once nothing refers to it, so that no thread reads from a number that went to another."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def _open_tar(index: Index, kind: Callable[[int], Tar], shard: int) -> Tar:
    """Open a tar that has the recorded size."""
    entry, folder = index.shards[shard], index.folder(shard)
    for _ in range(_FETCH_TRIES):
        path = index.tar_path(shard)
        try:
            descriptor = os.open(path, os.O_RDONLY)
            break
        except FileNotFoundError:  # of a remote set: another process has just made room in the cache
            continue
    else:
        raise MissingError(f"shard {path} is gone; restore it, or run `bowstore index {folder.root}`")
    try:
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes != entry.size_bytes:
            raise MismatchError(
                f"shard {path} has {size_bytes} bytes, the index says {entry.size_bytes}: it changed after indexing; "
                f"restore it, or run `bowstore index {folder.root}`"
            )
        if folder.remote:
            hold(descriptor)
        # Images are read in random order: what the kernel would read around one is of no use.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return kind(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def _root(index: Index, place: _Place) -> Path:
    return index.folder(place.shard).root


def _cut(index: Index, place: _Place, size_bytes: int) -> MismatchError:
    return MismatchError(
        f"shard {index.tar_path(place.shard)} ends at byte {size_bytes}, within image {index.key(place.row)!r} (to "
        f"byte {place.stop}): it was cut while in use; restore it, or run `bowstore index {_root(index, place)}`"
    )


def _damaged(index: Index, place: _Place) -> CorruptError:
    root = _root(index, place)
    return CorruptError(
        f"image {index.key(place.row)!r} in shard {index.tar_path(place.shard)} (bytes {place.header + BLOCK_BYTES}-"
        f"{place.stop - 1}) differs from its digest in the index: it was damaged or changed after indexing; run "
        f"`bowstore verify --repair {root}`, which says how to go on, or `bowstore index {root}` if the "
        f"change was meant"
    )


def _check_name(index: Index, place: _Place, header: bytes) -> None:
    """Compare a tar header (first 512 bytes; more may follow) with the row's key."""
    if header.startswith(place.name) and not header[_PREFIX_BYTE]:
        return
    if not header_names(header, place.name):
        found = plain_name(header).decode(errors="replace")
        raise MismatchError(
            f"shard {index.tar_path(place.shard)} holds {found!r} at byte {place.header + BLOCK_BYTES}, the index says "
            f"{index.key(place.row)!r}: the tar changed after indexing; run `bowstore index {_root(index, place)}`"
        )


def fetched(index: Index, *, images: int | None = None, whole: bool = False, display: bool = True) -> Index:
    """The same index, once the tars of a remote data set are here.

    Args:
        index: local or remote.
        images: only its first so many rows will be read.
        whole: refuse a set that exceeds the cache's bound, because its rows will be read in random order; otherwise
            its tars come one after the other, when they are read.
        display: whether to show progress.

    Raises:
        UsageError: with `whole`, the set exceeds the bound.
        BowstoreError: a tar cannot be fetched.
    """
    left = int(index.shard[(images or len(index)) - 1]) + 1
    wanted = []
    for folder in index.folders:
        if folder.remote and left > 0:
            wanted.append((folder.remote, folder.shards[:left]))
        left -= len(folder.shards)
    total = sum(entry.size_bytes for _, entries in wanted for entry in entries)
    if whole:  # each alone may fit, and push the others out
        check_fits(total, f"data set {', '.join(remote.url for remote, _ in wanted)}", index.storage)
    if whole or total <= _cache_bytes(index):
        for remote, entries in wanted:
            files = {entry.name: Wanted(entry.size_bytes, entry.digest) for entry in entries}
            remote.fetch_all(files, f"data set {remote.url}", display=display)
    return index


def _remote_sizes(index: Index) -> list[int]:
    return [entry.size_bytes for folder in index.folders if folder.remote for entry in folder.shards]


def _cache_bytes(index: Index) -> float:
    return index.storage.cache_gb * 1e9


def read_mode(index: Index) -> Literal["mmap", "pread"]:
    """How the tars of an index are read: as set, or by where they lie."""
    if sum(_remote_sizes(index)) > _cache_bytes(index):
        return "pread"  # copies come and go, and a map in use keeps the space of one that went
    if index.storage.read != "auto":
        return index.storage.read
    return "pread" if any(is_network(folder.root) for folder in index.folders) else "mmap"


def is_network(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether a folder lies on a network file system (or in a user process: FUSE), by the kernel's table of mounts."""
    place, best, kind = folder.resolve(), -1, ""
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        fields, _, file_system = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields.split()[4]))
        # Mounts at the same point cover each other: the last one counts.
        if place.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), file_system.split()[0]
    return kind in _NETWORK or kind.startswith("fuse.")


def open_limit(index: Index) -> int:
    """How many tars may be open at once: below the process's limit, and of a remote set below the cache's bound.

    Raises:
        UsageError: the cache does not even hold what is read at once.
    """
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit = _MAX_OPEN if allowed == resource.RLIM_INFINITY else min(_MAX_OPEN, allowed // 2)
    bound, sizes = _cache_bytes(index), _remote_sizes(index)
    if sum(sizes) <= bound:
        return limit
    # Open copies cannot be removed, and one more is on its way.
    limit = min(limit, int(bound // max(sizes)) - 1)
    if limit < 2:
        raise UsageError(
            f"{index.place} has shards of {max(sizes) / 1e6:.2f} MB, and storage.cache_gb "
            f"{index.storage.cache_gb:g} holds fewer than three of them; raise it"
        )
    return limit


def touch(arrays: Iterable[NDArray[np.uint8]]) -> None:
    """Fault in the pages behind memory-mapped arrays, so that the disk waits in the calling thread.

    `take` is for the other threads: it lets go of the interpreter's lock, which a sum over so few bytes does not.
    """
    for array in filter(len, arrays):
        array.take(np.arange(0, len(array) + _PAGE - 1, _PAGE), mode="clip")
