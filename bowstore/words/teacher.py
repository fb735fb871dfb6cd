"""The frozen network whose feature maps become words.

Legend: B batch, C channels, H W pixels, c channels of a layer, h w word grid.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import floor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bowstore.config import Compile, ModelConfig, ViewConfig, validate
from bowstore.data.views import CleanView, clean_view
from bowstore.errors import MismatchError, UsageError
from bowstore.exact import exact_float32
from bowstore.models.arch import V1, is_arch
from bowstore.models.backbone import Backbone
from bowstore.models.compiled import EAGER, FROZEN, Compiled, compile_frozen, way_of
from bowstore.models.layouts import load_foreign, read_weights
from bowstore.models.library import library_view
from bowstore.models.memory import FROZEN_FORMAT
from bowstore.models.record import NetworkRecord
from bowstore.models.registry import build_backbone
from bowstore.models.saved import SavedNetwork, load_backbone
from bowstore.models.weights import finite_weights, weights_sha256
from bowstore.runs import read_lineage, run_of

Precision = Literal["float32", "bfloat16"]
_ROUNDING = {"float32": 1e-4, "bfloat16": 0.05}  # what two ways of computing may differ by, of the largest value


@dataclass(frozen=True)
class TeacherLayer:
    """A layer of the network whose maps become words.

    Attributes:
        name: the backbone's own name of it.
        channels: c.
        grid: (h, w).
    """

    name: str
    channels: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class Origin:
    """Where a network comes from, as word stores record it.

    Attributes:
        name: the run it comes from, the architecture, or the configuration that it was not trained by.
        weights_file: name of the file that holds the weights; None for random ones.
        weights_layout: how that file was read, or how random weights were drawn.
        lineage: what its run was made of (`bowstore.runs.read_lineage`); None without a run, or where that is unknown.
    """

    name: str
    weights_file: str | None
    weights_layout: str
    lineage: dict[str, Any] | None = None


@dataclass(frozen=True)
class Teacher:
    """A frozen backbone and the layers whose maps become words.

    Attributes:
        backbone: in eval mode, without gradients, on its device.
        layers: in the order they were asked for.
        view: the clean view it sees.
        origin: where it comes from.
        sha256: of its weights as they are used, heads left out.
        precision: of its arithmetic.
        compiled: what runs the backbone; None for the backbone as it is.
    """

    backbone: Backbone
    layers: tuple[TeacherLayer, ...]
    view: CleanView
    origin: Origin
    sha256: str
    precision: Precision = "float32"
    compiled: Compiled | None = None

    @property
    def trunk(self) -> str:
        """How the network is run, as word stores record it."""
        return FROZEN if self.compiled else EAGER

    def way_of(self, setting: Compile, images: int) -> str:
        """Whether its network is compiled for a job of so many images (`bowstore.models.compiled.way_of`)."""
        return way_of(setting, self.backbone, self._run, images=images, size=self.view.size, device=self._device)

    def compiled_for(self, batch: int) -> "Teacher":
        """The same teacher, its network compiled for batches of so many images; for the main thread.

        Raises:
            CannotCompileError: there is no compiler, or it fails on this network.
        """
        with exact_float32():
            compiled = compile_frozen(
                self.backbone, self._run, batch=batch, size=self.view.size, device=self._device, threads=1,
                tolerance=_ROUNDING[self.precision],
            )  # fmt: skip
        return replace(self, compiled=compiled)

    @torch.no_grad()
    def maps(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Feature maps (B, c, h, w) by layer of normalised images, float32, in one pass no deeper than needed.

        Float32 arithmetic is without TF32, whatever the caller's settings are. Not for several threads at a time:
        each needs its `replica`.
        """
        with exact_float32():
            return self.compiled(images_BCHW) if self.compiled else self._run(self.backbone, images_BCHW)

    def _run(self, backbone: Backbone, images_BCHW: Tensor) -> dict[str, Tensor]:
        with self._autocast():
            maps = backbone.feature_maps(images_BCHW, [layer.name for layer in self.layers])
        return {name: map_Bchw.float() for name, map_Bchw in maps.items()}

    def replica(self) -> "Teacher":
        """The same teacher for another thread: modules of its own, which share all tensors; or the same, compiled."""
        if self.compiled:
            return self
        tensors: dict[int, Any] = {
            id(tensor): tensor for tensor in (*self.backbone.parameters(), *self.backbone.buffers())
        }
        return replace(self, backbone=copy.deepcopy(self.backbone, tensors))

    @property
    def _device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def provenance(self, layer: str) -> dict[str, Any]:
        """What a word store records of it for one of its layers."""
        return {
            "arch": self.backbone.arch,
            "layer": layer,
            "weights_sha256": self.sha256,
            "precision": self.precision,
            **asdict(self.origin),
        }


def load_teacher(
    spec: str | Path | NetworkRecord,
    layers: Sequence[str],
    device: torch.device,
    *,
    weights: Path | None = None,
    size: int | None = None,
    resize: int | None = None,
    seed: int = 0,
    precision: Precision = "float32",
) -> Teacher:
    """Load a network and freeze it: eval mode, no gradients, on `device`. Nothing is ever downloaded.

    Args:
        spec: a run directory, checkpoint or exported `.safetensors` of bowstore; or an architecture:
            `torchvision:NAME`, `timm:NAME`, `resnet50`, `wrn-28-10`...; or the record of a network, for the one that
            its training starts from.
        layers: whose maps are wanted; their order is kept.
        device: where it runs.
        weights: an architecture's weights, a file of any layout that `bowstore.models.layouts` understands; None
            for random ones.
        size: side of the square input, pixels; None for the teacher's own. The short side before cropping
            changes with it.
        resize: short side before cropping, pixels; None for the teacher's own.
        seed: of an architecture's random weights.
        precision: of its arithmetic; bfloat16 is autocast.

    Raises:
        MissingError: no such run or file.
        UsageError: an unknown architecture or layer, a layer that gives no map, or a size that does not fit.
        MismatchError: weights of another network; names the first tensors.
        DataError: weights that are not finite, or a file that holds code.
    """
    if not layers:
        raise UsageError("the teacher has no layer to look at; name one, for example --layer conv4")
    if isinstance(spec, NetworkRecord):
        backbone, view, origin = _initial(spec, weights)
    elif Path(spec).exists() or not is_arch(str(spec)):
        backbone, view, origin = _open_run(Path(spec), weights)
    else:
        backbone, view, origin = _open_arch(str(spec), weights, size, seed)
    teacher = _freeze(backbone, origin, layers, device, _overridden(view, size, resize))
    return replace(teacher, precision=precision)


def _initial(network: NetworkRecord, weights: Path | None) -> tuple[Backbone, ViewConfig, Origin]:
    _refuse_weights(weights, f"configuration {network.name}")
    backbone = SavedNetwork(**dict(network)).fresh()
    return backbone, network.view, Origin(network.name, None, _drawn(network.seed))


def _open_run(path: Path, weights: Path | None) -> tuple[Backbone, ViewConfig, Origin]:
    _refuse_weights(weights, str(path))
    loaded = load_backbone(path)
    origin = Origin(loaded.saved.name, path.name, "bowstore run", read_lineage(run_of(path)))
    return loaded.backbone, loaded.saved.view, origin


def _refuse_weights(weights: Path | None, what: str) -> None:
    if weights:
        raise UsageError(f"weights {weights} go with an architecture (timm:NAME, torchvision:NAME), not with {what}")


def _drawn(seed: int) -> str:
    """How random weights were drawn, as word stores record it."""
    return f"random, seed {seed}"


def _open_arch(arch: str, weights: Path | None, size: int | None, seed: int) -> tuple[Backbone, ViewConfig, Origin]:
    model, view = ModelConfig(arch=arch), library_view(arch) if ":" in arch else ViewConfig()
    file = read_weights(weights) if weights else None
    if file and file.network:  # what no tensor says: strides, and the images that it takes
        _check_strides(arch, file.network.model.arch, file.path)
        model, view = model.model_copy(update={"strides": file.network.model.strides}), file.network.view
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(model, size)
    if file is None:
        return backbone, view, Origin(backbone.arch, None, _drawn(seed))
    understood = load_foreign(backbone, file)
    return backbone, view, Origin(backbone.arch, understood.file, understood.text())


def _check_strides(arch: str, theirs: str, path: Path) -> None:
    """Refuse weights of a network that has the same tensors and its strides elsewhere."""
    ours, its = (name.rpartition(":")[2] for name in (arch, theirs))
    if ours != its and ours.removesuffix(V1) == its.removesuffix(V1):
        raise MismatchError(
            f"{path} is of {theirs}, which has its strides elsewhere than {arch}; name {theirs} with these weights"
        )


def _overridden(view: ViewConfig, size: int | None, resize: int | None) -> CleanView:
    """The clean view, of another size where one is given."""
    values = view.model_dump()
    if size and view.resize:
        values["resize"] = floor(size * view.resize / view.size)
    values |= {name: value for name, value in (("size", size), ("resize", resize)) if value}
    return clean_view(validate(ViewConfig, values, "the teacher's view"))


@torch.no_grad()
def _freeze(
    backbone: Backbone, origin: Origin, layers: Sequence[str], device: torch.device, view: CleanView
) -> Teacher:
    names = [backbone.resolve(layer) for layer in layers]
    if len(set(names)) < len(names):
        raise UsageError(f"layers {', '.join(layers)} name {', '.join(names)}: give each layer once")
    state = backbone.state_dict()
    finite_weights(state, origin.name)
    sha256 = weights_sha256(state)
    backbone.eval().requires_grad_(False).to(device).to(memory_format=FROZEN_FORMAT)
    maps = backbone.feature_maps(torch.zeros(1, 3, view.size, view.size, device=device), names)
    shapes = {name: (c, (h, w)) for name, map_Bchw in maps.items() for _, c, h, w in [map_Bchw.shape]}
    found = tuple(TeacherLayer(name, *shapes[name]) for name in names)
    return Teacher(backbone, found, view, origin, sha256)
