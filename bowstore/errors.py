"""The errors a user can meet: one line each, with the value, the bound and the remedy.

Every leaf also derives from the builtin that fits, so that Python callers may catch either. The command line
prints the message alone and leaves with `exit_code`.
"""

import difflib
from collections.abc import Iterable


class BowstoreError(Exception):
    """Base of all errors that bowstore raises on purpose."""

    exit_code = 1


class UsageError(BowstoreError, ValueError):
    """A flag, a configuration value or an argument that cannot be used; nothing was started."""

    exit_code = 2


class MissingError(BowstoreError, FileNotFoundError):
    """A file, folder, run or store that should be there is not."""


class DataError(BowstoreError, ValueError):
    """Images, shards or features that cannot be used as they are."""


class CorruptError(DataError):
    """Bytes that differ from what was recorded when they were written."""


class MismatchError(DataError):
    """Two things that must belong together do not: store and shards, run and configuration."""


class BusyError(BowstoreError, BlockingIOError):
    """Another process holds what this one needs."""


class TrainingError(BowstoreError, ArithmeticError):
    """Training went wrong numerically (a loss that is not finite)."""


class TransferError(BowstoreError, ConnectionError):
    """Bytes that could not be brought from another machine."""


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """`did you mean 'x'?`, of the name that is nearest to one that does not exist; empty where none is near."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else ""


def is_machine_error(error: BaseException) -> bool:
    """Whether an error is the machine's (no permission, no memory, a failing disk), and says nothing about the bytes.

    For handlers that take any error of a library for damage: what the machine could not do now must stop the
    command, because the next try may well succeed. Libraries raise an OSError without a number for damage, too;
    a file that is gone, or a folder in its place, is damage to what it was part of. PyTorch and DALI have no class of
    their own for a failed allocation.
    """
    if isinstance(error, (BowstoreError, FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return False
    if isinstance(error, OSError):
        return error.errno is not None
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)
    )


_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "memoryallocation")
