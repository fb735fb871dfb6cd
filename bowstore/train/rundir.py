"""Run directories: whose they are, what they hold, and when one may be gone on with."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from bowstore.config import TrainConfig, dump
from bowstore.environment import device_name, library_versions
from bowstore.errors import BowstoreError, MismatchError
from bowstore.files import atomic_file, write_json
from bowstore.models.saved import CONFIG_FILE, checkpoints, is_finished, read_run_config
from bowstore.progress import say
from bowstore.train.distributed import World
from bowstore.train.metrics import METRICS_FILE
from bowstore.yaml_file import write_yaml

_ENVIRONMENT_FILE = "environment.json"
_FREE_KEYS = ("runtime", "student")  # these may change between a run's sittings


def check_run(run: Path, config: TrainConfig, *, resume: bool) -> None:
    """Check that a run directory in which something was trained holds this configuration.

    Raises:
        MismatchError: another configuration is there and `resume` is false; the message names the first difference.
            Or files where a run's go that no run left.
    """
    if not (checkpoints(run) or is_finished(run)):
        _refuse_foreign(run)
        return
    differences = _differences(dump(read_run_config(run)), dump(config))
    if differences and not resume:
        raise MismatchError(
            f"run directory {run} holds another configuration ({differences[0]}); take another --name, or "
            f"--resume to go on from its checkpoint with the new values"
        )
    for difference in differences:
        say(f"resumed with {difference}")


def _refuse_foreign(run: Path) -> None:
    """Refuse to write over files of a user's; what a run leaves that ended before its first checkpoint is no such."""
    try:
        if (run / CONFIG_FILE).read_bytes() == write_yaml(dump(read_run_config(run))):
            return
    except (FileNotFoundError, BowstoreError):
        pass
    there = [name for name in (CONFIG_FILE, _ENVIRONMENT_FILE, METRICS_FILE) if os.path.lexists(run / name)]
    if there:
        raise MismatchError(
            f"{run / there[0]} is there, and no run of bowstore wrote it; take another --name, or move it away"
        )


def write_config(run: Path, config: TrainConfig) -> None:
    """Record the resolved configuration, once everything it names has been found usable."""
    with atomic_file(run / CONFIG_FILE) as file:
        file.write(write_yaml(dump(config)))


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(old.keys() | new.keys()):
        if not prefix and key in _FREE_KEYS:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} is {before} there, {after} here")
    return found


def write_environment(run: Path, world: World, inputs: dict[str, str]) -> None:
    """Record versions, device and the identity of the inputs in `environment.json`."""
    write_json(
        run / _ENVIRONMENT_FILE,
        {
            "versions": library_versions(),
            "device": device_name(world.device),
            "world_size": world.size,
            "torch_threads": torch.get_num_threads(),
            "command": sys.argv[1:],
            "inputs": inputs,
        },
    )
