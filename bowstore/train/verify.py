"""Checks of a run directory: does each file hold what was written into it?"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bowstore import runs
from bowstore.config import dump
from bowstore.errors import BowstoreError
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
    network = _network(found)
    newest = _checkpoints(found, network)
    if runs.is_finished(path):
        found.exported = True
        _check_export(found, path / runs.BACKBONE_FILE, network, newest.get("backbone"))
    found.problems += runs.metric_lines(path)[1] or (runs.lost_lines(path, last_logged(newest)) if newest else [])
    _check_lineage(found, newest)
    for file in (path / runs.ENVIRONMENT_FILE, *runs.result_paths(path)):
        try:
            if file.exists():
                read_json(file)
        except BowstoreError as error:
            found.problems.append(str(error))
    return found


def _network(found: RunFindings) -> SavedNetwork | None:
    """What the run's configuration says of its network, once all of it is found usable."""
    try:
        config = read_run_config(found.path)
    except BowstoreError as error:
        found.problems.append(str(error))
        return None
    return network_of(dump(config), config.name)


def _checkpoints(found: RunFindings, network: SavedNetwork | None) -> dict[str, Any]:
    """Check all; what the newest holds, if it is sound."""
    paths = runs.checkpoints(found.path)
    found.checkpoints = len(paths)
    found.aside = len(runs.set_aside(found.path))
    states = [_checkpoint(found, path) for path in paths]
    newest = states[0] if states else {}
    if newest:  # older ones may be of before a --resume
        _check_own(found, paths[0], network, newest["config"], free=("view",))
    return newest


def _checkpoint(found: RunFindings, path: Path) -> dict[str, Any]:
    try:
        state = load_checkpoint(path)
    except BowstoreError as error:
        if not os.path.lexists(path):  # the run goes on in another process, and has newer ones
            found.checkpoints -= 1
            return {}
        found.problems.append(str(error))
        return {}
    _check_finite(found, path, {**state["backbone"], **state["head"]})
    return state


def _export(found: RunFindings, path: Path) -> tuple[dict[str, Tensor], SavedNetwork | None]:
    try:
        tensors, network = load_export(path)
    except BowstoreError as error:
        found.problems.append(str(error))
        return {}, None
    _check_finite(found, path, tensors)
    return tensors, network


def _check_export(
    found: RunFindings, path: Path, network: SavedNetwork | None, newest: dict[str, Tensor] | None
) -> None:
    tensors, exported = _export(found, path)
    if tensors and newest and content_digest(tensors) != content_digest(newest):
        found.problems.append(
            f"{path} holds other weights than the newest checkpoint: one of them is of another run or time; "
            f"{RESTORE_BOTH}"
        )
    elif exported:
        _check_own(found, path, network, dump(exported))


def _check_own(
    found: RunFindings, path: Path, network: SavedNetwork | None, values: dict[str, Any], *, free: Sequence[str] = ()
) -> None:
    """Compare what a file says of its network with the run's configuration, but for what a --resume may change."""
    try:
        if network and (other := other_network(network_of(values, str(path)), network, free=free)):
            found.problems.append(
                f"{path} is of another run than {found.path / runs.CONFIG_FILE} ({other}); {RESTORE_BOTH}"
            )
    except BowstoreError as error:
        found.problems.append(str(error))


def _check_lineage(found: RunFindings, newest: dict[str, Any]) -> None:
    """Whether the record says of the data what the newest checkpoint does."""
    path = found.path / runs.LINEAGE_FILE
    try:
        lineage = runs.read_lineage(found.path)
    except BowstoreError as error:
        found.problems.append(str(error))
        return
    if not lineage:
        return
    if newest and lineage.get("inputs") != newest["inputs"]:
        found.problems.append(f"{path} tells of other shards or words than the newest checkpoint; {RESTORE_BOTH}")
    else:
        found.descent = tuple(runs.descent(lineage))


def _check_finite(found: RunFindings, path: Path, tensors: dict[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        found.problems.append(f"{path} holds NaN or infinity in {len(bad)} of {len(tensors)} tensors ({bad[0]})")
