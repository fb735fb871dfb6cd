"""Files that are whole or absent: atomic writes, digests, locks.

Bytes get safely under a final name by a temporary name beside it, fsync, rename, fsync of the folder. `kill -9` leaves
at most a temporary file, which `sweep_temporary` removes.

A temporary name says who made it and proves it: the final name, then machine, process, the process's start, random
digits, and a digest over all of that. So nothing that a user named is ever taken for a leftover, however much it looks
like one, and nobody can lay a link where the next temporary file will be.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import xxhash

from bowstore.errors import BowstoreError, BusyError, CorruptError, MissingError, UsageError
from bowstore.progress import say

TEMPORARY_MARK = ".tmp-"
_TEMPORARY = re.compile(
    rf"(?P<signed>\.(?P<stem>.+){TEMPORARY_MARK}(?P<machine>[0-9a-f]{{8}})-(?P<pid>[0-9]+)-(?P<started>[0-9]+)-[0-9a-f]{{8}})"
    r"-(?P<digest>[0-9a-f]{16})",
    re.DOTALL,
)
_STEM_BYTES = 180  # of the final name in a temporary one: names have 255 at most
# Of another machine nobody can tell whether a process lives; none goes on after a week without a byte.
_SILENT_SECONDS = 7 * 24 * 3600
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OWNER = re.compile(rb"process [0-9]+ on [^\n]*")
_MOVE_AWAY = "move it away, or name another folder"
_WITHOUT_LOCKS: set[int] = set()  # devices of which the user was told


def fsync_path(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no fsync of folders: they make names durable themselves, or nothing does.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there; their names are on the disk, too."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        fsync_path(folder.parent)


def open_new(path: Path) -> IO[bytes]:
    """Open a file for writing that is not there yet; what a link points to is never written.

    Raises:
        FileExistsError: something, a link included, has that name.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def open_end(path: Path) -> IO[bytes]:
    """Open a file for writing at its end; made where there is none.

    Raises:
        BowstoreError: it is a link, has a second name, or is no plain file: other files would be written.
    """
    return os.fdopen(_open_own(path, os.O_WRONLY | os.O_APPEND), "ab")


def _open_lock(path: Path) -> tuple[int, bool]:
    """A lock's file, and whether it may be written: a lock needs no more than to be open."""
    try:
        descriptor = _open_own(path, os.O_RDWR, any_names=True)
        return descriptor, os.fstat(descriptor).st_nlink <= 1
    except PermissionError:
        if path.exists():
            return _open_own(path, os.O_RDONLY, any_names=True), False
        raise


def _open_own(path: Path, flags: int, *, any_names: bool = False) -> int:
    """Open a file of bowstore's at a name that is known beforehand, so that anything may lie there."""
    try:
        # Without O_NONBLOCK a named pipe would be waited for.
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        what = {errno.ELOOP: "a link", errno.ENXIO: "no plain file"}.get(error.errno or 0)
        if what is None:
            raise
        raise BowstoreError(f"{path} is {what}, and bowstore writes there; {_MOVE_AWAY}") from error
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and (any_names or found.st_nlink <= 1):
        return descriptor
    os.close(descriptor)
    what = f"a file with {found.st_nlink} names" if stat.S_ISREG(found.st_mode) else "no plain file"
    raise BowstoreError(f"{path} is {what}, and bowstore writes there; {_MOVE_AWAY}")


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file that takes the name `path` when the block ends without an error.

    On an error (a full disk, an interrupt) the temporary file is removed and `path` keeps what it held. A link at
    `path` is replaced, not followed.

    Args:
        path: the final name.
        durable: whether the file is forced to the disk; False where making it again costs less than that.
    """
    temporary = temporary_path(path)
    try:
        file = open_new(temporary)
        try:
            with file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        # No user knows the temporary name, and a write that did not fit tells no name at all.
        if error.filename == str(temporary) or (error.filename is None and error.errno in _NO_ROOM):
            error.filename = str(path)
        raise
    if durable:
        fsync_path(path.parent)


def check_free(out: Path, *, mark: bytes, command: str, example: str) -> None:
    """Refuse a place for a result where something else lies than an earlier result: nothing else is written over.

    Args:
        out: the place.
        mark: what every such result holds.
        command: that writes it.
        example: name for such a file.

    Raises:
        UsageError: a folder, a link, or a file without the mark; or MissingError, no folder to write into.
    """
    if out.is_dir():
        raise UsageError(f"{out} is a folder; name the file to write, for example {out / example}")
    if out.is_symlink():
        raise UsageError(f"{out} is a link; name the file to write itself, or another one")
    if out.exists() and not (out.is_file() and mark in out.read_bytes()):
        raise UsageError(f"{out} is there, and `{command}` did not write it; name another file, or move it away")
    if not out.parent.is_dir():
        raise MissingError(f"no folder {out.parent} to write {out.name} into; make it, or name another file")


_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))


def check_plain_file(path: Path) -> None:
    """Refuse what is no file before it is opened: a pipe would be waited for, and a device may have no end.

    Where there is nothing of that name, or nobody may look, whoever opens it says so.

    Raises:
        CorruptError: says what it is.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a device")
        raise CorruptError(f"{path} is {kind} and not a file; move it away, or restore the file that should be there")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        MissingError: there is no such file.
        CorruptError: the file is not JSON, or no file.
    """
    check_plain_file(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingError(f"no file {path}") from error
    except (ValueError, RecursionError) as error:
        what = f"{path} is not valid JSON ({error}); move it away and run the command that writes it"
        raise CorruptError(what) from error


def temporary_path(path: Path) -> Path:
    """A name beside `path` that is nobody's yet, for a file or folder on its way there."""
    return path.with_name(_temporary_name(path.name, os.getpid()))


def _temporary_name(name: str, pid: int) -> str:
    stem = os.fsdecode(os.fsencode(name)[:_STEM_BYTES])
    signed = f".{stem}{TEMPORARY_MARK}{_machine()}-{pid}-{_started(pid) or 0}-{secrets.token_hex(4)}"
    return f"{signed}-{_digest(signed)}"


def _digest(name: str) -> str:
    return xxhash.xxh3_64_hexdigest(b"bowstore temporary " + os.fsencode(name))


def _parsed(name: str) -> re.Match[str] | None:
    """What a temporary name says; None for every name that this module did not make."""
    match = _TEMPORARY.fullmatch(name)
    return match if match and match["digest"] == _digest(match["signed"]) else None


@cache
def _machine() -> str:
    """Within which process numbers mean the same processes, also after a restart: 8 hex digits."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/etc/machine-id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))  # containers count processes anew
    return xxhash.xxh3_64_hexdigest(" ".join(parts).encode())[:8]


def _started(pid: int) -> int | None:
    """When a process was started, in the kernel's ticks; 0 if it has ended, None if the kernel does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])


def _is_dead(pid: int, started: int) -> bool:
    """Whether the process of this machine that was started then is gone; its number may be another one's by now."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    now = _started(pid)
    return now is not None and now != started


def temporary_stem(path: Path) -> str | None:
    """The final name (the start of a long one) that a temporary file or folder is for; None if it is no such thing."""
    match = _parsed(path.name)
    return match["stem"] if match and not path.is_symlink() else None


def is_leftover(path: Path) -> bool:
    """Whether something is a temporary file or folder of `temporary_path` whose writer is dead."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    match = _parsed(path.name)
    if not match or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return False
    if match["machine"] != _machine():
        return time.time() - found.st_mtime > _SILENT_SECONDS
    return _is_dead(int(match["pid"]), int(match["started"]))


def leftovers(path: Path, *, own: bool = False) -> list[Path]:
    """Temporary files and folders on their way to `path` whose writers are dead.

    Args:
        path: the final name.
        own: also those of this process; for the holder of a lock on `path`.
    """
    stem = os.fsdecode(os.fsencode(path.name)[:_STEM_BYTES])
    found = path.parent.glob(f".{glob.escape(stem)}{TEMPORARY_MARK}*")
    return sorted(
        other for other in found if temporary_stem(other) == stem and (is_leftover(other) or (own and _is_own(other)))
    )


def _is_own(path: Path) -> bool:
    match = _parsed(path.name)
    return match is not None and (match["machine"], int(match["pid"])) == (_machine(), os.getpid())


def sweep_temporary(folder: Path) -> int:
    """Remove temporary files whose writer is dead; return how many."""
    left = [path for path in folder.glob(f".*{TEMPORARY_MARK}*") if is_leftover(path) and path.is_file()]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's bytes, as 32 hex digits (against corruption, not against an adversary)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


@contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[None]:
    """Hold an advisory lock on `path` for the length of the block; the kernel frees it if the process dies.

    The file is told who holds it, unless it holds anything else, has a second name (in a copy of `cp -al`), or may only
    be read: then it is somebody's, and stays as it is.

    Raises:
        BusyError: another live process holds it; the message names its host and process.
        BowstoreError: a symbolic link, or no plain file, lies at `path`.
    """
    make_folder(path.parent)
    descriptor, writable = _open_lock(path)
    try:
        locked = try_lock(descriptor, path.parent)
        found = os.pread(descriptor, 4096, 0)
        ours = _OWNER.fullmatch(found) is not None
        if not locked:
            owner = found.decode(errors="replace") if ours else "another process"
            raise BusyError(f"{what} is in use by {owner}; wait for it to end, or take another name")
        if writable and (ours or not found):
            with suppress(OSError):  # on a full disk, where room is to be made under this very lock
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, folder: Path) -> bool:
    """Lock an open file against all others, without waiting; whether that worked.

    Where the file system has no locks that is said once, of the folder, and counts as locked.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        device = os.fstat(descriptor).st_dev
        if device not in _WITHOUT_LOCKS:
            _WITHOUT_LOCKS.add(device)
            say(
                f"warning: the file system of {folder} has no locks ({error.strerror}); see to it that no other "
                f"process writes there at the same time"
            )
    return True


@contextmanager
def waiting_lock(path: Path, what: str, *, shown: bool = True) -> Iterator[None]:
    """Hold `exclusive_lock` for the length of the block, waiting for the process that has it.

    Args:
        path: the lock's file.
        what: its name for messages.
        shown: whether to say so when there is something to wait for.
    """
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(exclusive_lock(path, what))
                break
            except BusyError as error:
                if shown:
                    say(f"waiting: {str(error).split(';')[0]}")
                shown = False
                time.sleep(0.2)
        yield
