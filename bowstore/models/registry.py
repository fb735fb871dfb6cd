"""Backbones by name.

A backbone is a chain of named stages, so that a feature map of any stage can be had without running what follows.
Names: `wrn-D-k` (wide ResNet) and torchvision's residual networks (`resnet18`, `resnet50`, ...).

Legend: B batch, C channels, H W pixels, h w feature map.
"""

import difflib
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bowstore.config import ModelConfig
from bowstore.errors import UsageError
from bowstore.models.wide_resnet import wide_resnet_stages

RESNETS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"
)  # fmt: skip
_WIDE = re.compile(r"wrn-(\d+)-(\d+)")


class Backbone(nn.Module):
    """A convolutional network without its classifier.

    Attributes:
        arch: its name.
        layers: names of its stages, in order of depth.
        channels: width of each stage's map.
        features: width of the pooled feature of the last stage.
    """

    def __init__(self, arch: str, stages: "OrderedDict[str, nn.Module]", channels: dict[str, int]) -> None:
        super().__init__()
        self.arch = arch
        self.layers = tuple(stages)
        self.channels = channels
        self.features = channels[self.layers[-1]]
        self.stages = nn.ModuleDict(stages)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Global average pool of the last stage, (B, C)."""
        return self.feature_maps(images_BCHW, self.layers[-1:])[self.layers[-1]].mean((2, 3))

    def feature_maps(self, images_BCHW: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Maps (B, c, h, w) of the named stages; nothing deeper than the deepest of them is run.

        Raises:
            UsageError: a name that is not a stage; the message lists those there are.
        """
        wanted = {self.resolve(layer): layer for layer in layers}
        maps: dict[str, Tensor] = {}
        map_BChw = images_BCHW
        for name, stage in self.stages.items():
            map_BChw = stage(map_BChw)
            if name in wanted:
                maps[wanted[name]] = map_BChw
            if len(maps) == len(wanted):
                break
        return maps

    def resolve(self, layer: str) -> str:
        """The stage's own name.

        Raises:
            UsageError: there is no such stage; the message lists those there are.
        """
        if layer not in self.layers:
            raise UsageError(f"{self.arch} has no layer {layer!r}; its layers are {', '.join(self.layers)}")
        return layer


def build_backbone(config: ModelConfig) -> Backbone:
    """A randomly initialised backbone (He initialisation; the global torch generator draws).

    Raises:
        UsageError: an unknown name; the message gives the nearest known one.
    """
    if match := _WIDE.fullmatch(config.arch):
        depth, width = int(match[1]), int(match[2])
        if (depth - 4) % 6 or depth < 10 or width < 1:
            raise UsageError(f"model.arch {config.arch!r}: depth {depth} must be 6 n + 4 (10, 16, 22, 28...)")
        return Backbone(config.arch, *wide_resnet_stages(depth, width, config.strides))
    if config.arch in RESNETS:
        return Backbone(config.arch, *_resnet_stages(config.arch))
    near = difflib.get_close_matches(config.arch, [*RESNETS, "wrn-28-10", "wrn-28-4"], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"model.arch {config.arch!r} is unknown; {hint}known: wrn-DEPTH-WIDTH, {', '.join(RESNETS)}")


def _resnet_stages(arch: str) -> tuple["OrderedDict[str, nn.Module]", dict[str, int]]:
    """Torchvision's network under the paper's names: conv1 (the stem with its pooling) to conv5 (layer4)."""
    import torchvision

    net: Any = getattr(torchvision.models, arch)(weights=None)
    stages: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Sequential(OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu, maxpool=net.maxpool)),
        conv2=net.layer1,
        conv3=net.layer2,
        conv4=net.layer3,
        conv5=net.layer4,
    )
    channels = {"conv1": net.conv1.out_channels}
    for name in ("conv2", "conv3", "conv4", "conv5"):
        last: Any = list(stages[name].children())[-1]
        channels[name] = (last.conv3 if hasattr(last, "conv3") else last.conv2).out_channels
    return stages, channels


def extra_residual_stage(backbone: Backbone) -> nn.Module:
    """One more residual stage of the backbone's kind and width, stride 2 (the rotation head's, paper section 4)."""
    width = backbone.features
    if _WIDE.fullmatch(backbone.arch):
        from bowstore.models.wide_resnet import Group

        return nn.Sequential(Group(width, width, stride=2, blocks=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    from torchvision.models.resnet import BasicBlock, Bottleneck

    block = BasicBlock if backbone.arch in ("resnet18", "resnet34") else Bottleneck
    downsample = nn.Sequential(nn.Conv2d(width, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
    return block(width, width // block.expansion, stride=2, downsample=downsample)  # type: ignore[no-any-return]
