"""Names of architectures, and what is known of the built-in ones before they are built. Loads no torch.

Legend: h w feature map.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bowstore.config import ModelConfig
from bowstore.errors import UsageError, nearest

RESNETS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2", "resnet50-v1", "resnet101-v1", "resnet152-v1",
)  # fmt: skip
V1 = (
    "-v1"  # the stride of a bottleneck in its first convolution (He et al., 2015), not in the 3x3 as torchvision has it
)
RESNET_STAGES = {"conv2": "layer1", "conv3": "layer2", "conv4": "layer3", "conv5": "layer4"}
LIBRARIES = ("torchvision:", "timm:")
_OWN_NAMES = {theirs: ours for ours, theirs in RESNET_STAGES.items()} | {"maxpool": "pool1"}
OF_BASIC_BLOCKS = ("resnet18", "resnet34")
_STRIDES = {"conv1": 2, "pool1": 2, "conv2": 1, "conv3": 2, "conv4": 2, "conv5": 2}  # of residual networks
_WIDE = re.compile(r"wrn-(\d+)-(\d+)")


@dataclass(frozen=True)
class StageShape:
    """The map of a stage.

    Attributes:
        channels: its width.
        grid: (h, w).
    """

    channels: int
    grid: tuple[int, int]


def is_arch(name: str) -> bool:
    """Whether a text has the form of an architecture's name; a library's network need not exist."""
    return name in RESNETS or wide_sizes(name) is not None or name.startswith(LIBRARIES)


def wide_sizes(arch: str) -> tuple[int, int] | None:
    """Depth and width in a wide ResNet's name; None for other names.

    Raises:
        UsageError: no wide network has that depth or width.
    """
    if not (match := _WIDE.fullmatch(arch)):
        return None
    depth, width = int(match[1]), int(match[2])
    if (depth - 4) % 6 or depth < 10 or width < 1:
        raise UsageError(f"model.arch {arch!r}: depth {depth} must be 6 n + 4 (10, 16, 22, 28...)")
    return depth, width


def built_in(arch: str) -> str | None:
    """The name of a network that bowstore builds of stages of its own; None for those that are left to a library.

    Raises:
        UsageError: there is no such network, here or in a library.
    """
    name = arch.removeprefix("torchvision:")
    if name in RESNETS or wide_sizes(arch):
        return name
    if ":" in arch:
        return None
    raise unknown_arch(arch, [*RESNETS, "wrn-28-10", "wrn-28-4"])


def stage_shapes(model: ModelConfig, size: int) -> dict[str, StageShape] | None:
    """The stages of a built-in network for images of `size` x `size` pixels, in order of depth; None for others.

    Raises:
        UsageError: there is no such network.
    """
    if not (name := built_in(model.arch)):
        return None
    if sizes := wide_sizes(name):
        widths = {"conv1": 16, **{f"block{n + 1}": 16 * sizes[1] << n for n in range(3)}}
        strides = dict(zip(widths, (1, *model.strides), strict=True))
    else:
        last = 512 if name in OF_BASIC_BLOCKS else 2048
        widths = {"conv1": 64, "pool1": 64, **{f"conv{n}": last >> (5 - n) for n in (2, 3, 4, 5)}}
        strides = _STRIDES
    shapes = {}
    for stage, stride in strides.items():
        size = -(-size // stride)  # every convolution and pooling with a stride is padded by half its window
        shapes[stage] = StageShape(widths[stage], (size, size))
    return shapes


def own_layer(layer: str) -> str:
    """The name here of a residual network's layer: torchvision's `layer3.2` is `conv4.2`, and its `maxpool` `pool1`."""
    first, dot, rest = layer.partition(".")
    return f"{_OWN_NAMES.get(first, first)}{dot}{rest}"


def unknown_arch(arch: str, known: Sequence[str]) -> UsageError:
    """The error for a name that is not among `known`."""
    hint = nearest(arch, known)
    return UsageError(
        f"model.arch {arch!r} is unknown; {hint and hint + ' '}known: wrn-DEPTH-WIDTH, {', '.join(RESNETS)}, "
        "torchvision:NAME, timm:NAME"
    )
