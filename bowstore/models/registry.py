"""Backbones by name, and the maps of their layers.

Names: `wrn-D-k` (wide ResNet), torchvision's residual networks (`resnet18`, `resnet50`, ...), and any network of two
libraries as `torchvision:NAME` and `timm:NAME` (bowstore.models.library).

Legend: B batch, C channels, H W pixels, h w feature map.
"""

import difflib
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bowstore.config import ModelConfig
from bowstore.errors import UsageError, is_machine_error
from bowstore.models.taps import Layout, Probed, as_map, outputs_of, probe, without_data
from bowstore.models.wide_resnet import wide_resnet_stages

RESNETS = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip
RESNET_STAGES = {"conv2": "layer1", "conv3": "layer2", "conv4": "layer3", "conv5": "layer4"}
_STEM_NOTES = {"conv1": "before the max-pool", "pool1": "= maxpool"}
_WIDE = re.compile(r"wrn-(\d+)-(\d+)")
_SHOWN_LAYERS = 8


@dataclass(frozen=True)
class LayerInfo:
    """A layer whose map can be had.

    Attributes:
        name: what `--layer` takes and a word store records.
        module: path of the module whose output it is.
        channels: c.
        grid: (h, w) at the size that was asked for.
        note: what the name stands for, where it is not the module's own.
        passes_on: the module gives on what it got (identity, dropout).
        is_output: it is what the trunk itself gives.
    """

    name: str
    module: str
    channels: int
    grid: tuple[int, int]
    note: str = ""
    passes_on: bool = False
    is_output: bool = False


class Backbone(nn.Module, ABC):
    """A network without its classifier, whose maps can be had without running what follows them.

    Attributes:
        arch: its name.
        layers: names of its stages, in order of depth; other modules are layers too (`layer_table`).
        channels: width of each stage's map.
        features: width of the pooled feature, the mean of the last stage's map.
        image_size: side of the images that `resolve` looks at layers with, pixels.
        layout: how its modules lay out maps.
    """

    arch: str
    layers: tuple[str, ...]
    channels: dict[str, int]
    features: int
    image_size = 224
    layout = Layout()

    def __init__(self) -> None:
        super().__init__()
        self._tables: dict[int, tuple[dict[str, LayerInfo], dict[str, str]]] = {}

    @abstractmethod
    def root(self) -> nn.Module:
        """The module below which layers have their paths."""

    @abstractmethod
    def trunk(self, images_BCHW: Tensor) -> Tensor:
        """Run the whole network; its own output."""

    def aliases(self, probed: Sequence[Probed], size: int) -> dict[str, tuple[str, str]]:
        """Names of its own for modules: (path, note) by name."""
        return {}

    def synonym(self, layer: str) -> str:
        """The path that another library's name for a module means here, or the name itself."""
        return layer

    @abstractmethod
    def spellings(self) -> dict[str, dict[str, str]]:
        """Names that weights files use for its tensors: own name by the file's name, by kind of file."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Global average pool of the last stage, (B, C)."""
        return mean_pool(self.feature_maps(images_BCHW, self.layers[-1:])[self.layers[-1]])

    def feature_maps(self, images_BCHW: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Maps (B, c, h, w) of the named layers; nothing deeper than the deepest of them is run.

        Raises:
            UsageError: a name that is no layer, or a module that gives no map.
        """
        table, _ = self._table(self.image_size)
        wanted = {layer: table[self.resolve(layer)].module for layer in layers}
        modules = {path: self.root().get_submodule(path) for path in wanted.values()}
        outputs = outputs_of(self.trunk, modules, images_BCHW)
        maps: dict[str, Tensor] = {}
        for layer, path in wanted.items():
            map_BChw = as_map(outputs[path], self.layout)
            if map_BChw is None:
                raise UsageError(self._no_map(layer, tuple(outputs[path].shape)))
            maps[layer] = map_BChw
        return maps

    def freeze_unused(self) -> tuple[str, ...]:
        """Take out of training what no gradient reaches: heads that lie behind the last stage's map.

        They stay among the weights, so that files keep their names. DDP would wait for their gradients.

        Returns:
            Names of the parameters that are frozen.
        """
        ghost, last = without_data(self).train(), self.layers[-1]
        images = torch.zeros(2, 3, self.image_size, self.image_size, device="meta")
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            map_Bchw = ghost.feature_maps(images, (last,))[last]
        trained = {name: parameter for name, parameter in ghost.named_parameters() if parameter.requires_grad}
        gradients = torch.autograd.grad(map_Bchw.sum(), list(trained.values()), allow_unused=True)
        unused = tuple(name for name, gradient in zip(trained, gradients, strict=True) if gradient is None)
        for name in unused:
            self.get_parameter(name).requires_grad_(False)
        return unused

    def layer_table(self, size: int) -> dict[str, LayerInfo]:
        """Every layer that gives a map of an image of `size` x `size` pixels, in order of depth, by name.

        Raises:
            UsageError: the network does not take images of that size.
        """
        return self._table(size)[0]

    def resolve(self, layer: str) -> str:
        """The layer's own name.

        Raises:
            UsageError: there is no such layer, it gives no map, or it is run more than once.
        """
        if layer in self.layers:
            return layer
        table, refused = self._table(self.image_size)
        layer = self.synonym(layer)
        if layer in table:
            return layer
        for info in table.values():
            if info.module == layer:
                return info.name
        if layer in refused:
            raise UsageError(refused[layer])
        near = difflib.get_close_matches(layer, table, n=3)
        shown = self.layers if len(self.layers) <= _SHOWN_LAYERS else (*self.layers[:3], "...", self.layers[-1])
        hint = f" (nearest: {', '.join(near)})" if near else ""
        raise UsageError(
            f"{self.arch} has no layer {layer!r}; its layers are {', '.join(shown)}{hint}; "
            f"`bowstore layers {self.arch} --all` lists every one"
        )

    def _table(self, size: int) -> tuple[dict[str, LayerInfo], dict[str, str]]:
        """Usable layers by name, and why the other modules are none."""
        if size not in self._tables:
            ghost = without_data(self)
            try:
                probed = probe(ghost.root(), ghost.trunk, size, self.layout)
            except (AssertionError, RuntimeError, ValueError) as error:
                if is_machine_error(error):
                    raise
                first = (str(error) or type(error).__name__).splitlines()[0]
                raise UsageError(f"{self.arch} does not take images of {size} x {size} pixels: {first}") from error
            aliases = self.aliases(probed, size)
            named = {path: (name, note) for name, (path, note) in aliases.items()}
            table, refused = {}, {}
            for found in probed:
                name, note = named.get(found.name, (found.name, ""))
                if name in aliases and found.name not in named:
                    continue  # another module goes by this name
                if found.calls > 1:
                    refused[name] = f"layer {name!r} of {self.arch} is run {found.calls} times an image; name another"
                elif found.channels == 0:
                    refused[name] = self._no_map(name, found.shape)
                else:
                    table[name] = LayerInfo(
                        name, found.name, found.channels, found.grid, note, found.passes_on, found.is_output
                    )
            self._tables[size] = table, refused
        return self._tables[size]

    def _no_map(self, layer: str, shape: tuple[int, ...] | None) -> str:
        what = "no single tensor" if shape is None else f"a tensor of shape (B, {', '.join(map(str, shape[1:]))})"
        return (
            f"layer {layer!r} of {self.arch} gives {what}, not a square map of feature vectors; "
            f"`bowstore layers {self.arch}` lists those that do"
        )


def mean_pool(map_BChw: Tensor) -> Tensor:
    """Mean over a map's cells, (B, C): of maps in half precision in float32, which they are summed in anyway."""
    half = map_BChw.dtype in (torch.float16, torch.bfloat16)
    return map_BChw.mean((2, 3), dtype=torch.float32 if half else None)


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
        """Torchvision's `layer3.2` is `conv4.2` here, and its `maxpool` is `pool1`."""
        first, dot, rest = layer.partition(".")
        stage = ({theirs: ours for ours, theirs in RESNET_STAGES.items()} | {"maxpool": "pool1"}).get(first, first)
        return f"{stage}{dot}{rest}" if stage in self.layers else layer

    def spellings(self) -> dict[str, dict[str, str]]:
        """Bowstore's own names; for residual networks torchvision's too, and those of numbered children."""
        own = list(self.state_dict())
        if self.arch not in RESNETS:
            return {"bowstore": {name: name for name in own}}
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


def build_backbone(config: ModelConfig, size: int | None = None) -> Backbone:
    """A randomly initialised backbone (the global torch generator draws).

    Args:
        config: its name, and the strides of a wide ResNet.
        size: side of the square input, pixels, for networks that are built for one; None for their own.

    Raises:
        UsageError: an unknown name; the message gives the nearest known one.
    """
    library, _, name = config.arch.rpartition(":")
    if library in ("", "torchvision") and name in RESNETS:
        return StagedBackbone(name, *_resnet_stages(name))
    if library:
        from bowstore.models.library import library_backbone

        return library_backbone(config.arch, size)
    if match := _WIDE.fullmatch(name):
        depth, width = int(match[1]), int(match[2])
        if (depth - 4) % 6 or depth < 10 or width < 1:
            raise UsageError(f"model.arch {name!r}: depth {depth} must be 6 n + 4 (10, 16, 22, 28...)")
        return StagedBackbone(name, *wide_resnet_stages(depth, width, config.strides))
    raise unknown_arch(config.arch, [*RESNETS, "wrn-28-10", "wrn-28-4"])


def unknown_arch(arch: str, known: Sequence[str]) -> UsageError:
    """The error for a name that is not among `known`."""
    near = difflib.get_close_matches(arch, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(
        f"model.arch {arch!r} is unknown; {hint}known: wrn-DEPTH-WIDTH, {', '.join(RESNETS)}, "
        "torchvision:NAME, timm:NAME"
    )


def is_arch(name: str) -> bool:
    """Whether a text has the form of an architecture's name; a library's network need not exist."""
    return bool(_WIDE.fullmatch(name)) or name in RESNETS or name.startswith(("torchvision:", "timm:"))


def _resnet_stages(arch: str) -> tuple["OrderedDict[str, nn.Module]", dict[str, int]]:
    """Torchvision's network under the paper's names: conv1 (the stem), pool1 (its pooling), conv2 to conv5 (layer4)."""
    import torchvision

    net: Any = getattr(torchvision.models, arch)(weights=None)
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


def group_depth(backbone: Backbone) -> int:
    """Residual blocks of a backbone's last group: (D - 4) / 6 of WRN-D, 3 of ResNet-50; 1 where there is no group."""
    if match := _WIDE.fullmatch(backbone.arch):
        return (int(match[1]) - 4) // 6
    staged = isinstance(backbone, StagedBackbone)
    last = getattr(backbone.root(), "conv5" if staged else "layer4", None)
    return len(last) if isinstance(last, nn.Sequential) else 1


def extra_residual_group(backbone: Backbone, blocks: int | None = None) -> nn.Module:
    """One more group of the backbone's kind and width, its first block of stride 2 (the rotation head's, section 4).

    Args:
        backbone: whose last map it takes.
        blocks: its depth; None for that of the backbone's own last group (`group_depth`).
    """
    width, blocks = backbone.features, blocks or group_depth(backbone)
    if _WIDE.fullmatch(backbone.arch):
        from bowstore.models.wide_resnet import Group

        return nn.Sequential(Group(width, width, stride=2, blocks=blocks), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    from torchvision.models.resnet import BasicBlock, Bottleneck

    # A bottleneck's width is four times its inner one.
    plain = backbone.arch in ("resnet18", "resnet34") or width % Bottleneck.expansion
    block = BasicBlock if plain else Bottleneck
    inner = width // block.expansion
    downsample = nn.Sequential(nn.Conv2d(width, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
    first: nn.Module = block(width, inner, stride=2, downsample=downsample)
    # A single block stands alone, so that weights of such heads keep their names.
    return first if blocks == 1 else nn.Sequential(first, *(block(width, inner) for _ in range(blocks - 1)))
