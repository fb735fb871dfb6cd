"""The frozen network whose feature maps become words.

Legend: B batch, C channels, H W pixels, c channels of the layer, h w word grid.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bowstore.data.pipeline import CleanView, clean_view
from bowstore.models.registry import Backbone
from bowstore.models.weights import weights_sha256
from bowstore.words.assign import exact_float32

if TYPE_CHECKING:
    from bowstore.models.saved import LoadedBackbone


@dataclass(frozen=True)
class Teacher:
    """A frozen backbone and the layer that is looked at.

    Attributes:
        backbone: in eval mode, without gradients, on its device.
        layer: the backbone's own name of the layer.
        view: the clean view it was trained beside.
        name: the run it comes from.
        student: name of the configuration that trains on its words, if it names one.
        sha256: of its weights.
        channels: c.
        grid: (h, w).
    """

    backbone: Backbone
    layer: str
    view: CleanView
    name: str
    student: str | None
    sha256: str
    channels: int
    grid: tuple[int, int]

    @torch.no_grad()
    def maps(self, images_BCHW: Tensor) -> Tensor:
        """Feature maps (B, c, h, w) of normalised images, float32 without TF32 or autocast."""
        with exact_float32():
            return self.backbone.feature_maps(images_BCHW, (self.layer,))[self.layer].float()

    def provenance(self) -> dict[str, Any]:
        """What a word store records of it."""
        return {
            "arch": self.backbone.arch,
            "layer": self.layer,
            "weights_sha256": self.sha256,
            "name": self.name,
            "student": self.student,
        }


def load_teacher(path: Path, layer: str, device: torch.device) -> Teacher:
    """Load a trained backbone from a run directory, a checkpoint or an exported file, and freeze it.

    Raises:
        MissingError: nothing there.
        UsageError: the network has no such layer; lists those it has.
    """
    from bowstore.models.saved import load_backbone  # only here: the rest of words does not need train

    return freeze(load_backbone(path), layer, device)


@torch.no_grad()
def freeze(loaded: "LoadedBackbone", layer: str, device: torch.device) -> Teacher:
    """Make a teacher of a loaded backbone: eval mode, no gradients, on `device`.

    Raises:
        UsageError: the network has no such layer; lists those it has.
    """
    backbone = loaded.backbone
    layer = backbone.resolve(layer)
    sha256 = weights_sha256(backbone.state_dict())
    backbone.eval().requires_grad_(False).to(device)
    view = clean_view(loaded.view)
    images_BCHW = torch.zeros(1, 3, view.size, view.size, device=device)
    channels, height, width = backbone.feature_maps(images_BCHW, (layer,))[layer].shape[1:]
    return Teacher(
        backbone=backbone,
        layer=layer,
        view=view,
        name=loaded.name,
        student=loaded.config.get("student"),
        sha256=sha256,
        channels=channels,
        grid=(height, width),
    )
