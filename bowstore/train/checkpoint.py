"""Checkpoints of a run: written to a temporary name, fsynced and renamed; the newest whole one is gone on from."""

import io
from pathlib import Path
from typing import Any

import torch

from bowstore.errors import CorruptError
from bowstore.files import atomic_file, sweep_temporary
from bowstore.models.saved import CHECKPOINT_VERSION, checkpoints, load_checkpoint
from bowstore.progress import say


def save_checkpoint(run: Path, state: dict[str, Any], *, keep: int) -> Path:
    """Write `checkpoints/step-N.pt` atomically, then delete all but the newest `keep`."""
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{state['step']:09d}.pt"
    # torch's own writer turns a full disk into an internal error; through memory it stays an OSError.
    buffer = io.BytesIO()
    torch.save({"version": CHECKPOINT_VERSION, **state}, buffer)
    with atomic_file(path) as file:
        file.write(buffer.getbuffer())
    others = [other for other in checkpoints(run) if other != path]
    # A name above this step is a damaged file that was passed over, or of a schedule that was given up.
    for other in [*(o for o in others if o > path), *[o for o in others if o < path][keep - 1 :]]:
        other.unlink(missing_ok=True)
    return path


def load_newest(run: Path) -> dict[str, Any] | None:
    """The newest checkpoint of a run that can be read, or None; a damaged one is named and passed over."""
    sweep_temporary(run / "checkpoints")
    for path in checkpoints(run):
        try:
            return load_checkpoint(path)
        except CorruptError as error:
            say(f"warning: {error}; trying the one before")
    return None
