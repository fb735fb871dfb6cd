"""A backbone: a network without its classifier, and the maps of its layers.

Legend: B batch, C channels, H W pixels, h w feature map.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bowstore.errors import UsageError, is_machine_error
from bowstore.models.taps import Layout, Probed, as_map, outputs_of, probe, without_data

_SHOWN_LAYERS = 8


@dataclass(frozen=True)
class LayerInfo:
    """A layer that gives a map.

    Attributes:
        name: what `--layer` takes and a word store records.
        module: path of the module whose output it is.
        channels: c.
        grid: (h, w) at the size that was asked for.
        note: what the name stands for, where it is not the module's own.
        passes_on: the module returns its input (identity, dropout).
        is_output: its output is the trunk's.
    """

    name: str
    module: str
    channels: int
    grid: tuple[int, int]
    note: str = ""
    passes_on: bool = False
    is_output: bool = False


class Backbone(nn.Module, ABC):
    """A network without its classifier; it is run no further than the deepest map that is asked for.

    Attributes:
        arch: its name.
        layers: names of its stages, in order of depth; other modules are layers too (`layer_table`).
        channels: width of each stage's map.
        features: width of the pooled feature, the mean of the last stage's map.
        image_size: side of the square images for which layers are listed, pixels.
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
        """The output of the whole network."""

    def aliases(self, probed: Sequence[Probed], size: int) -> dict[str, tuple[str, str]]:
        """Its own names for modules: (path, note) by name."""
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
            UsageError: a name of no layer, or of a module that gives no map.
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
        """Freeze what no gradient reaches, heads behind the last stage's map: DDP would wait for their gradients.

        They stay in the state dict, so that files keep their names.

        Returns:
            Names of the frozen parameters.
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
        """Usable layers by name, and why each other module is not one."""
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
    """Mean over a map's cells, (B, C); float32 for maps in half precision, which are summed in float32 anyway."""
    half = map_BChw.dtype in (torch.float16, torch.bfloat16)
    return map_BChw.mean((2, 3), dtype=torch.float32 if half else None)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Hold all modules in eval mode for the length of the block, then give each its own mode back."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
