"""Has a run diverged? Asked when its loss is logged, before a checkpoint is written, and in the step after one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bowstore.errors import TrainingError
from bowstore.train.checkpoint import Checkpoints
from bowstore.train.distributed import World
from bowstore.train.metrics import Meter

# Nats. Training at a rate that is far too high passes this some steps before anything is infinite; the loss of a
# network that knows nothing is the logarithm of the number of words, at most 11.
_MAX_LOSS = 1e4


def unsound(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    meter: Meter,
    kept: Checkpoints,
    world: World,
    *,
    saving: bool,
) -> str:
    """What is wrong after a step, or nothing; finds the newest checkpoint proved on the way. The same on every rank.

    Loss, gradients, momenta and running statistics speak of the weights that the step began with, whatever its rate
    was; the weights that it made are looked at before they are saved.
    """
    for loss in meter.losses(world):
        if not abs(loss) < _MAX_LOSS:  # also true of NaN
            return f"the loss is {loss:.4g}"
    momenta = [value for values in optimizer.state.values() for value in values.values()]
    parameters = dict(network.named_parameters())
    buffers = [value for name, value in network.state_dict().items() if name not in parameters]
    if kept.unproven:
        gradients = [parameter.grad for parameter in parameters.values()]
        if world.any(not _all_finite([*gradients, *momenta, *buffers])):
            return "gradients or running statistics are not finite"
        kept.proved()
    if saving and world.any(not _all_finite([*parameters.values(), *momenta, *buffers])):
        return "the weights are not finite"
    return ""


def diverged(wrong: str, step: int, rate: float, kept: Checkpoints, world: World) -> BaseException:
    """The error of a run that cannot go on; the other ranks leave quietly."""
    if not world.first:
        return SystemExit(1)
    return TrainingError(
        f"{wrong} by step {step} at learning rate {rate:g}; lower optim.lr and run again with --resume "
        f"{kept.diverged()}, or under another --name from the start"
    )


def _all_finite(values: Sequence[Any]) -> bool:
    """Whether all tensors among the values are; the device is asked once."""
    found = [value.isfinite().all() for value in values if isinstance(value, Tensor)]
    return not found or bool(torch.stack(found).all())
