"""What `bowstore layers` prints: the layers of an architecture, their maps and words."""

from dataclasses import dataclass
from typing import Any

import torch

from bowstore.config import ModelConfig
from bowstore.errors import UsageError
from bowstore.models.backbone import LayerInfo
from bowstore.models.registry import build_backbone


@dataclass(frozen=True)
class LayerReport:
    """The layers of an architecture for one size of images.

    Attributes:
        arch: its name.
        size: side of the square input, pixels.
        stages: the layers that evaluations and training go by, in order of depth.
        prefix_tokens: class and register tokens that are left out of maps.
        layers: those listed, in order of depth.
        left_out: layers inside these that are not listed.
    """

    arch: str
    size: int
    stages: tuple[str, ...]
    prefix_tokens: int
    layers: tuple[LayerInfo, ...]
    left_out: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "arch": self.arch,
            "size": self.size,
            "stages": list(self.stages),
            "prefix_tokens": self.prefix_tokens,
            "layers": [
                {
                    "name": layer.name,
                    "module": layer.module,
                    "channels": layer.channels,
                    "grid": list(layer.grid),
                    "words_per_image": layer.grid[0] * layer.grid[1],
                    "note": layer.note,
                }
                for layer in self.layers
            ],
            "left_out": self.left_out,
        }

    def text(self) -> str:
        """A table for people."""
        width = max(len(layer.name) for layer in self.layers)
        lines = [
            f"{self.arch}, images of {self.size} x {self.size} pixels; * is a stage",
            f"  {'layer':{width}}  channels        map  words an image",
        ]
        for layer in self.layers:
            height, columns = layer.grid
            star = "*" if layer.name in self.stages else " "
            line = (
                f"{star} {layer.name:{width}}  {layer.channels:8}  {f'{height} x {columns}':>9}  {height * columns:14}"
            )
            lines.append(f"{line}  {layer.note}".rstrip())
        if self.prefix_tokens:
            lines.append(f"{self.prefix_tokens} class or register token(s) are left out of the maps")
        if self.left_out:
            lines.append(f"{self.left_out} more inside these: --all lists them")
        return "\n".join(lines)


def describe_layers(arch: str, size: int | None = None, *, everything: bool = False) -> LayerReport:
    """The layers of an architecture that give a map.

    Args:
        arch: `timm:NAME`, `torchvision:NAME`, `resnet50`, `wrn-28-10`...
        size: side of the square input, pixels; None for the network's own.
        everything: list every module, not only those two levels deep.

    Raises:
        UsageError: an unknown architecture, or a size that it does not take.
    """
    config = ModelConfig(arch=arch)
    try:
        with torch.device("meta"):  # no weights are drawn: a network of 10^9 in a second
            backbone = build_backbone(config, size)
    except UsageError:
        backbone = build_backbone(config, size)  # a few networks look at values while they are built
    size = size or backbone.image_size
    table = [layer for layer in backbone.layer_table(size).values() if not layer.passes_on]
    shown = [layer for layer in table if everything or layer.name in backbone.layers or layer.name.count(".") < 2]
    return LayerReport(
        backbone.arch, size, backbone.layers, backbone.layout.prefix_tokens, tuple(shown), len(table) - len(shown)
    )
