"""Checks of a run directory: does each file hold what was written into it?"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bowstore import runs
from bowstore.config import dump
from bowstore.errors import BowstoreError, MismatchError, MissingError
from bowstore.files import read_json
from bowstore.models.saved import RESTORE_BOTH, SavedNetwork, load_checkpoint, load_export, network_of, other_network
from bowstore.models.weights import content_digest
from bowstore.train.metrics import last_logged
from bowstore.train.rundir import read_run_config


@dataclass
class RunFindings:
    """What was found in one run directory, or of one checkpoint or exported network.

    Attributes:
        path: it.
        checkpoints: how many there are.
        aside: how many were set aside, as damaged or diverged.
        exported: whether there is an exported network.
        descent: how it came about (`bowstore.runs.descent`); empty where that is not recorded.
        problems: all that is wrong, a line each.
    """

    path: Path
    checkpoints: int = 0
    aside: int = 0
    exported: bool = False
    descent: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """What is wrong with one file is a problem more, and no end of the check."""
        try:
            yield
        except BowstoreError as error:
            self.problems.append(str(error))


def verify_run(path: Path) -> RunFindings:
    """Check all files of a run directory, or a checkpoint or an exported network alone.

    Raises:
        OSError: the machine could not read one, which says nothing about the file.
    """
    found = RunFindings(path)
    if not path.is_dir():
        found.exported = runs.is_export(path)
        found.checkpoints = int(not found.exported)
        (_export if found.exported else _checkpoint)(found, path)
        return found
    network = None
    with found.noting():
        config = read_run_config(path)
        network = network_of(dump(config), config.name)
    newest = _checkpoints(found, network)
    if runs.is_finished(path):
        found.exported = True
        _check_export(found, network, newest.get("backbone"))
    found.problems += runs.metric_lines(path)[1] or (runs.lost_lines(path, last_logged(newest)) if newest else [])
    _check_lineage(found, newest)
    if (path / runs.ENVIRONMENT_FILE).exists():
        with found.noting():
            read_json(path / runs.ENVIRONMENT_FILE)
    return found


def _checkpoints(found: RunFindings, network: SavedNetwork | None) -> dict[str, Any]:
    """Check all; what the newest holds, if it is sound."""
    paths = runs.checkpoints(found.path)
    found.checkpoints = len(paths)
    found.aside = len(runs.set_aside(found.path))
    states = [_checkpoint(found, path) for path in paths]
    newest = states[0] if states else {}
    if newest:  # older ones may be from before a --resume
        with found.noting():
            _check_own(found, paths[0], network, network_of(newest["config"], str(paths[0])), free=("view",))
    return newest


def _checkpoint(found: RunFindings, path: Path) -> dict[str, Any]:
    state: dict[str, Any] = {}
    with found.noting():
        try:
            state = load_checkpoint(path)
        except MissingError:
            if os.path.lexists(path):
                raise
            found.checkpoints -= 1  # deleted since: the run goes on in another process, and has newer ones
    _check_finite(found, path, {**state.get("backbone", {}), **state.get("head", {})})
    return state


def _export(found: RunFindings, path: Path) -> tuple[dict[str, Tensor], SavedNetwork | None]:
    tensors: dict[str, Tensor] = {}
    network = None
    with found.noting():
        tensors, network = load_export(path)
    _check_finite(found, path, tensors)
    return tensors, network


def _check_export(found: RunFindings, network: SavedNetwork | None, newest: dict[str, Tensor] | None) -> None:
    path = found.path / runs.BACKBONE_FILE
    tensors, exported = _export(found, path)
    if tensors and newest and content_digest(tensors) != content_digest(newest):
        found.problems.append(
            f"{path} holds other weights than the newest checkpoint: one of them is of another run or time; "
            f"{RESTORE_BOTH}"
        )
    elif exported:
        _check_own(found, path, network, exported)


def _check_own(
    found: RunFindings, path: Path, own: SavedNetwork | None, network: SavedNetwork, *, free: Sequence[str] = ()
) -> None:
    """Compare the network of a file with that of the run's configuration, but for what a --resume may change."""
    if own and (other := other_network(network, own, free=free)):
        found.problems.append(
            f"{path} is of another run than {found.path / runs.CONFIG_FILE} ({other}); {RESTORE_BOTH}"
        )


def _check_lineage(found: RunFindings, newest: dict[str, Any]) -> None:
    """Whether the record says of the data what the newest checkpoint does."""
    with found.noting():
        if lineage := runs.read_lineage(found.path):
            found.descent = runs.descent(lineage)
            if newest and lineage.get("inputs") != newest["inputs"]:
                path = found.path / runs.LINEAGE_FILE
                told = "tells of other images or targets than the newest checkpoint"
                raise MismatchError(f"{path} {told}; {RESTORE_BOTH}")


def _check_finite(found: RunFindings, path: Path, tensors: dict[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        found.problems.append(f"{path} holds NaN or infinity in {len(bad)} of {len(tensors)} tensors ({bad[0]})")
