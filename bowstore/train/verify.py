"""Checks of a run directory: does each file hold what was written into it?"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bowstore.config import validate
from bowstore.errors import BowstoreError
from bowstore.files import read_json
from bowstore.models import saved
from bowstore.models.weights import content_digest
from bowstore.train.config import TrainConfig, differences
from bowstore.train.metrics import last_logged, lost_lines, unreadable_lines

# What nobody changes within a run; other values may be those of before a --resume.
_IDENTITY = ("name ", "task ", "seed ", "model.")


@dataclass
class RunFindings:
    """What was found in one run directory, or of one checkpoint or exported network.

    Attributes:
        path: it.
        checkpoints: how many there are.
        aside: how many were set aside, as damaged or diverged.
        exported: whether there is an exported network.
        problems: all that is wrong, a line each.
    """

    path: Path
    checkpoints: int = 0
    aside: int = 0
    exported: bool = False
    problems: list[str] = field(default_factory=list)


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory, complete or not."""
    return any((path / name).exists() for name in (saved.CONFIG_FILE, saved.CHECKPOINT_FOLDER, saved.BACKBONE_FILE))


def verify_run(path: Path) -> RunFindings:
    """Check all files of a run directory, or a checkpoint or an exported network alone.

    Raises:
        OSError: the machine could not read one, which says nothing about the file.
    """
    found = RunFindings(path)
    if not path.is_dir():
        found.exported = path.suffix == ".safetensors"
        found.checkpoints = int(not found.exported)
        (_export if found.exported else _checkpoint)(found, path)
        return found
    config = _config(found)
    newest = _checkpoints(found, config)
    if saved.is_finished(path):
        found.exported = True
        tensors, values = _export(found, path / saved.BACKBONE_FILE)
        weights = newest.get("backbone")
        if tensors and weights and content_digest(tensors) != content_digest(weights):
            found.problems.append(
                f"{path / saved.BACKBONE_FILE} holds other weights than the newest checkpoint: one of them is of "
                f"another run or time; restore both from one copy"
            )
        elif values and config:
            _check_config(found, path / saved.BACKBONE_FILE, values, config, keys=None)
    found.problems += unreadable_lines(path) or (lost_lines(path, last_logged(newest)) if newest else [])
    for file in (path / "environment.json", *sorted((path / "eval").glob("*.json"))):
        try:
            if file.exists():
                read_json(file)
        except BowstoreError as error:
            found.problems.append(str(error))
    return found


def _config(found: RunFindings) -> TrainConfig | None:
    try:
        return saved.read_run_config(found.path)
    except BowstoreError as error:
        found.problems.append(str(error))
        return None


def _checkpoints(found: RunFindings, config: TrainConfig | None) -> dict[str, Any]:
    """Check all; what the newest holds, if it is sound."""
    paths = saved.checkpoints(found.path)
    found.checkpoints = len(paths)
    found.aside = sum(1 for _ in (found.path / saved.CHECKPOINT_FOLDER).glob("step-*.pt.*"))
    states = [_checkpoint(found, path) for path in paths]
    newest = states[0] if states else {}
    if newest and config:  # older ones may be of before a --resume
        _check_config(found, paths[0], newest["config"], config, keys=_IDENTITY)
    return newest


def _checkpoint(found: RunFindings, path: Path) -> dict[str, Any]:
    try:
        state = saved.load_checkpoint(path)
    except BowstoreError as error:
        if not os.path.lexists(path):  # the run goes on in another process, and has newer ones
            found.checkpoints -= 1
            return {}
        found.problems.append(str(error))
        return {}
    _check_finite(found, path, {**state["backbone"], **state["head"]})
    return state


def _export(found: RunFindings, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors, values = saved.load_export(path)
    except BowstoreError as error:
        found.problems.append(str(error))
        return {}, {}
    _check_finite(found, path, tensors)
    return tensors, values


def _check_config(
    found: RunFindings, path: Path, values: dict[str, Any], config: TrainConfig, *, keys: tuple[str, ...] | None
) -> None:
    """Compare the configuration in a file with the run's; only what begins with one of the keys, if given."""
    try:
        other = differences(validate(TrainConfig, values, str(path)), config)
    except BowstoreError as error:
        found.problems.append(str(error))
        return
    if other := [line for line in other if keys is None or line.startswith(keys)]:
        found.problems.append(
            f"{path} is of another run than {found.path / saved.CONFIG_FILE} ({other[0]}); restore both from one copy"
        )


def _check_finite(found: RunFindings, path: Path, tensors: dict[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        found.problems.append(f"{path} holds NaN or infinity in {len(bad)} of {len(tensors)} tensors ({bad[0]})")
