"""What is taken of a network for a classifier: its pooled output, or average-pooled maps of its layers.

Legend: B batch, C H W of the images, c channels, h w places of a map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from bowstore.errors import UsageError
from bowstore.models.backbone import Backbone, mean_pool
from bowstore.models.taps import without_data

MAX_DIMS = 9216


@dataclass(frozen=True)
class WindowPool:
    """Average pooling by a sliding square window, in places of the map.

    Attributes:
        kernel: side of the window.
        stride: step of the window.
        padding: border of zeros.
        count_padding: True divides by all cells of the window (PyTorch's default, VISSL); False by those
            inside the map (Caffe2's, FAIR).
    """

    kernel: int
    stride: int
    padding: int = 0
    count_padding: bool = False

    def __call__(self, maps_Bchw: Tensor) -> Tensor:
        """Pooled maps (B, c, rows, columns)."""
        return F.avg_pool2d(maps_Bchw, self.kernel, self.stride, self.padding, count_include_pad=self.count_padding)

    def __str__(self) -> str:
        return f"average {self.kernel}/{self.stride}/{self.padding}"


@dataclass(frozen=True)
class GridPool:
    """Average pooling to a grid of nearly equal, possibly overlapping cells (PyTorch's adaptive pooling)."""

    rows: int
    columns: int

    def __call__(self, maps_Bchw: Tensor) -> Tensor:
        """Pooled maps (B, c, rows, columns)."""
        return F.adaptive_avg_pool2d(maps_Bchw, (self.rows, self.columns))

    def __str__(self) -> str:
        return f"average grid {self.rows}x{self.columns}"


Pool = WindowPool | GridPool

# Pools of the FAIR benchmark for ResNet-50 at 224 pixels, by channels and side of the map (protocols 3.3):
# (kernel, stride, padding).
PUBLISHED_WINDOWS: Mapping[tuple[int, int], tuple[int, int, int]] = {
    (64, 112): (10, 10, 4),
    (64, 56): (5, 5, 2),
    (256, 56): (16, 8, 0),
    (512, 28): (13, 5, 0),
    (1024, 14): (8, 3, 0),
    (2048, 7): (6, 1, 0),
}


def choose_pool(channels: int, height: int, width: int, *, count_padding: bool = False) -> Pool:
    """The pooling that brings a map to about 9k dimensions; the one place that holds this rule.

    A map of a shape that ResNet-50 has at 224 pixels gets the published window (8/3/0 and 3x3x1024 for conv4,
    6/1/0 and 2x2x2048 for conv5). Any other gets the finest square grid with at most 9216 dimensions, not
    finer than the map, and at least one cell.

    Args:
        channels: c of the map.
        height: h of the map.
        width: w of the map.
        count_padding: see `WindowPool`; matters only where there is padding.
    """
    if height == width and (channels, height) in PUBLISHED_WINDOWS:
        return WindowPool(*PUBLISHED_WINDOWS[channels, height], count_padding=count_padding)
    side = max(1, isqrt(MAX_DIMS // channels))
    return GridPool(min(height, side), min(width, side))


@dataclass(frozen=True)
class Tap:
    """Where a feature is taken: a layer and how its map is pooled, if it is; no layer means the network's output."""

    layer: str | None
    pool: Pool | None = None

    def __str__(self) -> str:
        return f"{self.layer} {self.pool or 'map'}" if self.layer else "pooled output"


POOLED: Mapping[str, Tap] = {"pooled": Tap(None)}


def layer_taps(
    backbone: Backbone,
    layers: Sequence[str],
    *,
    size: int,
    everywhere: bool = False,
    count_padding: bool = False,
) -> dict[str, Tap]:
    """Taps of named layers, each pooled to about 9k dimensions (`choose_pool`), by layer.

    Args:
        backbone: the network.
        layers: its names, or another library's for the same (`layer3`): a tap has the backbone's own.
        size: side of the square input, pixels.
        everywhere: True pools each map to one average over all places (obow) instead.
        count_padding: see `WindowPool`.

    Raises:
        UsageError: a layer that the backbone does not have, none at all, or one twice.
    """
    if not layers:
        raise UsageError(f"no layers given; those of {backbone.arch} are {', '.join(backbone.layers)}")
    names = [backbone.resolve(layer) for layer in layers]
    if len(set(names)) < len(names):
        raise UsageError(f"layers {', '.join(layers)} name {', '.join(names)}: give each layer once")
    with torch.no_grad():
        maps = without_data(backbone).eval().feature_maps(torch.zeros(1, 3, size, size, device="meta"), names)
    return {
        layer: Tap(
            layer,
            GridPool(1, 1) if everywhere else choose_pool(*maps[layer].shape[1:], count_padding=count_padding),
        )
        for layer in names
    }


def named_taps(backbone: Backbone, names: Sequence[str] | None, *, size: int) -> dict[str, Tap]:
    """Taps of layers, each pooled to about 9k dimensions, and of the network's output, which goes by `pooled`.

    Args:
        backbone: the network.
        names: of layers, or `pooled`; None for all stages and the output.
        size: side of the square input, pixels.

    Raises:
        UsageError: as `layer_taps`.
    """
    layers = [name for name in names or backbone.layers if name not in POOLED]
    taps = layer_taps(backbone, layers, size=size) if layers else {}
    return {**taps, **POOLED} if not names or "pooled" in names else taps


def tapped(backbone: Backbone, images_BCHW: Tensor, taps: Mapping[str, Tap]) -> dict[str, Tensor]:
    """Pooled maps (B, c, cells) of one batch by the tap's name; the network runs once for all of them together."""
    last = backbone.layers[-1]  # whose map is pooled for the output
    maps = backbone.feature_maps(images_BCHW, sorted({tap.layer or last for tap in taps.values()}))
    return {name: _pooled(maps[tap.layer or last], tap) for name, tap in taps.items()}


def pooled_shapes(backbone: Backbone, taps: Mapping[str, Tap], size: int) -> list[tuple[int, int]]:
    """(c, cells) of the pooled maps of square images of a side, in the order of the taps; nothing is computed."""
    images = torch.zeros(1, 3, size, size, device="meta")
    with torch.no_grad():
        maps = tapped(without_data(backbone).eval(), images, taps)
    return [(map_1cn.shape[1], map_1cn.shape[2]) for map_1cn in maps.values()]


def _pooled(map_Bchw: Tensor, tap: Tap) -> Tensor:
    if tap.layer is None:
        return mean_pool(map_Bchw)[:, :, None]
    return (tap.pool(map_Bchw) if tap.pool else map_Bchw).flatten(2)
