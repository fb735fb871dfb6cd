"""Trained networks on disk: runs, checkpoints and exported files, and how to get the network back.

A checkpoint is read with `weights_only=True`. A finished run also holds `backbone.safetensors`, the network alone
with what is needed to rebuild it. Both hold a digest over all that is in them (`content_digest`): inside the file,
because a file and one beside it cannot be replaced together.
"""

import io
import json
import os
import re
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bowstore.config import ModelConfig, ViewConfig, dump, validate
from bowstore.errors import CorruptError, MismatchError, MissingError, is_machine_error
from bowstore.files import atomic_file
from bowstore.models.file_kinds import is_archive, is_safetensors, is_torch, other_kind, why_unread
from bowstore.models.registry import Backbone, build_backbone
from bowstore.models.weights import content_digest
from bowstore.progress import say
from bowstore.torchrun import ranks
from bowstore.train.config import TrainConfig, differences
from bowstore.yaml_file import read_yaml

BACKBONE_FILE = "backbone.safetensors"
CONFIG_FILE = "config.yaml"
CHECKPOINT_FOLDER = "checkpoints"
CHECKPOINT_VERSION = 2
_WITHOUT_DIGEST = 1  # the version of checkpoints that had none
_PARTS = {"step": int, "config": dict, "inputs": dict, "backbone": dict, "head": dict, "optimizer": dict}
_CHECKPOINT = re.compile(r"step-(\d+)\.pt")


@dataclass(frozen=True)
class LoadedBackbone:
    """A trained network and where it comes from.

    Attributes:
        backbone: on the CPU, in eval mode.
        model: how to build it.
        view: the views it was trained with.
        name: the run's name.
        config: the run's whole configuration as plain values.
    """

    backbone: Backbone
    model: ModelConfig
    view: ViewConfig
    name: str
    config: dict[str, Any]


def checkpoint_bytes(state: dict[str, Any]) -> memoryview:
    """A checkpoint as a file's bytes: version, state and the digest over both.

    Args:
        state: the parts of a run (`step`, `config`, `inputs`, `backbone`, `head`, `optimizer`, and what the loop adds):
            tensors and plain values, nested.
    """
    content = {"version": CHECKPOINT_VERSION, **state}
    buffer = io.BytesIO()
    torch.save({**content, "digest": content_digest(content)}, buffer)
    return buffer.getbuffer()


def load_checkpoint(path: Path, *, shown: bool = True) -> dict[str, Any]:
    """Read a checkpoint onto the CPU and check it; only tensors and plain values are ever unpickled.

    Args:
        path: the file.
        shown: whether to say what cannot be checked of an old one (False on ranks other than 0).

    Raises:
        MissingError: no such file.
        CorruptError: damaged, or not all of it is there.
        MismatchError: another format version, weights of another codebase, or no file at all.
        OSError: the machine could not read it, which says nothing about the file.
    """
    return _checkpoint(_file_bytes(path, "checkpoint"), path, shown=shown)


def _checkpoint(data: bytes, path: Path, *, shown: bool = True) -> dict[str, Any]:
    if kind := other_kind(io.BytesIO(data)):
        raise CorruptError(f"{path} is no checkpoint of bowstore: it is {kind}")
    try:
        if is_archive(data[:64]):  # PyTorch does not compare its checksums, and unpickles whatever damaged bytes say
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if bad := archive.testzip():
                    raise ValueError(f"{bad} differs from its checksum")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes end in errors of any kind
        if is_machine_error(error):
            raise
        raise CorruptError(f"{path} is not a whole bowstore checkpoint ({why_unread(error)})") from error
    if not isinstance(state, dict) or "version" not in state:
        raise MismatchError(f"{path} is no checkpoint of bowstore; {_foreign(path)}")
    return _checked(state, path, shown=shown)


def _checked(state: dict[str, Any], path: Path, *, shown: bool) -> dict[str, Any]:
    """The parts of a checkpoint, once its version, their presence and its digest are right."""
    version, digest = state["version"], state.pop("digest", None)
    known = type(version) is int and version in (_WITHOUT_DIGEST, CHECKPOINT_VERSION)
    lost = [name for name, kind in _PARTS.items() if not isinstance(state.get(name), kind)]
    if known and lost:
        raise CorruptError(f"{path} is not a whole bowstore checkpoint (it lacks {', '.join(lost)})")
    if known and digest is None and version == _WITHOUT_DIGEST:
        if shown:
            say(
                f"{path} was written before checkpoints had a digest: no more than its archive's own checksums was "
                f"checked; the next checkpoint has one"
            )
    elif known and digest is None:
        raise CorruptError(f"{path} is not a whole bowstore checkpoint (it lacks its digest)")
    elif digest is not None and digest != _digest_of(state):
        raise CorruptError(f"{path} differs from the digest {digest} that was recorded in it when it was written")
    if not known:
        raise MismatchError(
            f"{path} has checkpoint format {version}, this bowstore reads {_WITHOUT_DIGEST} and {CHECKPOINT_VERSION}; "
            f"use the bowstore that wrote it, or move it out of its folder to go on without it"
        )
    if _CHECKPOINT.fullmatch(path.name) and step_of(path.name) != state["step"]:
        raise CorruptError(f"{path} holds step {state['step']}: it was renamed, or copied over another one")
    return state


def _digest_of(state: dict[str, Any]) -> str:
    try:
        return content_digest(state)
    except TypeError as error:  # something that no bowstore writes
        return str(error)


def newest_checkpoint(run: Path, *, shown: bool = True) -> dict[str, Any] | None:
    """The newest checkpoint of a run that is sound, or None where there is none at all; damaged ones are named.

    Args:
        run: the run directory.
        shown: whether to name damaged ones (False on ranks other than 0).

    Raises:
        CorruptError: there are checkpoints, and not one of them is sound.
        MismatchError: the newest sound one is of another version.
        OSError: the machine could not read one, which says nothing about the file.
    """
    paths = checkpoints(run)
    error: CorruptError | None = None
    for path in paths:
        if error and shown:
            say(f"warning: {error}; trying the one before")
        try:
            return load_checkpoint(path, shown=shown)
        except CorruptError as found:
            error = found
        except MissingError:
            if os.path.lexists(path):
                raise
            # Deleted since: the run goes on in another process, and has newer ones.
            return newest_checkpoint(run, shown=shown)
    if error:
        raise CorruptError(
            f"no checkpoint of {run} is sound, and there are {len(paths)} (the last tried: {error}); restore one from "
            f"a copy, or move them away to begin the run anew"
        ) from error
    return None


def save_backbone(path: Path, backbone: Backbone, config: TrainConfig) -> None:
    """Write the network alone, as safetensors with the run's configuration and a digest in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    metadata = {"bowstore": json.dumps(dump(config))}
    metadata["digest"] = content_digest({"metadata": metadata, "tensors": tensors})
    with atomic_file(path) as file:
        file.write(safetensors.torch.save(tensors, metadata=metadata))


def load_backbone(path: Path) -> LoadedBackbone:
    """Load a network from a run directory, a checkpoint, or an exported `.safetensors` file.

    Of a run that is not finished, the newest sound checkpoint.

    Raises:
        MissingError: nothing there, or a run without a checkpoint yet.
        CorruptError: a damaged file.
        MismatchError: weights that do not fit the network (the message names the first keys), or a run with another
            run's export.
    """
    run, checkpoint = path if path.is_dir() else None, None
    if run and not is_finished(run):
        checkpoint = newest_checkpoint(run)
        if checkpoint is None:
            read_run_config(run)  # which says so of a folder that is no run
            raise MissingError(f"run {path} holds no checkpoint yet; let `bowstore train` reach its first one")
        state, values = checkpoint["backbone"], checkpoint["config"]
        if ranks().first:
            say(f"run {run} is not finished: its newest checkpoint is used, of step {checkpoint['step']}")
    else:
        path = run / BACKBONE_FILE if run else path
        data = _file_bytes(path, "file" if path.suffix == ".safetensors" else "checkpoint")
        if is_safetensors(data[:64]) or (path.suffix == ".safetensors" and not is_torch(data[:64])):
            state, values = _export(data, path)
        else:
            checkpoint = _checkpoint(data, path)
            state, values = checkpoint["backbone"], checkpoint["config"]
    config = validate(TrainConfig, values, str(path))
    if run is not None:
        _check_own(run, config, finished=checkpoint is None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # what a network draws when it is built, and does not save, is that of the run
        backbone = build_backbone(config.model)
    load_weights(backbone, state, str(path))
    return LoadedBackbone(backbone.eval(), config.model, config.view, config.name, values)


def _check_own(run: Path, config: TrainConfig, *, finished: bool) -> None:
    """Compare the configuration in a run's export or checkpoint with the run's: another run's file is whole, too."""
    if not (run / CONFIG_FILE).exists() or not (found := differences(read_run_config(run), config)):
        return
    if finished:
        raise MismatchError(
            f"{run / BACKBONE_FILE} is of another run than {run / CONFIG_FILE} ({found[0]}); restore both from one copy"
        )
    say(  # no error: so it is after a --resume that has not reached a checkpoint yet
        f"warning: the newest checkpoint of {run} was written under another configuration than its {CONFIG_FILE} holds "
        f"({found[0]})"
    )


def load_weights(module: torch.nn.Module, state: dict[str, torch.Tensor], origin: str) -> None:
    """Load a state dict strictly.

    Raises:
        MismatchError: keys or shapes that do not fit, with counts and the first of them.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [f"{k} {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in own.keys() & state.keys()
             if state[k].shape != own[k].shape]  # fmt: skip
    if missing or extra or wrong:
        raise MismatchError(
            f"{origin} does not fit the network: {len(missing)} missing {missing[:3]}, {len(extra)} unknown "
            f"{extra[:3]}, {len(wrong)} of another shape {wrong[:3]}; is model.arch the one it was trained with "
            f"(and, for a rotation head, rotation.blocks: 1 in runs from before that setting)?"
        )
    module.load_state_dict(state)


def is_finished(run: Path) -> bool:
    """Whether a run reached its end."""
    return (run / BACKBONE_FILE).exists()


def read_run_config(run: Path) -> TrainConfig:
    """The configuration that a run directory holds.

    Raises:
        MissingError: it is not a run directory.
    """
    path = run / CONFIG_FILE
    if not path.exists():
        raise MissingError(f"{run} is not a run directory (it has no {CONFIG_FILE})")
    return validate(TrainConfig, read_yaml(path), str(path))


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / CHECKPOINT_FOLDER / f"step-{step:09d}.pt"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, newest first.

    Raises:
        OSError: their folder is there and cannot be listed.
    """
    folder = run / CHECKPOINT_FOLDER
    try:
        names = os.listdir(folder)  # Path.glob would find nothing in a folder that it may not read
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names, key=step_of, reverse=True) if _CHECKPOINT.fullmatch(name)]


def step_of(name: str) -> int:
    """The step in a checkpoint's name; -1 for another name."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else -1


def load_export(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of an exported network, checked, and the configuration of its run as plain values.

    Raises:
        MissingError: no such file.
        CorruptError: damaged.
        MismatchError: not written by bowstore.
        OSError: the machine could not read it, which says nothing about the file.
    """
    return _export(_file_bytes(path, "file"), path)


def _export(data: bytes, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if kind := other_kind(io.BytesIO(data)):
        raise CorruptError(f"{path} is no network that bowstore exported: it is {kind}")
    try:
        tensors = safetensors.torch.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        values = json.loads(metadata.get("bowstore", "null"))
    except Exception as error:  # damaged bytes end in errors of any kind
        if is_machine_error(error):
            raise
        raise CorruptError(f"{path} is not a whole safetensors file ({_first_line(error)}); {_REDO}") from error
    digest = metadata.pop("digest", None)
    if values is None and digest is None:
        raise MismatchError(f"{path} was not written by bowstore (no configuration in it); {_foreign(path)}")
    if digest is None and len(metadata) == 1:
        say(f"{path} was written before exported networks had a digest: its weights were not checked")
    elif digest != content_digest({"metadata": metadata, "tensors": tensors}):
        raise CorruptError(f"{path} differs from the digest that was recorded in it when it was written; {_REDO}")
    return tensors, values


_REDO = "restore it from a copy, or move it away and give its `bowstore train` command again, which writes it anew"


def _file_bytes(path: Path, what: str) -> bytes:
    """A file as a whole: whatever is raised later is about its bytes and not about the machine."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        if path.is_symlink():
            raise MissingError(
                f"{path} is a link to {os.readlink(path)}, which is not there; restore that, or remove the link"
            ) from error
        raise MissingError(f"no {what} {path}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise MismatchError(
            f"{path} is {kind} and not a file; move it away, or restore the {what} that should be there"
        )
    return path.read_bytes()


def _foreign(path: Path) -> str:
    return f"weights of other codebases go with an architecture: --teacher timm:NAME --weights {path}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
