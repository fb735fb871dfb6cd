"""Trained networks on disk: checkpoints and exported files, and how to get the network back.

A checkpoint is read with `weights_only=True`. A finished run also holds the network alone with what rebuilds it
(`SavedNetwork`): no more, so that a training option that is renamed orphans no teacher. Both hold a digest over all
that is in them (`content_digest`): inside the file, because a file and one beside it cannot be replaced together.
"""

import io
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bowstore import runs
from bowstore.config import dump, value_differences
from bowstore.errors import CorruptError, MismatchError, MissingError, is_machine_error
from bowstore.files import atomic_file
from bowstore.models.backbone import Backbone
from bowstore.models.file_kinds import first_line, other_kind, read_torch, reads_as_safetensors, why_unread
from bowstore.models.record import NetworkRecord, network_record
from bowstore.models.registry import build_backbone
from bowstore.models.weights import content_digest, put_weights
from bowstore.progress import say
from bowstore.torchrun import ranks

CHECKPOINT_VERSION = 2
_WITHOUT_DIGEST = 1  # the version of checkpoints that had none
# Where metadata say what network a file holds: a run's own file, and one for other code.
RECORDED, EXPORTED = "bowstore", "bowstore_export"
PARTS = {"step": int, "config": dict, "inputs": dict, "backbone": dict, "head": dict, "optimizer": dict}


class SavedNetwork(NetworkRecord):
    """A record that can be built."""

    def fresh(self) -> Backbone:
        """The network at its random initialisation, that of its run, on the CPU; the caller's generator stays."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return build_backbone(self.model)


@dataclass(frozen=True)
class LoadedBackbone:
    """A trained network and what is recorded of it.

    Attributes:
        backbone: on the CPU, in eval mode.
        saved: its architecture, views, name, task and seed.
    """

    backbone: Backbone
    saved: SavedNetwork


def network_of(values: Mapping[str, Any], origin: str) -> SavedNetwork:
    """As `network_record`."""
    return SavedNetwork(**dict(network_record(values, origin)))


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
        state = read_torch(io.BytesIO(data))
    except Exception as error:  # damaged bytes end in errors of any kind
        if is_machine_error(error):
            raise
        raise CorruptError(f"{path} is not a whole bowstore checkpoint ({why_unread(error)})") from error
    if not isinstance(state, dict) or "version" not in state:
        raise MismatchError(_foreign(path, "is no checkpoint of bowstore", getattr(state, "_metadata", {})))
    return _checked(state, path, shown=shown)


def _checked(state: dict[str, Any], path: Path, *, shown: bool) -> dict[str, Any]:
    """The parts of a checkpoint, once its version, their presence and its digest are right."""
    version, digest = state["version"], state.pop("digest", None)
    known = type(version) is int and version in (_WITHOUT_DIGEST, CHECKPOINT_VERSION)
    lost = [name for name, kind in PARTS.items() if not isinstance(state.get(name), kind)]
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
    if runs.step_of(path) not in (-1, state["step"]):
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
    paths = runs.checkpoints(run)
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


def save_backbone(path: Path, backbone: Backbone, network: SavedNetwork) -> None:
    """Write the network alone, as safetensors with what rebuilds it and a digest in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    metadata = {RECORDED: json.dumps(dump(network))}
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
    if run and not runs.is_finished(run):
        checkpoint = newest_checkpoint(run)
        if checkpoint is None:
            runs.read_config(run)  # which says so of a folder that is no run
            raise MissingError(f"run {path} holds no checkpoint yet; let `bowstore train` reach its first one")
        if ranks().first:
            say(f"run {run} is not finished: its newest checkpoint is used, of step {checkpoint['step']}")
    else:
        path = run / runs.BACKBONE_FILE if run else path
        data = _file_bytes(path, "file" if runs.is_export(path) else "checkpoint")
        if reads_as_safetensors(path, data[:64]):
            state, network = _export(data, path)
        else:
            checkpoint = _checkpoint(data, path)
    if checkpoint:
        state, network = checkpoint["backbone"], network_of(checkpoint["config"], str(path))
    if run is not None:
        _check_own(run, network, finished=checkpoint is None)
    backbone = network.fresh()  # what a network draws when it is built, and does not save, is that of the run
    load_weights(backbone, state, str(path))
    return LoadedBackbone(backbone.eval(), network)


def _check_own(run: Path, network: SavedNetwork, *, finished: bool) -> None:
    """Compare the network in a run's export or checkpoint with the run's: another run's file is whole, too."""
    path = run / runs.CONFIG_FILE
    if not path.exists() or not (found := other_network(network_of(runs.read_config(run), str(path)), network)):
        return
    if finished:
        raise MismatchError(f"{run / runs.BACKBONE_FILE} is of another run than {path} ({found}); {RESTORE_BOTH}")
    say(  # not an error: this is the state after a --resume that has not reached a checkpoint yet
        f"warning: the newest checkpoint of {run} was written under another configuration than its {path.name} holds "
        f"({found})"
    )


RESTORE_BOTH = "restore both from one copy"


def other_network(old: SavedNetwork, new: SavedNetwork, *, free: Sequence[str] = ()) -> str | None:
    """The first thing in which two networks differ, but for keys in `free`, in words; None for nothing."""
    return next(iter(value_differences(dump(old), dump(new), free=free)), None)


def load_weights(module: torch.nn.Module, state: dict[str, torch.Tensor], origin: str) -> None:
    """Load a state dict strictly.

    Raises:
        MismatchError: keys or shapes that do not fit, with counts and the first of them.
    """
    own = module.state_dict()
    names = {
        "missing": sorted(own.keys() - state.keys()),
        "unknown": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)}, not {tuple(value.shape)}"
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    if found := [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in names.items() if names]:
        raise MismatchError(
            f"{origin} does not fit the network: {', '.join(found)}; it was trained with another model.arch or other "
            f"settings of its task (task.blocks was 1 before there was that setting): restore them, or train under "
            f"another --name"
        )
    put_weights(module, state)


def load_export(path: Path) -> tuple[dict[str, torch.Tensor], SavedNetwork]:
    """The tensors of an exported network, checked, and what rebuilds it.

    Older files hold the whole configuration of their run instead, of which this is a part.

    Raises:
        MissingError: no such file.
        CorruptError: damaged.
        MismatchError: not written by bowstore.
        OSError: the machine could not read it, which says nothing about the file.
    """
    return _export(_file_bytes(path, "file"), path)


def _export(data: bytes, path: Path) -> tuple[dict[str, torch.Tensor], SavedNetwork]:
    if kind := other_kind(io.BytesIO(data)):
        raise CorruptError(f"{path} is no network that bowstore exported: it is {kind}")
    try:
        tensors = safetensors.torch.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        values = json.loads(metadata.get(RECORDED, "null"))
    except Exception as error:  # damaged bytes end in errors of any kind
        if is_machine_error(error):
            raise
        raise CorruptError(f"{path} is not a whole safetensors file ({first_line(error)}); {_REDO}") from error
    digest = metadata.pop("digest", None)
    if values is None and digest is None:
        raise MismatchError(_foreign(path, "was not written by bowstore (no network is recorded in it)", metadata))
    if digest is None and len(metadata) == 1:
        say(f"{path} was written before exported networks had a digest: its weights were not checked")
    elif digest != content_digest({"metadata": metadata, "tensors": tensors}):
        raise CorruptError(f"{path} differs from the digest that was recorded in it when it was written; {_REDO}")
    return tensors, network_of(values if isinstance(values, dict) else {}, str(path))


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


def recorded_network(metadata: Mapping[str, Any], path: Path) -> SavedNetwork | None:
    """The network that a file's metadata describe, where bowstore wrote it, for itself or for other code."""
    record = metadata.get(RECORDED, metadata.get(EXPORTED))
    try:
        values = json.loads(record) if isinstance(record, str) else record
    except ValueError:
        values = None
    return network_of(values, str(path)) if isinstance(values, dict) and "model" in values else None


def _foreign(path: Path, is_not: str, metadata: Mapping[str, Any]) -> str:
    """What to do with a file that is no run's network."""
    if network := recorded_network(metadata, path):
        return (
            f"{path} is the network of run {network.name} as `bowstore export` wrote it for other code; give the run, "
            f"or architecture and file: --arch {network.model.arch} --weights {path}"
        )
    return f"{path} {is_not}; weights of other codebases go with an architecture: --arch timm:NAME --weights {path}"
