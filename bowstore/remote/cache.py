"""The folder of local copies: where it lies, which copies are in use, and how it keeps below its bound.

    <root>/remote/<folder's name and hash>/<copy>         of a file, whole; of a word store, a folder <id>.zarr
                                          .<copy>.json    its record: what it is a copy of, and how it was left
                                          .<copy>.lock    held while it is brought
                                          .<copy>.part    what has arrived of it
    <root>/words/<file>                                    unpacked words, made again where they are missing
    <root>/words/.<file>.json                              their record
    <root>/features/<file>                                 features of a network, taken again where they are missing
    <root>/features/.<file>.json                           their record

The root may be a folder in which people keep other things. Nothing is removed that has no record, or is no longer as
the record says, of a folder by the number and length of its files; none of that counts towards the bound either.
"""

import fcntl
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, CorruptError, UsageError
from bowstore.files import (
    exclusive_lock,
    is_leftover,
    read_json,
    temporary_path,
    temporary_stem,
    try_lock,
    waiting_lock,
    write_json,
)

_PART_SUFFIX, _LOCK_SUFFIX = ".part", ".lock"
_REMEDY = "raise storage.cache_gb, or name a folder on a larger disk in storage.cache"


def cache_root(storage: StorageConfig) -> Path:
    """The cache: as configured, or `$BOWSTORE_CACHE`, or `~/.cache/bowstore`.

    Raises:
        UsageError: it lies in a home directory that nobody knows.
    """
    place = Path(storage.cache or os.environ.get("BOWSTORE_CACHE") or "~/.cache/bowstore")
    try:
        return place.expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"the cache {place} cannot be found: this user has no home directory; name a folder in storage.cache or "
            f"BOWSTORE_CACHE, or set HOME"
        ) from error


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


def reserve(size_bytes: int, what: str, storage: StorageConfig, *, arrived: Path | None = None) -> None:
    """Remove the copies that were not used for longest until a new one fits below the bound and on the disk.

    The bound holds for whole copies; what several processes bring at the same moment may exceed it by one each.

    Args:
        size_bytes: of the new copy.
        what: what it is, for messages.
        storage: the cache and its bound.
        arrived: what is here of it already.

    Raises:
        UsageError: it can never fit below the bound.
        BowstoreError: the rest of the cache is in use, or the disk is full of other things.
    """
    check_fits(size_bytes, what, storage)
    bound, root = int(storage.cache_gb * 1e9), cache_root(storage)
    needed = max(0, size_bytes - (_state(arrived)["size_bytes"] if arrived and arrived.exists() else 0))
    with waiting_lock(root / ".room.lock", f"cache {root}", shown=False):
        copies = sorted(_copies(root))
        total = sum(taken for _, taken, _ in copies)
        for _, taken, copy in copies:
            if total + needed <= bound and needed <= shutil.disk_usage(root).free:
                return
            if _remove(copy):
                total -= taken
        free = shutil.disk_usage(root).free
    if total + needed > bound:
        raise BowstoreError(
            f"{what} needs {_size(needed)}, and {_size(total)} of the {storage.cache_gb:g} GB that the cache {root} "
            f"may hold are in use; wait for the other runs to end, or {_REMEDY}"
        )
    if needed > free:
        raise BowstoreError(
            f"{what} needs {_size(needed)}, and the disk of the cache {root} has {_size(free)} free; free some, or "
            f"name a folder on a larger disk in storage.cache"
        )


def write_record(path: Path, *, of: Path | None = None, **what: Any) -> None:
    """Record that a copy is bowstore's, and how it is left.

    Args:
        path: the copy.
        of: the file that will have that name, written before it gets it so that no copy is ever without a record.
        what: what else is known of it.
    """
    write_json(record_file(path), {**_state(of or path), **what})


def read_record(path: Path) -> dict[str, Any]:
    """What is recorded at a copy's name, whatever lies there now; nothing where nothing is."""
    try:
        record = read_json(record_file(path))
    except (FileNotFoundError, CorruptError):
        return {}
    return record if isinstance(record, dict) else {}


def is_as_recorded(path: Path, **what: Any) -> bool:
    """Whether a copy is the one that was recorded, with all of this, and nobody has written to it since."""
    try:
        return read_record(path).items() >= {**_state(path), **what}.items()
    except FileNotFoundError:
        return False


def _state(path: Path) -> dict[str, int]:
    """What changes when somebody writes into a file, or puts one into a folder; of a link its own."""
    if path.is_symlink() or not path.is_dir():
        found = path.lstat()
        return {"size_bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
    sizes = [file.lstat().st_size for file in path.rglob("*") if not file.is_dir()]
    return {"files": len(sizes), "size_bytes": sum(sizes)}


def _copies(root: Path) -> Iterator[tuple[int, int, Path]]:
    """What is bowstore's, whole copies and what is on its way: when it was last used (ns), its bytes, and its path."""
    for path in itertools.chain.from_iterable(map(root.glob, ("remote/*/*", "words/*", "features/*"))):
        with suppress(FileNotFoundError, NotADirectoryError):
            # Of what has arrived of a copy: nobody else puts a lock beside it.
            is_part = path.match(f".*{_PART_SUFFIX}") and path.with_suffix(_LOCK_SUFFIX).exists()
            if temporary_stem(path) or is_part or (path.name[0] != "." and is_as_recorded(path)):
                yield _handle(path).stat().st_atime_ns, _state(path)["size_bytes"], path


def _handle(path: Path) -> Path:
    """The file that stands for a copy: it carries the access time and the lock."""
    return path if path.is_file() or path.name.startswith(".") else path / "zarr.json"


def _remove(path: Path) -> bool:
    """Remove a copy that nobody uses; return whether it is gone."""
    with suppress(BowstoreError, OSError), ExitStack() as stack:
        if temporary_stem(path):
            if not is_leftover(path):
                return False
        elif path.name.startswith("."):  # its writer holds the lock
            stack.enter_context(exclusive_lock(path.with_suffix(_LOCK_SUFFIX), str(path)))
        else:
            descriptor = os.open(_handle(path), os.O_RDWR | os.O_NOFOLLOW)
            stack.callback(os.close, descriptor)
            if not try_lock(descriptor, path.parent):
                return False
        if not path.is_dir():
            path.unlink(missing_ok=True)
        else:  # whoever looks for the copy finds all of it or nothing
            gone = temporary_path(path)
            path.rename(gone)
            shutil.rmtree(gone)
        record_file(path).unlink(missing_ok=True)
        return True
    return False


def part_of(path: Path) -> Path:
    """Where a copy arrives, for the holder of its lock."""
    return path.with_name(f".{path.name}{_PART_SUFFIX}")


def lock_file(path: Path) -> Path:
    """The lock of a copy's writer."""
    return path.with_name(f".{path.name}{_LOCK_SUFFIX}")


def record_file(path: Path) -> Path:
    """The file that says what a copy is a copy of."""
    return path.with_name(f".{path.name}.json")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.2f} MB"
