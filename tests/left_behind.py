"""What a process leaves under a temporary name when it is killed."""

import os
from pathlib import Path

from bowstore.files import _temporary_name

DEAD = 2**22 + 1  # above the largest number that Linux gives a process


def left_behind(path: Path, content: bytes = b"half", *, process: int = DEAD) -> Path:
    """A temporary file on its way to `path`, of a process that is gone or of one that lives."""
    temporary = path.with_name(_temporary_name(path.name, process))
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(content)
    return temporary


def age(path: Path, seconds: float) -> None:
    """Make a file that much older."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns - int(seconds * 1e9)))
