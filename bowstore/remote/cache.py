"""The folder of local copies: where it lies, which copies are in use, and how it keeps below its bound.

    <root>/remote/<folder's name and hash>/<file>          a copy, whole
                                          .<file>.json     what it is a copy of
                                          .<file>.lock     held while it is brought
                                          .<file>.tmp-PID  what has arrived of it
                                          <id>.zarr/       a copy of a word store, whole
                                          .<id>.zarr.part/ what has arrived of it
    <root>/words/<file>                                    unpacked words, made again where they are missing
    <root>/writing/<folder's name and hash>/               a word store that is written and not uploaded yet

What else than copies and words lies below the root counts towards the bound and is left alone: nothing else has what a
store has that is not uploaded yet.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, BusyError, UsageError
from bowstore.files import TEMPORARY_MARK, exclusive_lock, waiting_lock

_REMOTE, _WORDS, _WRITING = "remote", "words", "writing"
STORE_SUFFIX, PART_SUFFIX = ".zarr", ".zarr.part"
_REMEDY = "raise storage.cache_gb, or name a folder on a larger disk in storage.cache"


class _Copy(NamedTuple):
    """Something that can be removed: a file or a folder, and when it was last used."""

    used_ns: int
    path: Path


def cache_root(storage: StorageConfig) -> Path:
    """The cache: as configured, or `$BOWSTORE_CACHE`, or `~/.cache/bowstore`."""
    default = os.environ.get("BOWSTORE_CACHE") or Path.home() / ".cache" / "bowstore"
    return Path(storage.cache or default).expanduser()


def copies_folder(storage: StorageConfig) -> Path:
    """The folder below the cache that holds the copies of remote folders."""
    return cache_root(storage) / _REMOTE


def writing_folder(storage: StorageConfig) -> Path:
    """The folder below the cache that holds the word stores that are written and not uploaded yet."""
    return cache_root(storage) / _WRITING


def mark_used(path: Path) -> None:
    """Record that a copy is used now, as its access time; many disks are mounted so as not to keep it themselves."""
    with suppress(OSError):  # a cache that others own can be read
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def hold(descriptor: int) -> None:
    """Keep the copy behind an open file from being removed for as long as the file, or a map of it, stays open.

    A lock of the kernel's, so that a process that dies lets go. Where the file system has none, a copy that is
    removed under a reader stays valid for it (the last open file keeps the bytes), but its space is not freed.
    """
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def check_fits(size_bytes: int, what: str, storage: StorageConfig) -> None:
    """Refuse what can never fit.

    Raises:
        UsageError: `size_bytes` are more than the cache may hold.
    """
    if size_bytes > storage.cache_gb * 1e9:
        raise UsageError(
            f"{what} has {_size(size_bytes)}, and the cache {cache_root(storage)} may hold {storage.cache_gb:g} GB; "
            f"{_REMEDY}"
        )


def make_room(needed: int, what: str, storage: StorageConfig, *, keep: Collection[Path] = ()) -> None:
    """Remove the copies that were not used for longest until `needed` more bytes fit below the bound and on the disk.

    The bound holds for whole copies; what several processes bring at the same moment may exceed it by one each.

    Args:
        needed: bytes.
        what: what they are for, for messages.
        storage: the cache and its bound.
        keep: copies that stay.

    Raises:
        UsageError: they can never fit.
        BowstoreError: the rest of the cache is in use.
    """
    check_fits(needed, what, storage)
    bound, root = int(storage.cache_gb * 1e9), cache_root(storage)
    with waiting_lock(root / ".room.lock", f"cache {root}", shown=False):
        total, free = _size_of(root), shutil.disk_usage(root).free
        if total + needed <= bound and needed <= free:
            return
        for copy in sorted(_copies(root)):
            if copy.path in keep:
                continue
            freed = _freed_by(copy.path)
            if _remove(copy.path):
                total, free = total - freed, free + freed
            if total + needed <= bound and needed <= free:
                return
    if total + needed <= bound:
        return  # that the disk is full of other things is told by whoever writes
    written = _size_of(writing_folder(storage))
    of_them = f" ({_size(written)} by stores in {root / _WRITING} that are not uploaded yet)" if written else ""
    raise BowstoreError(
        f"{what} needs {_size(needed)}, and {_size(total)} of the {storage.cache_gb:g} GB that the cache {root} may "
        f"hold are in use{of_them}; wait for the other runs to end, or {_REMEDY}"
    )


def reserve(needed: int, what: str, storage: StorageConfig, *, keep: Collection[Path] = ()) -> None:
    """`make_room` for a copy, and refuse it if the disk has none.

    Raises:
        UsageError: it can never fit below the bound.
        BowstoreError: the rest of the cache is in use, or the disk is full of other things.
    """
    make_room(needed, what, storage, keep=keep)
    root = cache_root(storage)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise BowstoreError(
            f"{what} needs {_size(needed)}, and the disk of the cache {root} has {_size(free)} free; free some, or "
            f"name a folder on a larger disk in storage.cache"
        )


def _files(folder: Path) -> Iterator[os.stat_result]:
    """What the disk says of all files below a folder; those that vanish meanwhile are left out."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                yield Path(parent, name).lstat()


def _size_of(folder: Path) -> int:
    """Bytes of all files below a folder; a file that has several names counts once."""
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in _files(folder)}.values())


def _freed_by(copy: Path) -> int:
    """Bytes that go with a copy; files that it shares (with a store that is written, or an older copy) stay."""
    if copy.is_dir():
        return sum(stat.st_size for stat in _files(copy) if stat.st_nlink == 1)
    with suppress(FileNotFoundError):
        return copy.stat().st_size
    return 0


def _copies(root: Path) -> Iterator[_Copy]:
    """What may be removed: whole copies, and what dead writers left."""
    for path in (*root.glob(f"{_REMOTE}/*/*"), *root.glob(f"{_WORDS}/*")):
        whole = not path.name.startswith(".")
        if whole or TEMPORARY_MARK in path.name or path.name.endswith(PART_SUFFIX):
            with suppress(FileNotFoundError):
                yield _Copy(_handle(path).stat().st_atime_ns, path)


def _handle(path: Path) -> Path:
    """The file that stands for a copy: it carries the access time and the lock."""
    return path / "zarr.json" if path.name.endswith(STORE_SUFFIX) else path


def _remove(path: Path) -> bool:
    """Remove a copy that nobody uses; return whether it is gone."""
    if path.name.startswith("."):  # not whole: its writer holds the lock of its final name
        final = path.name[1:].split(TEMPORARY_MARK)[0].removesuffix(".part")
        try:
            with exclusive_lock(lock_file(path.with_name(final)), str(path)):
                _discard(path)
        except BusyError:
            return False
        return True
    try:
        descriptor = os.open(_handle(path), os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:  # another user's
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _discard(path)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _discard(path: Path) -> None:
    if not path.is_dir():
        record_file(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return
    gone = path
    if not path.name.startswith("."):  # whoever looks for the copy finds all of it or nothing
        gone = path.with_name(f".{path.name}{TEMPORARY_MARK}{os.getpid()}")
        path.rename(gone)
    shutil.rmtree(gone)


def lock_file(path: Path) -> Path:
    """The lock of a copy's writer."""
    return path.with_name(f".{path.name}.lock")


def record_file(path: Path) -> Path:
    """The file that says what a copy is a copy of."""
    return path.with_name(f".{path.name}.json")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.2f} MB"
