"""The frozen network whose feature maps become words.

Legend: B batch, C channels, H W pixels, c channels of a layer, h w word grid.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bowstore.config import Compile
from bowstore.data.views import CleanView, clean_view
from bowstore.errors import UsageError
from bowstore.exact import exact_float32
from bowstore.models.backbone import Backbone
from bowstore.models.compiled import EAGER, FROZEN, Compiled, compile_frozen, way_of
from bowstore.models.memory import FROZEN_FORMAT
from bowstore.models.opened import OpenedNetwork, Origin, open_network, resized
from bowstore.models.record import NetworkRecord
from bowstore.models.weights import finite_weights, weights_sha256

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
    opened = open_network(spec, weights=weights, size=size, seed=seed)
    return freeze_teacher(opened, layers, device, size=size, resize=resize, precision=precision)


def freeze_teacher(
    opened: OpenedNetwork,
    layers: Sequence[str],
    device: torch.device,
    *,
    size: int | None = None,
    resize: int | None = None,
    precision: Precision = "float32",
) -> Teacher:
    """A network that was opened, as a teacher; as `load_teacher`."""
    if not layers:
        raise UsageError("the teacher has no layer to look at; name one, for example --layer conv4")
    view = clean_view(resized(opened.view, size, resize, what="the teacher's view"))
    teacher = _freeze(opened.backbone, opened.origin, layers, device, view)
    return replace(teacher, precision=precision)


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
