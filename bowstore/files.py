"""Files that are whole or absent: atomic writes, digests, locks.

The one place that knows how bytes get safely under a final name: a temporary name beside it, fsync, rename,
fsync of the folder. `kill -9` leaves at most a temporary file, which `sweep_temporary` removes.
"""

import fcntl
import glob
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import xxhash

from bowstore.errors import BusyError, CorruptError, MissingError
from bowstore.progress import say

STAGING_DIGITS = 12  # of the fingerprint that names a word store which is to take another one's place
TEMPORARY_MARK = ".tmp-"
_DIGEST_BLOCK_BYTES = 1 << 22
_WAIT_SECONDS = 0.2


def fsync_path(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that takes the name `path` when the block ends without an error.

    On an error (a full disk, an interrupt) the temporary file is removed and `path` keeps what it held.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY_MARK}{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, sort_keys=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        MissingError: there is no such file.
        CorruptError: the file is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingError(f"no file {path}") from error
    except ValueError as error:
        raise CorruptError(
            f"{path} is not valid JSON ({error}); remove it and run the command that writes it"
        ) from error


def sweep_temporary(folder: Path) -> int:
    """Remove temporary files whose writer is dead; return how many."""
    swept = 0
    for path in folder.glob(f".*{TEMPORARY_MARK}*"):
        owner = path.name.rsplit(TEMPORARY_MARK, 1)[1]
        if path.is_file() and not (owner.isdigit() and _is_alive(int(owner))):
            path.unlink(missing_ok=True)
            swept += 1
    return swept


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's bytes, as 32 hex digits (against corruption, not against an adversary)."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_DIGEST_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[None]:
    """Hold an advisory lock on `path` for the length of the block; the kernel frees it if the process dies.

    Raises:
        BusyError: another live process holds it; the message names its host and process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().decode(errors="replace").strip() or "another process"
            raise BusyError(f"{what} is in use by {owner}; wait for it to end, or take another name") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        yield


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
                time.sleep(_WAIT_SECONDS)
        yield


def stagings(store: Path) -> list[Path]:
    """Grown word stores beside a store that are to take its place: appends under way, or left unfinished."""
    return sorted(store.parent.glob(f".{glob.escape(store.name)}.append-{'[0-9a-f]' * STAGING_DIGITS}"))
