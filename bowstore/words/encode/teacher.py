"""The frozen network whose feature maps become words.

Legend: B batch, C channels, H W pixels, c channels of a layer, h w word grid.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bowstore.config import Compile
from bowstore.data.views import CleanView, clean_view
from bowstore.errors import UsageError
from bowstore.exact import exact_float32
from bowstore.models.arch import StageShape
from bowstore.models.backbone import Backbone
from bowstore.models.compiled import EAGER, FROZEN, Compiled, compile_frozen, way_of
from bowstore.models.memory import FROZEN_FORMAT
from bowstore.models.opened import OpenedNetwork, Origin, resized
from bowstore.models.weights import finite_weights, weights_sha256
from bowstore.words.encode.config import word_grid

Precision = Literal["float32", "bfloat16"]
_ROUNDING = {"float32": 1e-4, "bfloat16": 0.05}  # what two ways of computing may differ by, of the largest value


@dataclass(frozen=True)
class Teacher:
    """A frozen backbone and the layers whose maps become words.

    Attributes:
        backbone: in eval mode, without gradients, on its device.
        layers: their maps, without the border, by the backbone's own names, in the order they were asked for.
        view: the clean view it sees.
        origin: where it comes from.
        sha256: of its weights as they are used, heads left out.
        precision: of its arithmetic.
        border: cells left out at each side of the maps.
        compiled: what runs the backbone; None for the backbone as it is.
    """

    backbone: Backbone
    layers: dict[str, StageShape]
    view: CleanView
    origin: Origin
    sha256: str
    precision: Precision = "float32"
    border: int = 0
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
            maps = self.compiled(images_BCHW) if self.compiled else self._run(self.backbone, images_BCHW)
        inner = slice(self.border, -self.border or None)
        return {name: map_Bchw[:, :, inner, inner] for name, map_Bchw in maps.items()}

    def _run(self, backbone: Backbone, images_BCHW: Tensor) -> dict[str, Tensor]:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            maps = backbone.feature_maps(images_BCHW, list(self.layers))
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

    def provenance(self, layer: str) -> dict[str, Any]:
        """What a word store records of it for one of its layers."""
        return {
            "arch": self.backbone.arch,
            "layer": layer,
            "weights_sha256": self.sha256,
            "precision": self.precision,
            **asdict(self.origin),
        }


@torch.no_grad()
def freeze_teacher(
    opened: OpenedNetwork,
    layers: Sequence[str],
    device: torch.device,
    *,
    size: int | None = None,
    resize: int | None = None,
    precision: Precision = "float32",
    border: int = 0,
) -> Teacher:
    """Freeze a network: eval mode, no gradients, on `device`.

    Args:
        opened: the network, which is changed.
        layers: whose maps are wanted; their order is kept.
        device: where it runs.
        size: side of the square input, pixels; None for the network's own. The short side before cropping changes
            with it.
        resize: short side before cropping, pixels; None for what follows from the size.
        precision: of its arithmetic; bfloat16 is autocast.
        border: cells left out at each side of the maps.

    Raises:
        UsageError: an unknown layer, one that gives no map or is named twice, or a size or border that does not fit.
        DataError: weights that are not finite.
    """
    if not layers:
        raise UsageError(
            "no layer was named; give --layer, for example --layer conv4; `bowstore layers ARCH` lists them"
        )
    view = clean_view(resized(opened.view, size, resize, what="the teacher's view"))
    backbone = opened.backbone
    names = [backbone.resolve(layer) for layer in layers]
    if len(set(names)) < len(names):
        raise UsageError(f"layers {', '.join(layers)} name {', '.join(names)}: give each layer once")
    state = backbone.state_dict()
    finite_weights(state, opened.origin.name)
    sha256 = weights_sha256(state)
    backbone.eval().requires_grad_(False).to(device).to(memory_format=FROZEN_FORMAT)
    maps = backbone.feature_maps(torch.zeros(1, 3, view.size, view.size, device=device), names)
    shapes = ((name, maps[name].shape) for name in names)
    found = {name: StageShape(c, word_grid(border, name, (h, w))) for name, (_, c, h, w) in shapes}
    return Teacher(backbone, found, view, opened.origin, sha256, precision, border)
