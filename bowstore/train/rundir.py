"""Run directories at the start of a run: whether one may be used or continued, and what is recorded in it."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bowstore import runs
from bowstore.config import dump, validate
from bowstore.data.gpu_decode import gpu_decoding
from bowstore.environment import device_name, library_versions
from bowstore.errors import BowstoreError, MismatchError, UsageError
from bowstore.files import atomic_file, write_json
from bowstore.models.saved import load_export, network_of, other_network
from bowstore.models.weights import content_digest
from bowstore.progress import say
from bowstore.train.config import TrainConfig, differences
from bowstore.train.distributed import World
from bowstore.yaml_file import write_yaml


def read_run_config(run: Path) -> TrainConfig:
    """The configuration that a run directory holds.

    Raises:
        MissingError: it is not a run directory.
        UsageError: values that this bowstore does not know.
    """
    return validate(TrainConfig, runs.read_config(run), str(run / runs.CONFIG_FILE))


def check_run(run: Path, config: TrainConfig, *, resume: bool) -> None:
    """Check that a run directory in which something was trained holds this configuration.

    Raises:
        MismatchError: another configuration is there and `resume` is false; the message names the first difference.
            Or files where a run's go that no run left.
        UsageError: its configuration is no longer known: of a plugin that is gone or has other settings now.
    """
    if not (runs.checkpoints(run) or runs.is_finished(run)):
        _refuse_foreign(run)
        return
    if not (run / runs.CONFIG_FILE).exists():
        return  # lost: what the checkpoints say is compared
    try:
        found = differences(read_run_config(run), config)
    except UsageError as error:
        raise UsageError(f"{error}; put that right, or take another --name") from error
    if found and not resume:
        raise MismatchError(
            f"run directory {run} holds another configuration ({found[0]}); take another --name, or "
            f"--resume to go on from its checkpoint with the new values"
        )


def check_start(
    run: Path, state: dict[str, Any] | None, config: TrainConfig, steps: int, *, resume: bool, shown: bool
) -> None:
    """Check that the files that a run continues from, or ended with, are its own: those of another run are sound, too.

    Args:
        run: its directory.
        state: its newest checkpoint, or None.
        config: that of this sitting.
        steps: where the run ends by it.
        resume: whether the configuration may differ from that of the checkpoint.
        shown: whether to say in what it differs (False on ranks other than 0).

    Raises:
        MismatchError: a checkpoint or export of another configuration, a checkpoint from beyond the end, or an export
            that is not of the last checkpoint.
    """
    if state is None:
        if runs.is_finished(run):
            _check_lone_export(run, config)
        return
    path = runs.checkpoint_path(run, state["step"])
    found = differences(validate(TrainConfig, state["config"], str(path)), config)
    if found and not resume:
        raise MismatchError(
            f"{path} was written under another configuration ({found[0]}): it is of another run, or of before a "
            f"--resume; restore the run's own, take another --name, or --resume to go on from it with the new values"
        )
    if state["step"] > steps:
        raise MismatchError(
            f"{path} is past the end of this configuration, which is step {steps}; raise optim.epochs, or take another "
            f"--name"
        )
    if state["step"] < steps:
        for difference in found if shown else ():
            say(f"resumed with {difference}")
        return
    export = run / runs.BACKBONE_FILE
    if export.exists() and content_digest(load_export(export)[0]) != content_digest(state["backbone"]):
        raise MismatchError(
            f"{export} holds other weights than {path.name}: it is of another run or time; move it away, and the same "
            f"command writes it anew"
        )


def _check_lone_export(run: Path, config: TrainConfig) -> None:
    path = run / runs.BACKBONE_FILE
    found = other_network(load_export(path)[1], network_of(dump(config), config.name))
    if not found and (run / runs.CONFIG_FILE).exists():  # what it does not record, the run's configuration says
        found = next(iter(differences(read_run_config(run), config)), None)
    if found:
        raise MismatchError(
            f"{path} is of another configuration ({found}), and there is no checkpoint to go on from; take another "
            f"--name"
        )


def _refuse_foreign(run: Path) -> None:
    """Refuse to write over a user's files; those of a run that ended before its first checkpoint may be replaced."""
    try:
        read_run_config(run)
        # Spelt as bowstore spells the same values, in whatever version. With a user's comments the text differs.
        if (run / runs.CONFIG_FILE).read_bytes() == write_yaml(runs.read_config(run)):
            return
    except (FileNotFoundError, BowstoreError):
        pass
    there = [name for name in runs.WRITTEN if os.path.lexists(run / name)]
    if there:
        raise MismatchError(
            f"{run / there[0]} is there, and no run of bowstore wrote it; take another --name, or move it away"
        )


def write_config(run: Path, config: TrainConfig) -> None:
    """Record the resolved configuration, once everything it names has been found usable."""
    with atomic_file(run / runs.CONFIG_FILE) as file:
        file.write(write_yaml(dump(config)))


def write_environment(
    run: Path, world: World, inputs: dict[str, str], *, compiled: bool, probe: Mapping[str, Any] | None = None
) -> None:
    """Record versions, device, the identity of the inputs and what the network is measured by in `environment.json`."""
    write_json(
        run / runs.ENVIRONMENT_FILE,
        {
            "versions": library_versions(),
            "device": device_name(world.device),
            "jpeg": str(gpu_decoding(world.device)) if world.device.type == "cuda" else "decoded on the CPU",
            "world_size": world.size,
            "torch_threads": torch.get_num_threads(),
            "compiled": compiled,
            "command": sys.argv[1:],
            "inputs": inputs,
            **({"probe": dict(probe)} if probe else {}),
        },
    )
