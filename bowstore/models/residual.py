"""Residual networks as chains of named stages: torchvision's, and wide ones.

Legend: B batch, C channels, H W pixels, h w feature map.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from bowstore.models.arch import RESNET_STAGES, RESNETS, V1, own_layer, wide_sizes
from bowstore.models.backbone import Backbone
from bowstore.models.taps import Probed
from bowstore.models.wide_resnet import wide_resnet_stages

WIDE = "wide_resnet"  # names as `bowstore.models.wide_resnet.WideResNet` has them
_STEM_NOTES = {"conv1": "before the max-pool", "pool1": "= maxpool"}


class StagedBackbone(Backbone):
    """A convolutional network as a chain of named stages."""

    def __init__(self, arch: str, stages: "OrderedDict[str, nn.Module]", channels: dict[str, int]) -> None:
        super().__init__()
        self.arch = arch
        self.layers = tuple(stages)
        self.channels = channels
        self.features = channels[self.layers[-1]]
        self.stages = nn.ModuleDict(stages)

    def root(self) -> nn.Module:
        """The stages."""
        return self.stages

    def trunk(self, images_BCHW: Tensor) -> Tensor:
        """Map of the last stage."""
        map_BChw = images_BCHW
        for stage in self.stages.values():
            map_BChw = stage(map_BChw)
        return map_BChw

    def feature_maps(self, images_BCHW: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """As `Backbone.feature_maps`; between stages the network is simply cut."""
        if not all(layer in self.layers for layer in layers):
            return super().feature_maps(images_BCHW, layers)
        wanted = set(layers)
        maps: dict[str, Tensor] = {}
        map_BChw = images_BCHW
        for name, stage in self.stages.items():
            map_BChw = stage(map_BChw)
            if name in wanted:
                maps[name] = map_BChw
            if len(maps) == len(wanted):
                break
        return maps

    def aliases(self, probed: Sequence[Probed], size: int) -> dict[str, tuple[str, str]]:
        """Torchvision's names of a residual network's stages, as notes."""
        if self.arch not in RESNETS:
            return {}
        notes = _STEM_NOTES | {ours: f"= {theirs}" for ours, theirs in RESNET_STAGES.items()}
        return {name: (name, note) for name, note in notes.items()}

    def synonym(self, layer: str) -> str:
        """As `own_layer`, where there is such a stage."""
        own = own_layer(layer)
        return own if own.partition(".")[0] in self.layers else layer

    def spellings(self) -> dict[str, dict[str, str]]:
        """Bowstore's own names and those of `WideResNet`; or torchvision's, and those of numbered children."""
        own = list(self.state_dict())
        if self.arch not in RESNETS:
            return {
                "bowstore": {name: name for name in own},
                WIDE: {name.removeprefix("stages."): name for name in own},
            }
        plain = {_torchvision_name(name): name for name in own}
        theirs = resnet_spellings(list(plain))
        return {
            kind: {spelt: plain[name] for spelt, name in names.items()}
            for kind, names in {"torchvision": {name: name for name in plain}, **theirs}.items()
        }


def resnet_spellings(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Other names of a residual network's tensors (`conv1.weight`, `layer1.0.conv1.weight`...), by kind of file.

    `bowstore`: conv1 to conv5. `numbered`: `nn.Sequential(*network.children())`, the idiom of many
    self-supervised codebases (lightly among them): 0 conv1, 1 bn1, 4 to 7 the four stages.
    """
    stage = {theirs: ours for ours, theirs in RESNET_STAGES.items()}
    number = {"conv1": 0, "bn1": 1, **{theirs: 4 + n for n, theirs in enumerate(RESNET_STAGES.values())}}
    spelt: dict[str, dict[str, str]] = {"bowstore": {}, "numbered": {}}
    for name in names:
        first, _, rest = name.partition(".")
        spelt["bowstore"][f"stages.{stage[first]}.{rest}" if first in stage else f"stages.conv1.{name}"] = name
        spelt["numbered"][f"{number.get(first, first)}.{rest}"] = name
    return spelt


def _torchvision_name(own: str) -> str:
    _, stage, rest = own.split(".", 2)
    return f"{RESNET_STAGES[stage]}.{rest}" if stage in RESNET_STAGES else rest


def residual_backbone(arch: str, strides: tuple[int, int, int]) -> StagedBackbone:
    """A network by its name here, randomly initialised; `strides` are those of a wide one's groups."""
    if not (sizes := wide_sizes(arch)):
        return StagedBackbone(arch, *_resnet_stages(arch))
    return StagedBackbone(arch, *wide_resnet_stages(*sizes, strides))


def _resnet_stages(arch: str) -> tuple["OrderedDict[str, nn.Module]", dict[str, int]]:
    """Torchvision's network under the paper's names: conv1 (the stem), pool1 (its pooling), conv2 to conv5 (layer4)."""
    net: Any = torchvision_models().get_model(arch.removesuffix(V1), weights=None)
    if arch.endswith(V1):
        stride_first(net)
    stages: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Sequential(OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu)),
        pool1=net.maxpool,
        **{ours: getattr(net, theirs) for ours, theirs in RESNET_STAGES.items()},
    )
    channels = dict.fromkeys(("conv1", "pool1"), net.conv1.out_channels)
    for name in RESNET_STAGES:
        last: Any = list(stages[name].children())[-1]
        channels[name] = (last.conv3 if hasattr(last, "conv3") else last.conv2).out_channels
    return stages, channels


def stride_first(network: nn.Module) -> None:
    """Move the strides of torchvision's bottlenecks from the 3x3 convolution to the 1x1 before it."""
    for block in network.modules():
        if isinstance(block, torchvision_models().resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def torchvision_models() -> Any:
    """torchvision.models."""
    import torchvision  # takes seconds, and wide networks need none of it

    return torchvision.models
