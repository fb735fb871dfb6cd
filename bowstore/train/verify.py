"""Checks of a run directory: does each file hold what was written into it?"""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from bowstore.errors import BowstoreError
from bowstore.files import read_json
from bowstore.models import saved
from bowstore.models.weights import content_digest
from bowstore.train.metrics import unreadable_lines


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
    try:
        saved.read_run_config(path)
    except BowstoreError as error:
        found.problems.append(str(error))
    newest = _checkpoints(found)
    if saved.is_finished(path):
        found.exported = True
        tensors = _export(found, path / saved.BACKBONE_FILE)
        if tensors and newest and content_digest(tensors) != content_digest(newest):
            found.problems.append(
                f"{path / saved.BACKBONE_FILE} holds other weights than the newest checkpoint: one of them is of "
                f"another run or time; restore both from one copy"
            )
    found.problems += unreadable_lines(path)
    for file in (path / "environment.json", *sorted((path / "eval").glob("*.json"))):
        try:
            if file.exists():
                read_json(file)
        except BowstoreError as error:
            found.problems.append(str(error))
    return found


def _checkpoints(found: RunFindings) -> dict[str, Tensor]:
    """Check all; the backbone's weights of the newest, if it is sound."""
    paths = saved.checkpoints(found.path)
    found.checkpoints = len(paths)
    found.aside = sum(1 for _ in (found.path / saved.CHECKPOINT_FOLDER).glob("step-*.pt.*"))
    weights = [_checkpoint(found, path) for path in paths]
    return weights[0] if weights else {}


def _checkpoint(found: RunFindings, path: Path) -> dict[str, Tensor]:
    try:
        state = saved.load_checkpoint(path)
    except BowstoreError as error:
        found.problems.append(str(error))
        return {}
    _check_finite(found, path, {**state["backbone"], **state["head"]})
    return dict(state["backbone"])


def _export(found: RunFindings, path: Path) -> dict[str, Tensor]:
    try:
        tensors, _ = saved.load_export(path)
    except BowstoreError as error:
        found.problems.append(str(error))
        return {}
    _check_finite(found, path, tensors)
    return tensors


def _check_finite(found: RunFindings, path: Path, tensors: dict[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        found.problems.append(f"{path} holds NaN or infinity in {len(bad)} of {len(tensors)} tensors ({bad[0]})")
