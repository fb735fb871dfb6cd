"""What `bowstore layers` prints: an architecture's layers, their maps and words, and what it and heads on it cost."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from bowstore.config import ModelConfig
from bowstore.errors import UsageError
from bowstore.models.backbone import LayerInfo
from bowstore.models.cost import Cost, head_cost, trunk_cost
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
        trunk: what the network costs.
        heads: what the heads that were asked for cost.
    """

    arch: str
    size: int
    stages: tuple[str, ...]
    prefix_tokens: int
    layers: tuple[LayerInfo, ...]
    left_out: int
    trunk: Cost
    heads: tuple[Cost, ...] = ()

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
            "trunk": {"parameters": self.trunk.parameters, "multiply_adds": self.trunk.multiply_adds},
            "heads": [asdict(head) for head in self.heads],
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
        trunk = self.trunk
        costs = [f"{trunk.parameters:,} parameters", f"{_giga(trunk)} an image, forward"]
        lines.append(f"trunk: {', '.join(costs)}")
        for head in self.heads:
            outputs = f" of {head.outputs} outputs" if head.outputs else ""
            inputs = f", for {head.inputs} patches" if head.inputs > 1 else ""
            parameters = 100 * head.parameters / trunk.parameters
            multiply_adds = 100 * head.multiply_adds / (head.inputs * trunk.multiply_adds)
            lines.append(
                f"head {head.name}{outputs}: {head.parameters:,} parameters ({_short(parameters, 2)} % of the "
                f"trunk's), {_giga(head)} ({_short(multiply_adds, 2)} %){inputs}"
            )
        return "\n".join(lines)


def _giga(cost: Cost) -> str:
    return f"{_short(cost.multiply_adds / 1e9, 4)} G multiply-adds"


def _short(value: float, digits: int) -> str:
    """A number rounded to so many digits, without an exponent: 0.000064, or 240."""
    return np.format_float_positional(value, precision=digits, fractional=False, unique=False, trim="-")


def describe_layers(
    config: ModelConfig,
    size: int | None = None,
    *,
    everything: bool = False,
    heads: Sequence[str] = (),
    outputs: int | None = None,
) -> LayerReport:
    """The layers of an architecture that give a map.

    Args:
        config: `timm:NAME`, `torchvision:NAME`, `resnet50`, `wrn-28-10`..., and the strides of a wide one.
        size: side of the square input, pixels; None for the network's own.
        everything: list every module, not only those two levels deep.
        heads: names of heads whose cost is told, too (`bowstore.models.cost.HEADS`).
        outputs: words or classes of those that have an output for each.

    Raises:
        UsageError: an unknown architecture or head, a size that the network does not take, or outputs are missing.
    """
    try:
        with torch.device("meta"):  # no weights are drawn: a network of 10^9 in a second
            backbone = build_backbone(config, size)
    except UsageError:
        backbone = build_backbone(config, size)  # a few networks look at values while they are built
    size = size or backbone.image_size
    table = [layer for layer in backbone.layer_table(size).values() if not layer.passes_on]
    shown = [layer for layer in table if everything or layer.name in backbone.layers or layer.name.count(".") < 2]
    return LayerReport(
        arch=backbone.arch,
        size=size,
        stages=backbone.layers,
        prefix_tokens=backbone.layout.prefix_tokens,
        layers=tuple(shown),
        left_out=len(table) - len(shown),
        trunk=trunk_cost(backbone, size),
        heads=tuple(head_cost(name, backbone, size, outputs) for name in heads),
    )
