"""Health of a run, for its log: the effective rank of its features, and warnings that it does not learn.

Legend: B rows of a step, N of several, C channels.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bowstore.models.backbone import mean_pool
from bowstore.models.spectrum import effective_rank
from bowstore.train.tasks.task import Dead

_ROWS_PER_CHANNEL = 2  # an effective rank wants more rows than channels
# Sound runs look like dead ones at first (docs/results/health.md): none is judged before this step, but at its end.
_JUDGED_STEP, _SHORTEST_STEPS = 200, 30
_DEAD_SHARE = 0.995  # of the loss of a run that learns nothing; a noisy loss lies on both sides of it
_COLLAPSED_SHARE = 0.25  # of the effective rank of the first steps
_VANISHED_SHARE = 0.1  # of gamma at its start


@dataclass(frozen=True)
class Course:
    """Where the lines of a run's log stand.

    Attributes:
        epoch_steps: steps of an epoch.
        log_every_steps: steps between two lines.
        steps: of the whole run.
        renewed: whether the targets are made anew before a step (from 0), and the head with them.
    """

    epoch_steps: int
    log_every_steps: int
    steps: int
    renewed: Callable[[int], bool] = lambda step: False

    def epoch_line(self, step: int) -> int:
        """The first line at step `step` (from 1) or after it that is the last one of its epoch."""
        line = min(-(-step // self.log_every_steps) * self.log_every_steps, self.steps)
        end = min(-(-line // self.epoch_steps) * self.epoch_steps, self.steps)
        return self.steps if end == self.steps else end // self.log_every_steps * self.log_every_steps

    def judged(self, step: int) -> bool:
        """Whether the line at this step can tell a run that learns nothing from one that has just begun."""
        if self.epoch_line(step) != step:
            return False
        young = step < _JUDGED_STEP or any(map(self.renewed, range(max(1, step - _JUDGED_STEP), step)))
        return not young or step == self.steps >= _SHORTEST_STEPS


class Features:
    """The pooled features of the first steps and of the last ones before the last line of each epoch: effective ranks.

    Those of other steps are not kept, and none are copied. What was kept by the time of a checkpoint is part of it, so
    that a resumed run logs what it would have logged.

    Args:
        channels: C.
        rows: B of this process.
        course: of the run.
    """

    def __init__(self, channels: int, rows: int, course: Course) -> None:
        self._course = course
        self._steps = -(-_ROWS_PER_CHANNEL * channels // rows)
        self._first_steps = min(self._steps, max(1, course.epoch_line(1) // 4))
        self._kept: list[Tensor] = []
        self.first_rank: float | None = None

    def add(self, step: int, features: Tensor | None) -> None:
        """Keep those of a step (from 1), (B, C) or (B, C, h, w), if they are wanted."""
        if features is None or not (step <= self._first_steps or self._course.epoch_line(step) - step < self._steps):
            return
        self._kept.append(mean_pool(features) if features.ndim > 2 else features)
        if step == self._first_steps:
            self.first_rank = self._rank()

    def rank(self, step: int) -> dict[str, float]:
        """At the last line of an epoch its value, else nothing."""
        return {"effective_rank": self._rank()} if self._kept and self._course.epoch_line(step) == step else {}

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what is known of the first steps, and what has been kept since, on the host."""
        kept = torch.cat([features_BC.cpu() for features_BC in self._kept]) if self._kept else None
        return {"first_rank": self.first_rank, "features": kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds; of one of an older version, without what it lacks."""
        self.first_rank = state.get("first_rank")
        self._kept = [state["features"]] if state.get("features") is not None else []

    def _rank(self) -> float:
        device = self._kept[-1].device
        features_NC = torch.cat([features_BC.to(device) for features_BC in self._kept])
        self._kept = []
        return effective_rank(features_NC)


class Watch:
    """Warnings at the last line of an epoch: each kind once, and again only if the trouble ceased and came back.

    Args:
        dead: how the run looks if it learns nothing; None if that cannot be told.
        features: of the run.
        course: of the run.
    """

    def __init__(self, dead: Dead | None, features: Features, course: Course) -> None:
        self._dead, self.features, self._course = dead, features, course
        self._said: set[str] = set()

    def warnings(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Those at a line of the log, a sentence each."""
        if self._dead is None or not self._course.judged(step):
            return []
        found = dict(_troubles(self._dead, values, self.features.first_rank))
        new = [sentence for kind, sentence in found.items() if kind not in self._said]
        self._said = set(found)
        return new


def _troubles(dead: Dead, values: Mapping[str, float], first_rank: float | None) -> Iterator[tuple[str, str]]:
    """What is wrong by the values of one line: its kind, and a sentence."""
    if values[dead.value] > _DEAD_SHARE * dead.loss:
        yield "loss", dead.told(values)
    # To tell so many classes apart takes about as many directions: features of a few classes may well have no more.
    bound = min(_COLLAPSED_SHARE * (first_rank or 0), math.exp(dead.loss) / 2)
    if (rank := values.get("effective_rank", bound)) < bound:
        yield (
            "features",
            f"the features have collapsed: their effective rank is {rank:.1f}, less than {bound:.1f} (it was "
            f"{first_rank:.1f} in the first steps); try a lower optim.lr or optim.weight_decay",
        )
    bound = _VANISHED_SHARE * dead.gamma
    if abs(gamma := values.get("gamma", bound)) < bound:  # far below zero the words' weights have changed sides
        yield (
            "gamma",
            f"gamma, the scale of the logits, is {gamma:.3g}, within {bound:.3g} of zero (it began at {dead.gamma:g}): "
            f"what the network sees hardly counts; try a lower optim.lr, a longer run, or fewer words",
        )
