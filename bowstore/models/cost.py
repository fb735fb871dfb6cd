"""What networks cost in parameters and multiply-adds: a trunk, and the heads that tasks put on it.

Legend: C feature width, K words or classes, h w places of the last map.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bowstore.errors import UsageError, nearest
from bowstore.models.backbone import Backbone
from bowstore.models.compiled import flops
from bowstore.models.heads import CosineHead, Heads, LayerHeads, LinearHead, PairHead, RotationHead
from bowstore.models.pooling import named_taps, pooled_shapes

_PATCHES = 9
_OPERATIONS = 2  # that the counter sees in a multiply-add


@dataclass(frozen=True)
class Cost:
    """Of a trunk, or of a head on it.

    Attributes:
        name: what it is.
        parameters: how many, whether they are trained or not.
        multiply_adds: of convolutions and matrix products, forward; of a trunk for one input, of a head for `inputs`.
        outputs: K, where a user says it.
        inputs: the trunk's that a head takes at once: the nine patches of an image, or one.
    """

    name: str
    parameters: int
    multiply_adds: int
    outputs: int | None = None
    inputs: int = 1


class _Kind(NamedTuple):
    """How a task's head is made.

    Attributes:
        make: of the backbone, the side of its input and K; also what the head takes of one image.
        sized: whether K is for a user to say.
        inputs: as in `Cost`.
    """

    make: Callable[[Backbone, int, int], tuple[nn.Module, Any]]
    sized: bool = False
    inputs: int = 1


def _rotation(backbone: Backbone, size: int, _outputs: int) -> tuple[nn.Module, Any]:
    last = backbone.layer_table(size)[backbone.layers[-1]]
    return RotationHead(backbone), torch.zeros(1, last.channels, *last.grid)


def _clusters(backbone: Backbone, _size: int, outputs: int) -> tuple[nn.Module, Any]:
    width = backbone.features
    return Heads([CosineHead(width, outputs), LinearHead(width, 4)]), torch.zeros(1, width)


def _linear(backbone: Backbone, size: int, outputs: int) -> tuple[nn.Module, Any]:
    taps = named_taps(backbone, (), size=size)
    heads = LayerHeads(backbone, taps, size, outputs, "batch")
    return heads, [torch.zeros(1, *shape) for shape in pooled_shapes(backbone, taps, size)]


# By the tasks' names, with the heads that they have by default; one of several, as a pyramid's, is as a single one.
HEADS: Mapping[str, _Kind] = {
    "rotation": _Kind(_rotation),
    "location": _Kind(lambda it, *_: (PairHead(it.features), torch.zeros(_PATCHES, it.features)), inputs=_PATCHES),
    "words": _Kind(lambda it, _, k: (CosineHead(it.features, k), torch.zeros(1, it.features)), sized=True),
    "clusters": _Kind(_clusters, sized=True),
    "supervised": _Kind(lambda it, _, k: (LinearHead(it.features, k), torch.zeros(1, it.features)), sized=True),
    "linear": _Kind(_linear, sized=True),
}


def trunk_cost(backbone: Backbone, size: int) -> Cost:
    """Of the trunk up to its last stage.

    Args:
        backbone: its weights need no data.
        size: side of the square input, pixels.
    """
    last = backbone.layers[-1:]
    operations = flops(backbone, lambda ghost, images: ghost.feature_maps(images, last), size)
    return Cost(backbone.arch, _parameters(backbone), operations // _OPERATIONS)


def head_cost(name: str, backbone: Backbone, size: int, outputs: int | None = None) -> Cost:
    """Of the head that a task puts on a backbone; nothing is computed.

    Args:
        name: of `HEADS`.
        backbone: its weights need no data.
        size: side of the square input, pixels.
        outputs: K.

    Raises:
        UsageError: an unknown name, or K is missing.
    """
    if name not in HEADS:
        hint = nearest(name, HEADS)
        raise UsageError(f"no head {name!r}; {hint and hint + ' '}there are {', '.join(HEADS)}")
    kind = HEADS[name]
    if kind.sized and outputs is None:
        raise UsageError(f"head {name} has an output for each word or class; give their number, as in --K 2048")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        head, given = kind.make(backbone, size, outputs or 0)
        with FlopCounterMode(display=False) as counter:
            head.eval()(given)
    operations = counter.get_total_flops()
    return Cost(name, _parameters(head), operations // _OPERATIONS, outputs if kind.sized else None, kind.inputs)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
