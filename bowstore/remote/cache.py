"""The folder of local copies: where it lies, which copies are in use, and how it keeps below its bound.

    <root>/remote/<folder's name and hash>/<file>          a copy, whole
                                          .<file>.json     its record: what it is a copy of, and how it was left
                                          .<file>.lock     held while it is brought
                                          .<file>.tmp-...  what has arrived of it
                                          <id>.zarr/       a copy of a word store, whole
                                          .<id>.zarr.json  its record: the names of its files
                                          .<id>.zarr.part/ what has arrived of it
    <root>/words/<file>                                    unpacked words, made again where they are missing
    <root>/words/.<file>.json                              their record
    <root>/features/<file>                                 features of a network, taken again where they are missing
    <root>/features/.<file>.json                           their record

The root may be a folder in which people keep other things. Nothing is removed that has no record, or is no longer as
the record says, or holds a file that the record does not name; none of that counts towards the bound either.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from bowstore.config import StorageConfig
from bowstore.errors import BowstoreError, BusyError, CorruptError, UsageError
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

_REMOTE, _WORDS, _FEATURES = "remote", "words", "features"
STORE_SUFFIX, PART_SUFFIX = ".zarr", ".zarr.part"
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


def copies_folder(storage: StorageConfig) -> Path:
    """The folder below the cache that holds the copies of remote folders."""
    return cache_root(storage) / _REMOTE


def features_folder(storage: StorageConfig) -> Path:
    """The folder below the cache that holds features of networks."""
    return cache_root(storage) / _FEATURES


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
        total, free = _taken(root), shutil.disk_usage(root).free
        if total + needed <= bound and needed <= free:
            return
        for _, copy in sorted(_copies(root)):
            if copy in keep:
                continue
            freed = _size_of(copy)
            if _remove(copy):
                total, free = total - freed, free + freed
            if total + needed <= bound and needed <= free:
                return
    if total + needed <= bound:
        return  # that the disk is full of other things is told by whoever writes
    raise BowstoreError(
        f"{what} needs {_size(needed)}, and {_size(total)} of the {storage.cache_gb:g} GB that the cache {root} may "
        f"hold are in use; wait for the other runs to end, or {_REMEDY}"
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


def write_record(path: Path, *, of: Path | None = None, **what: Any) -> None:
    """Record that a copy is bowstore's, and how it is left.

    Args:
        path: the copy.
        of: the file that will have that name, written before it gets it so that no copy is ever without a record.
        what: what else is known of it.
    """
    write_json(record_file(path), {**_state(of or path), **what})


def write_store_record(copy: Path, names: Iterable[str]) -> None:
    """Record that the copy of a word store is bowstore's, and the names of its files."""
    write_json(record_file(copy), {"files": sorted(names)})


def read_record(path: Path) -> dict[str, Any]:
    """What is recorded at a copy's name, whatever lies there now; nothing where nothing is."""
    try:
        record = read_json(record_file(path))
    except (FileNotFoundError, CorruptError):
        return {}
    return record if isinstance(record, dict) else {}


def is_as_recorded(path: Path) -> bool:
    """Whether a file is the one that was recorded, and nobody has written to it since."""
    try:
        return read_record(path).items() >= _state(path).items()
    except FileNotFoundError:
        return False


def _state(path: Path) -> dict[str, int]:
    """What changes when somebody writes into a file; of a link its own."""
    found = path.lstat()
    return {"size_bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def _is_ours(path: Path) -> bool:
    """Whether something below `remote`, `words` or `features` is bowstore's, and all of it."""
    if temporary_stem(path):
        return True
    final = _final(path)
    if final != path or path.name.endswith(STORE_SUFFIX):
        names = read_record(final).get("files")
        return isinstance(names, list) and not path.is_symlink() and names_below(path) <= set(names)
    return is_as_recorded(path)


def _final(path: Path) -> Path:
    """The copy that something which is not whole is to become; a copy itself."""
    partial = path.name.startswith(".") and path.name.endswith(PART_SUFFIX)
    return path.with_name(path.name[1:].removesuffix(".part")) if partial else path


def names_below(folder: Path) -> set[str]:
    """Names of the files in the copy of a word store, but for those that are on their way."""
    found = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix() for path in found if not temporary_stem(path)}


def _files(path: Path) -> Iterator[os.stat_result]:
    """What the disk says of a file, or of all files below a folder; those that vanish meanwhile are left out."""
    for parent, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                yield Path(parent, name).lstat()
    if not path.is_dir():
        with suppress(FileNotFoundError):
            yield path.lstat()


def _size_of(place: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(stat.st_size for stat in _files(place))


def _taken(root: Path) -> int:
    """Bytes that the bound is about: what bowstore keeps below the root."""
    return sum(_size_of(path) for path in _entries(root) if _is_kept(path))


def _is_kept(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return _is_ours(path)
    return False


def _entries(root: Path) -> Iterator[Path]:
    """What may be a copy, or on its way to become one."""
    for path in (*root.glob(f"{_REMOTE}/*/*"), *root.glob(f"{_WORDS}/*"), *root.glob(f"{_FEATURES}/*")):
        if not path.name.startswith(".") or temporary_stem(path) or path.name.endswith(PART_SUFFIX):
            yield path


def _copies(root: Path) -> Iterator[tuple[int, Path]]:
    """What may be removed, whole copies and what dead writers left: when it was last used, and its path."""
    for path in _entries(root):
        with suppress(FileNotFoundError, NotADirectoryError):
            if _is_ours(path):
                yield _handle(path).stat().st_atime_ns, path


def _handle(path: Path) -> Path:
    """The file that stands for a copy: it carries the access time and the lock."""
    whole_store = path.name.endswith(STORE_SUFFIX) and not path.name.startswith(".")
    return path / "zarr.json" if whole_store else path


def _remove(path: Path) -> bool:
    """Remove a copy that nobody uses; return whether it is gone."""
    if path.name.startswith("."):  # not whole: its writer holds the lock of its final name
        stem = temporary_stem(path)
        try:
            with exclusive_lock(lock_file(path.with_name(stem) if stem else _final(path)), str(path)):
                if stem and not is_leftover(path):
                    return False
                _discard(path)
        except (BusyError, FileNotFoundError):
            return False
        return True
    try:
        descriptor = os.open(_handle(path), os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    except OSError:  # another user's
        return False
    try:
        if not try_lock(descriptor, path.parent):
            return False
        _discard(path)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _discard(path: Path) -> None:
    if temporary_stem(path) or not path.is_dir():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        record_file(path).unlink(missing_ok=True)
        return
    gone = path
    if not path.name.startswith("."):  # whoever looks for the copy finds all of it or nothing
        gone = temporary_path(path)
        path.rename(gone)
    shutil.rmtree(gone)
    record_file(_final(path)).unlink(missing_ok=True)


def lock_file(path: Path) -> Path:
    """The lock of a copy's writer."""
    return path.with_name(f".{path.name}.lock")


def record_file(path: Path) -> Path:
    """The file that says what a copy is a copy of."""
    return path.with_name(f".{path.name}.json")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.2f} MB"
