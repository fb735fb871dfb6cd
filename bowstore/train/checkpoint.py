"""Checkpoints of a run: written to a temporary name, fsynced and renamed; which are kept, and which are set aside."""

import os
from itertools import count
from pathlib import Path
from typing import Any

from bowstore.files import atomic_file, make_folder
from bowstore.models.saved import checkpoint_bytes
from bowstore.runs import checkpoint_path, checkpoints, step_of

_DAMAGED, _DIVERGED = "damaged", "diverged"


class Checkpoints:
    """The checkpoints of one sitting; none is relied on, nor another deleted for it, before it has proved sound.

    Finite weights may be useless all the same: those of one step at far too high a rate give a loss that is not
    finite, and a run that went on from them would fail for ever. What proves a checkpoint is the step after it.

    Those later than the start were passed over: they are set aside, so that none is deleted or takes a new one's place.

    Args:
        run: the run directory.
        keep: how many are kept.
        start: step of the one that the run goes on from; None for a new run.
        slower: whether the run goes on at a lower rate than the start was made with. If it diverges all the same before
            it has written one of its own, the start was bad already.
        writes: whether this process is the one that touches files.
    """

    def __init__(self, run: Path, *, keep: int, start: int | None, writes: bool, slower: bool = False) -> None:
        self._run, self._keep, self._writes = run, keep, writes
        self._newest, self._doubtful = start, slower
        self.unproven = start is not None
        if writes and start is not None:
            for path in checkpoints(run):
                if step_of(path) > start:
                    path.rename(aside(path, _DAMAGED))

    def save(self, state: dict[str, Any]) -> None:
        """Write one of a step; no other takes its place yet."""
        if self._writes:
            save_checkpoint(self._run, state)
        self._newest, self._doubtful, self.unproven = int(state["step"]), False, True

    def proved(self) -> None:
        """The step after the newest one was sound: those before the newest `keep` are deleted."""
        if self.unproven and self._writes:
            prune(self._run, keep=self._keep)
        self.unproven = False

    def interrupted(self) -> str:
        """What the same command will do after an interrupt."""
        if self._newest is None:
            return "interrupted before the first checkpoint: no step was kept, the same command begins anew"
        return f"interrupted; run the command again to go on from step {self._newest}"

    def diverged(self) -> str:
        """Set an unproven one aside, since going on from it would lead to the same; return where `--resume` begins.

        Of one step, the last one that was set aside so is kept: a job that is started again and again fills no disk.
        Only for the process that writes.
        """
        lost = ""
        if (self.unproven or self._doubtful) and self._newest is not None:
            path = checkpoint_path(self._run, self._newest)
            name = f"{path.name}.{_DIVERGED}"
            path.replace(path.with_name(name))
            lost = f" ({path.name} leads here again: it is now {name})"
        left = checkpoints(self._run)
        return f"to go on from {left[0].name}{lost}" if left else f"to begin anew{lost}"


def save_checkpoint(run: Path, state: dict[str, Any]) -> Path:
    """Write `checkpoints/step-N.pt` atomically, of a state as `checkpoint_bytes` takes it."""
    path = checkpoint_path(run, state["step"])
    make_folder(path.parent)
    # torch's own writer turns a full disk into an internal error; from memory it stays an OSError.
    data = checkpoint_bytes(state)
    with atomic_file(path) as file:
        file.write(data)
    return path


def prune(run: Path, *, keep: int) -> None:
    """Delete all checkpoints but the newest `keep`; those that were set aside stay."""
    for path in checkpoints(run)[keep:]:
        path.unlink(missing_ok=True)


def aside(path: Path, kind: str) -> Path:
    """A name beside a file that nothing has yet: `NAME.kind`, `NAME.kind-2` and so on."""
    names = (path.with_name(f"{path.name}.{kind}" + (f"-{number}" if number > 1 else "")) for number in count(1))
    return next(name for name in names if not os.path.lexists(name))
