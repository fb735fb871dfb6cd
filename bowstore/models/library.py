"""Networks of torchvision and timm by name: `torchvision:NAME`, `timm:NAME`. Nothing is ever downloaded.

Legend: B batch, C channels, H W pixels, h w feature map.
"""

import re
from collections.abc import Mapping, Sequence
from math import floor
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bowstore.config import ViewConfig, validate
from bowstore.errors import MissingError, UsageError, is_machine_error
from bowstore.models.arch import unknown_arch
from bowstore.models.backbone import Backbone, LayerInfo
from bowstore.models.residual import resnet_spellings, torchvision_models
from bowstore.models.taps import Layout, Probed, as_map

_TORCHVISION_HEADS = ("fc", "classifier", "head", "heads")
_TIMM_HEADS = ("head", "fc_norm", "attn_pool", "pre_logits")
# Their published weights expect images normalised otherwise than all the others'.
_NOT_TAKEN = ("googlenet", "inception_v3")
_BLOCK = re.compile(r"(?:(?:encoder\.)?blocks\.|encoder\.layers\.encoder_layer_)(\d+)")
_PLAIN_CROP = 0.875
_LEVELS = range(1, 6)


class LibraryBackbone(Backbone):
    """A library's network without its classifier.

    Its stages are conv1 to conv5, the last maps of stride 2 to 32, where it has such a pyramid, with pool1 between
    conv1 and conv2 where its stem ends with a pooling; the blocks of a transformer, whose last is taken after the
    final norm; or else its modules two levels deep.

    Attributes:
        network: the library's network, its heads emptied.
        python: lines that make the same network `net` without bowstore; heads without tensors may stay there.
    """

    def __init__(self, arch: str, network: nn.Module, image_size: int, python: Sequence[str]) -> None:
        super().__init__()
        self.arch = arch
        self.network = network
        self.image_size = image_size
        self.python = tuple(python)
        self._from_timm = arch.startswith("timm:")
        kind = type(network).__name__
        self.layout = Layout(
            prefix_tokens=getattr(network, "num_prefix_tokens", int(kind == "VisionTransformer")),
            channels_last=str(getattr(network, "output_fmt", "")).endswith("NHWC") or kind == "SwinTransformer",
        )
        table = self.layer_table(image_size)
        self.layers = tuple(_stages(table))
        if not self.layers:
            raise UsageError(f"{arch} has no layer that gives one square map of an image; choose another network")
        self.channels = {name: table[name].channels for name in self.layers}
        self.features = self.channels[self.layers[-1]]
        self._ends_with_last = table[self.layers[-1]].is_output

    def root(self) -> nn.Module:
        """The library's network."""
        return self.network

    def trunk(self, images_BCHW: Tensor) -> Tensor:
        """The library's own forward pass, in timm without pooling and classifier."""
        network: Any = self.network
        output: Tensor = network.forward_features(images_BCHW) if self._from_timm else network(images_BCHW)
        return output

    def feature_maps(self, images_BCHW: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """As `Backbone.feature_maps`; the last layer alone comes without hooks, so that training can compile it."""
        if self._ends_with_last and all(layer == self.layers[-1] for layer in layers):
            map_Bchw = as_map(self.trunk(images_BCHW), self.layout)
            assert map_Bchw is not None, "the layer table holds maps only"
            return dict.fromkeys(layers, map_Bchw)
        return super().feature_maps(images_BCHW, layers)

    def aliases(self, probed: Sequence[Probed], size: int) -> dict[str, tuple[str, str]]:
        """conv1 to conv5 and pool1, or blocks.0, blocks.1..., with what they stand for."""
        usable = {found.name: found for found in probed if found.channels and found.calls == 1 and not found.passes_on}
        outputs = [name for name, found in usable.items() if found.is_output]
        output = min(outputs, key=lambda name: name.count("."), default="")
        if self._from_timm:
            info = getattr(self.network, "feature_info", None) or []
            stages = {str(stage["module"]) for stage in (info if isinstance(info, list) else info.info)}
            candidates = [name for name in usable if name in stages or name == output]
        else:
            candidates = [name for name in usable if name.count(".") < 2]
        return _pyramid(usable, candidates, size) or _blocks(usable, output or "encoder.ln")

    def spellings(self) -> dict[str, dict[str, str]]:
        """The library's own names; for residual networks those of bowstore and of numbered children too."""
        names = [name.removeprefix("network.") for name in self.state_dict()]
        kinds = {self.arch.partition(":")[0]: {name: name for name in names}}
        if hasattr(self.network, "layer4"):
            kinds |= resnet_spellings(names)
        return {kind: {spelt: f"network.{name}" for spelt, name in named.items()} for kind, named in kinds.items()}


def library_backbone(arch: str, size: int | None = None) -> LibraryBackbone:
    """A library's network with random weights (the global torch generator draws).

    Args:
        arch: `torchvision:NAME` or `timm:NAME`.
        size: side of the square input, pixels; None for the network's own.

    Raises:
        UsageError: an unknown name, or a size that the network does not take.
    """
    library, _, name = arch.partition(":")
    _check_name(arch)
    size = size or library_view(arch).size
    try:
        network, python = _torchvision_network(name, size) if library == "torchvision" else _timm_network(name, size)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if is_machine_error(error):
            raise
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{arch} cannot be built for images of {size} x {size} pixels: {first}") from error
    if hasattr(network, "reroll"):
        raise UsageError(f"{arch} keeps its tokens in an order that is not the image's; choose another network")
    return LibraryBackbone(arch, network, size, python)


def library_view(arch: str) -> ViewConfig:
    """The clean view that a library's networks are evaluated with: size, short side, mean and deviation.

    Torchvision's is 224 of 256 pixels with ImageNet's mean and deviation; timm records one a network.

    Raises:
        UsageError: an unknown name, or a network that does not take RGB images.
    """
    library, _, name = arch.partition(":")
    _check_name(arch)
    if library == "torchvision":
        return ViewConfig()
    try:
        config = _timm().get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UsageError(f"{arch}: {error}") from error
    assert config is not None, "the name was checked"
    channels, size, _ = config.input_size
    if channels != 3:
        raise UsageError(f"{arch} takes images of {channels} channels, not RGB; choose another network")
    resize = None if config.crop_mode == "squash" else floor(size / (config.crop_pct or _PLAIN_CROP))
    values = {"size": size, "resize": resize, "mean": config.mean, "std": config.std}
    return validate(ViewConfig, values, f"view of {arch}")


def missing_weights(arch: str, path: Path) -> MissingError:
    """The error of a weights file that is not there: it says where the library publishes a network's weights.

    Raises:
        UsageError: an unknown network of a library.
    """
    published = f" (published: {where})" if ":" in arch and (where := _published(arch)) else ""
    return MissingError(f"no weights file {path} for {arch}{published}; put it there, or name another file")


def _published(arch: str) -> str | None:
    """Where a library's weights lie, as the library records it; nothing is fetched."""
    library, _, name = arch.partition(":")
    _check_name(arch)
    if library == "torchvision":
        return str(torchvision_models().get_model_weights(name).DEFAULT.url)
    config = _timm().get_pretrained_cfg(name)
    return f"model.safetensors of https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url


def _check_name(arch: str) -> None:
    library, _, name = arch.partition(":")
    if library == "torchvision":
        models = torchvision_models()
        known = [n for n in models.list_models(module=models) if n not in _NOT_TAKEN]
        is_known = name in known
    elif library == "timm":
        known, is_known = _timm().list_models(), _timm().is_model(name)  # is_model knows tags: NAME.TAG
    else:
        raise unknown_arch(arch, [f"torchvision:{name}", f"timm:{name}"])
    if not is_known:
        raise unknown_arch(arch, [f"{library}:{n}" for n in known])


def _torchvision_network(name: str, size: int) -> tuple[nn.Module, list[str]]:
    sizes: dict[str, Any] = {"image_size": size} if name.startswith("vit_") else {}
    if name.startswith("maxvit"):
        sizes = {"input_size": (size, size)}
    network: nn.Module = torchvision_models().get_model(name, weights=None, **sizes)
    return _without(network, _TORCHVISION_HEADS, f"torchvision.models.{name}({_arguments(sizes)})")


def _timm_network(name: str, size: int) -> tuple[nn.Module, list[str]]:
    def create(**sizes: Any) -> tuple[nn.Module, list[str]]:
        network: nn.Module = _timm().create_model(name, pretrained=False, num_classes=0, **sizes)
        call = f'timm.create_model("{name}", {_arguments({"num_classes": 0, **sizes})})'
        return _without(network, _TIMM_HEADS, call)

    config = _timm().get_pretrained_cfg(name)
    assert config is not None, "the name was checked"
    if not config.fixed_input_size:
        return create()
    try:
        network, python = create(dynamic_img_size=True)  # resamples position embeddings to the image at hand
    except TypeError:
        return create(img_size=size)
    return (network, python) if getattr(network, "dynamic_img_size", False) else create(img_size=size)


def _timm() -> Any:
    import timm  # takes seconds, and no other network needs it

    return timm


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _without(network: nn.Module, heads: Sequence[str], call: str) -> tuple[nn.Module, list[str]]:
    """The network with its heads emptied, and the Python that makes it: what follows pooling has no part in a map."""
    python = [f"net = {call}"]
    for head in heads:
        if hasattr(network, head):
            module = getattr(network, head)
            if isinstance(module, nn.Module) and module.state_dict():
                python.append(f"net.{head} = torch.nn.Identity()")
            setattr(network, head, nn.Identity())
    return network, python


def _pyramid(usable: dict[str, Probed], candidates: Sequence[str], size: int) -> dict[str, tuple[str, str]]:
    """conv1 to conv5: the last map of stride 2 to 32; nothing where those of 8, 16 and 32 are not all there.

    Where the stem ends with a pooling, as in residual networks, conv1 is the map before it and pool1 the one after.
    """
    sides = {-(-size // 2**level): level for level in _LEVELS}
    last = {sides[side]: name for name in candidates if (side := usable[name].grid[0]) in sides}
    if not {3, 4, 5} <= set(last):
        return {}
    aliases = {f"conv{level}": path for level, path in sorted(last.items())}
    pool = _stem_pool(usable, last)
    if pool:
        aliases["pool1"] = pool
    return {
        name: (path, f"= {path}")
        for name, path in aliases.items()
        # No name that another module has; but a stem's conv1 is its last map, not its bare convolution.
        if name == path or name not in usable or (pool and name == "conv1")
    }


def _stem_pool(usable: dict[str, Probed], last: dict[int, str]) -> str | None:
    """The pooling that ends the stem, between the last map of stride 2 and the first stage of stride 4; None without.

    It is known by its name, because it may be a chain of modules (a blurred pooling, a strided convolution in its
    place).
    """
    if not {1, 2} <= set(last):
        return None
    side = usable[last[2]].grid[0]
    names = list(usable)  # in the order in which modules finish
    after = [name for name in names[names.index(last[1]) + 1 :] if usable[name].grid[0] == side]
    for name in after:
        if "pool" in name.rpartition(".")[2] and not f"{name}.".startswith(f"{last[2]}."):
            inside = f"{name}."
            return name if all(earlier.startswith(inside) for earlier in after[: after.index(name)]) else None
    return None


def _blocks(usable: dict[str, Probed], final: str) -> dict[str, tuple[str, str]]:
    """blocks.0, blocks.1... of a network whose blocks all have the same grid."""
    paths = {int(match[1]): name for name in usable if (match := _BLOCK.fullmatch(name))}
    if not paths or len({usable[path].grid for path in paths.values()}) > 1:
        return {}
    aliases = {f"blocks.{n}": (path, "" if path == f"blocks.{n}" else f"= {path}") for n, path in paths.items()}
    end = max(paths)
    block, norm = usable[paths[end]], usable.get(final)
    if block.is_output:
        aliases[f"blocks.{end}"] = (final, "the network has no norm after it")
    elif norm and (norm.grid, norm.channels) == (block.grid, block.channels):
        aliases[f"blocks.{end}"] = (final, f"= {final}: with the final norm")
    return aliases


def _stages(table: dict[str, LayerInfo]) -> list[str]:
    named = [name for name in table if re.fullmatch(r"conv[1-5]|pool1", name) and table[name].note]
    if len(named) < len(_LEVELS) - 2:
        named = [name for name in table if re.fullmatch(r"blocks\.\d+", name)]
    return named or [name for name, info in table.items() if name.count(".") < 2 and not info.passes_on]
