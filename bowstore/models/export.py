"""Networks for other code: files that torchvision, timm, Detectron2 or a stand-alone definition load by their names."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from bowstore import __version__
from bowstore.config import ExportConfig, dump
from bowstore.errors import UsageError
from bowstore.files import atomic_file, check_free
from bowstore.models import wide_resnet
from bowstore.models.arch import RESNETS, V1, wide_sizes
from bowstore.models.backbone import Backbone, mean_pool
from bowstore.models.detectron2 import detectron2_lines, detectron2_model
from bowstore.models.library import library_backbone
from bowstore.models.residual import WIDE, stride_first
from bowstore.models.saved import EXPORTED, LoadedBackbone, load_backbone
from bowstore.models.weights import put_weights
from bowstore.remote import local_only

_SAFETENSORS = ".safetensors"
_SUFFIXES = (".pth", ".pt", _SAFETENSORS)
_PICKLE = ".pkl"
_MOVED = (  # as `stride_first`
    "for block in [module for module in net.modules() if isinstance(module, torchvision.models.resnet.Bottleneck)]:",
    "    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride",
)
_TOLERANCE = 1e-5  # of the largest value of a map, between two libraries' code for one network


@dataclass(frozen=True)
class Exported:
    """A network that was written for other code.

    Attributes:
        out: the file.
        definition: the file that defines the network, where no library does.
        python: lines that load it, without bowstore.
        record: what the file says of itself: architecture, run, and the images that the network takes.
    """

    out: Path
    definition: Path | None
    python: tuple[str, ...]
    record: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        definition = str(self.definition) if self.definition else None
        return {"out": str(self.out), "definition": definition, **self.record, "python": list(self.python)}

    def text(self) -> str:
        """What was written and how it is loaded, for people."""
        record, model, view = self.record, self.record["model"], self.record["view"]
        side = view["size"]
        cut = f"short side {view['resize']}, centre {side} x {side}" if view["resize"] else f"whole, {side} x {side}"
        lines = [
            f"{self.out}: {model['arch']} of run {record['name']}, without a classifier; {record['features']} features",
            f"images: {cut}; mean {_listed(view['mean'])}, deviation {_listed(view['std'])}",
            *([f"{self.definition}: its definition"] if self.definition else []),
            *(f"  {line}" for line in self.python),
        ]
        return "\n".join(lines)


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def export_network(source: Path, out: Path, config: ExportConfig) -> Exported:
    """Write a network, without its classifier, under the names of other code.

    A file that an earlier export wrote is replaced, no other one.

    Args:
        source: run directory, checkpoint or `backbone.safetensors`.
        out: the file: `.safetensors`, or `.pth` or `.pt` for torch.save of a state dict; `.pkl` for Detectron2.
        config: whose names.

    Raises:
        UsageError: the format does not hold this network, or the file cannot have that name or lie there.
        MissingError: no such network, or no folder to write into.
        CorruptError: its file is damaged.
        MismatchError: its file is not what it should be.
    """
    local_only(out, "write the network to a file here, then copy it there")
    check_free(out, mark=EXPORTED.encode(), command="bowstore export", example=f"network{_SAFETENSORS}")
    if (config.format == "detectron2") != (out.suffix == _PICKLE):
        raise UsageError(
            f"{out.name} does not go with --format {config.format}: files for Detectron2 end with {_PICKLE}, and no "
            "others do; name it so"
        )
    if out.suffix not in (*_SUFFIXES, _PICKLE):
        raise UsageError(f"{out} must end with .pth or .pt (a file of torch.save) or {_SAFETENSORS}; name it so")
    if config.format == "safetensors" and out.suffix != _SAFETENSORS:
        raise UsageError(
            f"--format safetensors writes files that end with {_SAFETENSORS}, and {out.name} does not; name it so, or "
            f"give --format torchvision or timm"
        )
    loaded = load_backbone(source)
    saved, view = dump(loaded.saved), dump(loaded.saved.view)
    record = {
        "format": config.format,
        **{name: saved[name] for name in ("name", "task", "model")},
        "features": loaded.backbone.features,
        "view": {name: view[name] for name in ("size", "resize", "mean", "std")},
        "bowstore": __version__,
    }
    if config.format == "detectron2":
        return _for_detectron2(loaded, out, record)
    with torch.random.fork_rng(devices=[]):  # what a network draws when it is built is not the caller's
        wide = wide_sizes(loaded.backbone.arch)
        made = _defined(loaded, *wide, config.format) if wide else _in_library(loaded.backbone, config.format)
    definition = _write_definition(out.parent) if wide else None
    _write(out, made.network, record)
    plain = out.suffix != _SAFETENSORS
    imports = ", ".join(["torch" if plain else "safetensors.torch, torch", *made.imports])
    load = f'torch.load("{out}")' if plain else f'safetensors.torch.load_file("{out}")'
    loading = [f"net.load_state_dict({load})"]
    if not plain and not _loads_plain_tensors(made.network):
        loading = ["state = net.state_dict()", f"state.update({load})", "net.load_state_dict(state)"]
    return Exported(out, definition, (f"import {imports}", *made.python, *loading), record)


class _Made(NamedTuple):
    """A network of other code with the weights, and the Python that makes it there, after the imports."""

    network: nn.Module
    imports: tuple[str, ...]
    python: tuple[str, ...]


def _defined(loaded: LoadedBackbone, depth: int, width: int, form: str) -> _Made:
    """A wide residual network, as its definition has it."""
    if form != "safetensors":
        raise UsageError(
            f"{form} has no network {loaded.backbone.arch}; --format safetensors holds it, with its definition in "
            f"Python beside it"
        )
    strides = loaded.saved.model.strides
    network = wide_resnet.WideResNet(depth, width, strides)
    put_weights(network, _renamed(loaded.backbone, WIDE))
    call = f"net = WideResNet({depth}, {width}, strides={strides})"
    return _Made(network, (), (f"from {WIDE} import WideResNet", call))


def _in_library(backbone: Backbone, form: str) -> _Made:
    """A library's network: that of another library holds it only if it has the same tensors and computes the same."""
    own, _, name = backbone.arch.rpartition(":")
    own = own or "torchvision"
    library = own if form == "safetensors" else form
    early = name.endswith(V1)  # no library has it: torchvision's with its strides moved
    held = "--format safetensors holds it" if early else f"--format {own} and --format safetensors hold it"
    name = name.removesuffix(V1) if early else name
    try:
        other = library_backbone(f"{library}:{name if library == own else name.partition('.')[0]}")
    except UsageError as error:
        raise UsageError(f"{library} has no network that {backbone.arch} could be loaded into; {held}") from error
    state = _renamed(backbone, own)
    shapes, wanted = ({key: tensor.shape for key, tensor in it.items()} for it in (state, other.network.state_dict()))
    if shapes != wanted:
        first = next(key for key in shapes | wanted if shapes.get(key) != wanted.get(key))
        raise UsageError(f"{other.arch} has other tensors than {backbone.arch} (the first is {first}); {held}")
    put_weights(other.network, state)
    if early and form == "safetensors":
        stride_first(other.network)
        return _Made(other.network, (library,), (*other.python, *_MOVED))
    if (library != own or early) and not _same_features(backbone, other.eval()):
        raise UsageError(f"{other.arch} has the tensors of {backbone.arch}, but computes something else; {held}")
    return _Made(other.network, (library,), other.python)


def _for_detectron2(loaded: LoadedBackbone, out: Path, record: dict[str, Any]) -> Exported:
    """A residual network as Detectron2 loads it."""
    backbone = loaded.backbone
    library, _, name = backbone.arch.rpartition(":")
    name = name.partition(".")[0]
    if name not in RESNETS:
        raise UsageError(
            f"--format detectron2 is for residual networks ({', '.join(RESNETS)}), and {backbone.arch} is none of "
            "them; --format safetensors holds it"
        )
    own = library in ("", "torchvision")  # of timm's, torchvision's network of the name has to compute the same
    with torch.random.fork_rng(devices=[]):
        state = _renamed(backbone, "torchvision") if own else _in_library(backbone, "torchvision").network.state_dict()
    with atomic_file(out) as file:
        pickle.dump({**detectron2_model(state), EXPORTED: json.dumps(record)}, file)
    return Exported(out, None, detectron2_lines(name, loaded.saved.view, str(out)), record)


def _loads_plain_tensors(network: nn.Module) -> bool:
    """Whether it does without the versions of its modules (see `put_weights`), which safetensors cannot hold."""
    try:
        network.load_state_dict(dict(network.state_dict()))
    except ValueError:
        return False
    return True


def _renamed(backbone: Backbone, names: str) -> dict[str, Tensor]:
    own = backbone.state_dict()
    return {spelt: own[name] for spelt, name in backbone.spellings()[names].items()}


@torch.no_grad()
def _same_features(ours: Backbone, theirs: Backbone) -> bool:
    """Whether two networks make the same of an image of noise: at their ends, or at their last stages.

    Libraries may differ in whether the end is a pooled map, and in which map is the last that counts as a stage.
    """
    side = ours.image_size
    noise_BCHW = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return _close(ours.trunk(noise_BCHW), theirs.trunk(noise_BCHW)) or _close(ours(noise_BCHW), theirs(noise_BCHW))


def _close(*values_B: Tensor) -> bool:
    ours_BC, theirs_BC = (mean_pool(value_B) if value_B.ndim == 4 else value_B for value_B in values_B)
    largest = ours_BC.abs().max()
    return ours_BC.shape == theirs_BC.shape and bool((ours_BC - theirs_BC).abs().max() <= _TOLERANCE * largest)


def _write_definition(folder: Path) -> Path:
    """Write the module that defines wide residual networks, which needs nothing but torch."""
    path, source = folder / f"{WIDE}.py", Path(wide_resnet.__file__).read_bytes()
    if path.exists() and path.read_bytes() != source:
        raise UsageError(
            f"{path} is there and is not the definition that goes with the network; move it away, or name a file in "
            f"another folder"
        )
    with atomic_file(path) as file:
        file.write(source)
    return path


def _write(out: Path, network: nn.Module, record: dict[str, Any]) -> None:
    state = network.state_dict()
    with atomic_file(out) as file:
        if out.suffix == _SAFETENSORS:
            tensors = {name: tensor.contiguous() for name, tensor in state.items()}
            file.write(safetensors.torch.save(tensors, metadata={"format": "pt", EXPORTED: json.dumps(record)}))
        else:
            # Torch keeps the versions of modules there, by their names; so the file is a state dict and no more.
            state._metadata[EXPORTED] = record  # type: ignore[attr-defined]
            torch.save(state, file)
