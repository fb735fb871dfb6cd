"""Evaluations of a network while it is trained, as the loop sees them: what measures it enters as a callable."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bowstore.train.distributed import World
from bowstore.train.watch import Course


class Probed(NamedTuple):
    """What was found.

    Attributes:
        values: for the log, by name.
        note: the same for the line of progress, in short.
    """

    values: Mapping[str, float]
    note: str


@dataclass(frozen=True)
class Probe:
    """What can measure a network, once its images have been found usable.

    Attributes:
        measure: of the weights of a backbone, by name, which it leaves as they are.
        record: what is measured, as plain values for `environment.json`.
    """

    measure: Callable[[Mapping[str, Tensor]], Probed]
    record: Mapping[str, Any]


OpenProbe = Callable[[torch.device], Probe]  # refuses what cannot be measured before anything is trained


class Probing:
    """When the network is measured, and by whom: rank 0 does it, whose network is that of the checkpoints.

    The others wait without a collective, which would time out, so that it may take as long as it takes.

    Args:
        probe: on rank 0, where there is one.
        every: course of the run with as many steps an epoch as lie between two measurements; None to measure nothing.
        world: the ranks.
    """

    def __init__(self, probe: Probe | None, every: Course | None, world: World) -> None:
        self._probe, self._every, self._world = probe, every, world

    def at(self, step: int, backbone: nn.Module, pause: Callable[[], AbstractContextManager[None]]) -> Probed | None:
        """What is found at a line of the log; None where nothing is measured, and on ranks other than 0.

        For all ranks together.

        Args:
            step: of the line.
            backbone: as it is trained; it stays as it is.
            pause: for whatever is no training.
        """
        if self._every is None or self._every.epoch_line(step) != step:
            return None
        with pause():
            found = self._probe.measure(backbone.state_dict()) if self._probe else None
            self._world.assembled()
        return found
