"""Maps of any module of a network, by forward hooks.

Legend: B batch, C channels, H W pixels, c channels of a map, h w its cells, T tokens.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Layout:
    """How a network lays out the outputs of its modules.

    Attributes:
        prefix_tokens: class and register tokens before the patch tokens.
        channels_last: 4-dimensional maps are (B, h, w, c); decides only where the shape does not.
    """

    prefix_tokens: int = 0
    channels_last: bool = False


@dataclass(frozen=True)
class Probed:
    """The output of one module in one pass over black images.

    Attributes:
        name: its path.
        calls: how often it was run.
        shape: of its output; None if that is not one tensor.
        channels: c of its map; 0 if its output is no map.
        grid: (h, w) of its map; (0, 0) if its output is no map.
        passes_on: its output is its input (identity, dropout).
        is_output: its output is the trunk's.
    """

    name: str
    calls: int
    shape: tuple[int, ...] | None
    channels: int
    grid: tuple[int, int]
    passes_on: bool
    is_output: bool


class _Enough(Exception):
    pass


def outputs_of(trunk: Callable[[Tensor], Any], modules: Mapping[str, nn.Module], images_BCHW: Tensor) -> dict[str, Any]:
    """Outputs of `modules` by name in one pass of `trunk`; no module after the last of them is run."""
    found: dict[str, Any] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if len(found) + 1 == len(modules):
                found[name] = output
                raise _Enough
            # The pass goes on, and what follows may work in place (ReLU, residual sums).
            found[name] = output.clone() if isinstance(output, Tensor) else output

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        trunk(images_BCHW)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def as_map(output: Any, layout: Layout) -> Tensor | None:
    """A module's output as a map (B, c, h, w) with h = w, or None if it is not one.

    Tokens (B, T, c) lose those that belong to no patch and are laid out row by row.
    """
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 4:
        _, second, third, fourth = output.shape
        if third == fourth and not (second == third and layout.channels_last):
            return output
        return output.permute(0, 3, 1, 2) if second == third else None
    if output.ndim == 3:
        for skip in (layout.prefix_tokens, 0):
            patches = output.shape[1] - skip
            side = isqrt(max(patches, 0))
            if side and side * side == patches:
                return output[:, skip:].transpose(1, 2).reshape(*output.shape[::2], side, side)
    return None


def without_data(network: Network) -> Network:
    """A copy of a network whose tensors have shapes and no data: its passes cost no arithmetic."""
    tensors: dict[int, Any] = {id(tensor): tensor.to("meta") for tensor in network.buffers()}
    for parameter in network.parameters():
        tensors[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(network, tensors)


@dataclass(frozen=True)
class _Seen:
    value: Any
    passes_on: bool
    version: int


@torch.no_grad()
def probe(network: nn.Module, run: Callable[[Tensor], Any], size: int, layout: Layout) -> list[Probed]:
    """The output of every module of `network` for images of `size` x `size` pixels, in the order they finish.

    Args:
        network: a copy `without_data`.
        run: runs it on images.
        size: side of the square input, pixels.
        layout: how the network lays out its maps.
    """
    calls: Counter[str] = Counter()
    last: dict[str, _Seen] = {}  # holds every output, so that none has another's identity

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] += 1
            last.pop(name, None)
            passes_on = bool(args) and output is args[0] and not getattr(module, "inplace", False)
            last[name] = _Seen(output, passes_on, output._version if isinstance(output, Tensor) else 0)

        return keep

    for name, module in network.named_modules():
        if name:
            module.register_forward_hook(hook(name))
    network.eval()
    # Two images, so that modules that fold parts of an image into the batch (windows) are told from maps.
    return _described(last, calls, run(torch.zeros(2, 3, size, size, device="meta")), layout)


def _described(last: Mapping[str, _Seen], calls: Mapping[str, int], output: Any, layout: Layout) -> list[Probed]:
    # Tokens count as a map only on a grid that the network has (or half of one): a mixer's transposed
    # channels may be a square number too.
    sides = {seen.value.shape[2] for seen in last.values() if isinstance(seen.value, Tensor) and seen.value.ndim == 4}
    sides |= {side // 2 for side in sides}
    probed = []
    for name, seen in last.items():
        value = seen.value
        map_Bchw = as_map(value, layout)
        if map_Bchw is not None:
            side = map_Bchw.shape[2]
            if len(map_Bchw) != 2 or side == 1 or (value.ndim == 3 and sides and side not in sides):
                map_Bchw = None
        probed.append(
            Probed(
                name=name,
                calls=calls[name],
                shape=tuple(value.shape) if isinstance(value, Tensor) else None,
                channels=0 if map_Bchw is None else map_Bchw.shape[1],
                grid=(0, 0) if map_Bchw is None else (map_Bchw.shape[2], map_Bchw.shape[3]),
                passes_on=seen.passes_on,
                # A tensor that was written to afterwards (ReLU in place) is no longer the module's output.
                is_output=isinstance(value, Tensor) and value is output and value._version == seen.version,
            )
        )
    return probed
