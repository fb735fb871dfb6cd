"""Trained networks on disk: runs, checkpoints and exported files, and how to get the network back.

A checkpoint is read with `weights_only=True`. A finished run also holds `backbone.safetensors`, the network alone
with what is needed to rebuild it.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bowstore.config import ModelConfig, TrainConfig, ViewConfig, dump, validate
from bowstore.errors import CorruptError, MismatchError, MissingError
from bowstore.files import atomic_file
from bowstore.models.registry import Backbone, build_backbone
from bowstore.yaml_file import read_yaml

BACKBONE_FILE = "backbone.safetensors"
CONFIG_FILE = "config.yaml"
CHECKPOINT_VERSION = 1
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


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain values are ever unpickled.

    Raises:
        CorruptError: damaged.
        MismatchError: another format version, or weights of another codebase.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise MissingError(f"no checkpoint {path}") from error
    except Exception as error:
        raise CorruptError(f"{path} is not a whole bowstore checkpoint ({_first_line(error)})") from error
    if not isinstance(state, dict) or "version" not in state:
        raise MismatchError(f"{path} is no checkpoint of bowstore; {_foreign(path)}")
    if state["version"] != CHECKPOINT_VERSION:
        raise MismatchError(
            f"{path} has checkpoint format {state['version']}, this bowstore reads {CHECKPOINT_VERSION}"
        )
    return state


def save_backbone(path: Path, backbone: Backbone, config: TrainConfig) -> None:
    """Write the network alone, as safetensors with the run's configuration in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    with atomic_file(path) as file:
        file.write(save(tensors, metadata={"bowstore": json.dumps(dump(config))}))


def load_backbone(path: Path) -> LoadedBackbone:
    """Load a network from a run directory, a checkpoint, or an exported `.safetensors` file.

    Raises:
        MissingError: nothing there, or a run without a checkpoint yet.
        CorruptError: a damaged file.
        MismatchError: weights that do not fit the network; the message names the first keys.
    """
    if path.is_dir():
        newest = [path / BACKBONE_FILE] if (path / BACKBONE_FILE).exists() else checkpoints(path)
        if not newest:
            raise MissingError(f"run {path} holds no checkpoint yet; let `bowstore train` reach its first one")
        path = newest[0]
    if path.suffix == ".safetensors":
        state, values = _read_safetensors(path)
    else:
        checkpoint = load_checkpoint(path)
        state, values = checkpoint["backbone"], checkpoint["config"]
    config = validate(TrainConfig, values, str(path))
    backbone = build_backbone(config.model)
    load_weights(backbone, state, str(path))
    return LoadedBackbone(backbone.eval(), config.model, config.view, config.name, values)


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


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    found = [p for p in (run / "checkpoints").glob("step-*.pt") if _CHECKPOINT.fullmatch(p.name)]
    return sorted(found, reverse=True)


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            values = json.loads((file.metadata() or {})["bowstore"])
            return {name: file.get_tensor(name) for name in file.keys()}, values
    except FileNotFoundError as error:
        raise MissingError(f"no file {path}") from error
    except KeyError as error:
        raise MismatchError(f"{path} was not written by bowstore (no configuration in it); {_foreign(path)}") from error
    except (SafetensorError, ValueError) as error:
        raise CorruptError(f"{path} is not a whole safetensors file ({_first_line(error)})") from error


def _foreign(path: Path) -> str:
    return f"weights of other codebases go with an architecture: --teacher timm:NAME --weights {path}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
