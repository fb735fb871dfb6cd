"""Who this process is among those that torchrun started: its environment variables, read and checked in one place."""

import os
from typing import NamedTuple

from bowstore.errors import UsageError

_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
_REMEDY = "start the command with torchrun, which sets them, or unset them"


class Ranks(NamedTuple):
    """A process's place.

    Attributes:
        rank: among all processes of the job, from 0.
        size: processes of the job; 1 without torchrun.
        local_rank: among the job's processes on this machine, from 0.
        local_size: the job's processes on this machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def first(self) -> bool:
        """Whether this process is the one that shows progress and prints results."""
        return self.rank == 0


def ranks() -> Ranks:
    """What torchrun's variables say; without any of them, or where they say so, this process is alone.

    Raises:
        UsageError: some of them are missing, no whole numbers, or contradict each other.
    """
    given = [name for name in _ALONE if name in os.environ]
    # Schedulers of containers set a part of them for a job of one process, too.
    if not given or ("WORLD_SIZE" in given and all(os.environ[name] == _ALONE[name] for name in given)):
        return Ranks(0, 1, 0, 1)
    missing = [name for name in _ALONE if name not in os.environ]
    if missing:
        raise UsageError(f"{' and '.join(given)} is set without {', '.join(missing)}; {_REMEDY}")
    values = Ranks(*(_whole(name) for name in _ALONE))
    for name, value, bound_name, bound in (
        ("RANK", values.rank, "WORLD_SIZE", values.size),
        ("LOCAL_RANK", values.local_rank, "LOCAL_WORLD_SIZE", values.local_size),
        ("LOCAL_WORLD_SIZE", values.local_size - 1, "WORLD_SIZE", values.size),
    ):
        if value >= bound:
            raise UsageError(
                f"{name} {os.environ[name]} does not go with {bound_name} {os.environ[bound_name]}; {_REMEDY}"
            )
    if values.size > 1:
        if not os.environ.get("MASTER_ADDR"):
            raise UsageError(f"WORLD_SIZE is {values.size}, and MASTER_ADDR is not set; {_REMEDY}")
        if not 0 < _whole("MASTER_PORT") < 2**16:
            raise UsageError(f"MASTER_PORT {os.environ['MASTER_PORT']} is no port from 1 to 65535; {_REMEDY}")
    return values


def _whole(name: str) -> int:
    text = os.environ.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f"{name} is {text!r}, not a whole number; {_REMEDY}")
    return int(text)
