"""A training task as the loop sees it: a network, how a batch becomes inputs and targets, and the loss.

What comes after a batch's tensors are on the device is made of tensors alone, so that it can be compiled with the
network.

Legend: B batch, C channels, H W pixels, h w feature map.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bowstore.data.index import Index
from bowstore.data.plan import Plan
from bowstore.data.views import Batch
from bowstore.errors import UsageError
from bowstore.models.backbone import Backbone
from bowstore.models.memory import training_format
from bowstore.models.registry import build_backbone
from bowstore.plugins import called
from bowstore.progress import say
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import World
from bowstore.train.start import begin_with
from bowstore.train.tasks import TASKS
from bowstore.train.tasks.base import StartedSettings

Features = Callable[[Backbone, Tensor], Any]
Logits = Tensor | tuple[Tensor, ...]  # of a head, or of each of several

_VALUE = re.compile(r"\{(\w+):?((?:\.\d[efg])?)\}")  # {loss:.4f}


def pooled(backbone: Backbone, images_BCHW: Tensor) -> Tensor:
    """The pooled feature (B, C)."""
    feature_BC: Tensor = backbone(images_BCHW)
    return feature_BC


def last_map(backbone: Backbone, images_BCHW: Tensor) -> Tensor:
    """The last map (B, C, h, w)."""
    last = backbone.layers[-1]
    return backbone.feature_maps(images_BCHW, (last,))[last]


class Network(nn.Module):
    """A backbone and a head as one module, so that DDP and torch.compile see the whole step.

    Args:
        backbone: the network to keep.
        head: maps what `features` gives to logits.
        features: of the backbone and images: `pooled`, `last_map`, or a function of a task's own.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, features: Features) -> None:
        super().__init__()
        self.backbone, self.head, self._features = backbone, head, features
        self._formats = {device: training_format(backbone, device) for device in ("cpu", "cuda")}

    @property
    def frozen(self) -> bool:
        """Whether the head alone is trained."""
        return not any(parameter.requires_grad for parameter in self.backbone.parameters())

    def forward(self, images_BCHW: Tensor) -> Logits:
        """Logits."""
        return self.head(self.features(images_BCHW))  # type: ignore[no-any-return]

    def features(self, images_BCHW: Tensor) -> Any:
        """What the head takes."""
        images_BCHW = images_BCHW.contiguous(memory_format=self.memory_format(images_BCHW.device))
        return self._features(self.backbone, images_BCHW)

    def memory_format(self, device: torch.device) -> torch.memory_format:
        """How weights and maps lie in memory (`bowstore.models.memory`)."""
        return self._formats[device.type]


@dataclass
class Dead:
    """How a run that learns nothing looks.

    Attributes:
        loss: what it stays at, nats; another after a renewal of the targets.
        sentence: what it says and what may help; `{loss:.4f}` stands for a value of the log.
        gamma: where the value of this name in the log begins, the scale of the logits; 0 if there is none.
        value: name in the log of what stays there: the loss, or a part of it.
    """

    loss: float
    sentence: str
    gamma: float = 0.0
    value: str = "loss"

    @classmethod
    def at(cls, loss: float, what: str, gamma: float = 0.0) -> Self:
        """One that stays at the loss of `what`, whatever the image; `gamma` where the logits have such a scale."""
        said, remedy = (" (gamma {gamma:.3g})", " or task.gamma") if gamma else ("", "")
        sentence = f"the loss {{loss:.4f}} is still that of {what} ({loss:.4f}): nothing is learned{said}; try a lower"
        return cls(loss, f"{sentence} optim.lr{remedy}", gamma)

    def told(self, values: Mapping[str, float]) -> str:
        """The sentence of one line of the log; braces around anything else stay as they are."""
        return _VALUE.sub(
            lambda found: format(values[found[1]], found[2]) if found[1] in values else found[0], self.sentence
        )


class Renewal(ABC):
    """Targets that the network itself makes anew from time to time while it is trained; part of a run's state."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether they are made anew before a step (from 0); the same on every rank."""

    @abstractmethod
    def renew(self, step: int) -> Iterable[nn.Parameter]:
        """Make them anew, all ranks together; the network's modes stay as they are.

        What it draws depends on the configuration's seed and the step alone.

        Returns:
            Parameters that were reset, whose momenta are to be forgotten.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The targets as they are, as tensors and plain values for a checkpoint."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with those of a checkpoint, on any number of ranks."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training task.

    Attributes:
        network: images to logits.
        bring: a batch's images and whatever its targets are made of, on the device.
        make: network inputs and targets of these tensors.
        loss: (logits, targets) to the scalar loss, and to further scalars that cost next to nothing: of all of these
            the log has the mean over the steps. Logits of several heads are a tuple.
        inputs: identity of the data the run depends on; a resumed run must find the same.
        scalars: (logits, targets) to scalars of a step that is logged, and of no other.
        ahead: the host's part of a batch's targets, called in the reading thread; `bring` finds it in the batch.
        constants: numbers of the whole run for the log of rank 0, such as the marginal's loss; a renewal may set them.
        modes: puts the network's modules into train or eval mode, once before the first step.
        views: network inputs an image.
        dead: how a run looks that learns nothing; None if that cannot be told, and on ranks other than 0.
        renewal: what makes the targets anew in the course of training; None where they are fixed.
        lineage: what the targets come from, and the weights that the run began with, as plain values.
    """

    network: Network
    bring: Callable[[Batch], tuple[Tensor, ...]]
    make: Callable[..., tuple[Tensor, Any]]
    loss: Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]]
    inputs: dict[str, str]
    scalars: Callable[[Any, Any], dict[str, Tensor]] | None = None
    ahead: Callable[[Plan], Any] | None = None
    constants: dict[str, float] = field(default_factory=dict)
    modes: Callable[[Network], object] = nn.Module.train
    views: int = 1
    dead: Dead | None = None
    renewal: Renewal | None = None
    lineage: dict[str, Any] = field(default_factory=dict)

    def prepare(self, batch: Batch) -> tuple[Tensor, Any]:
        """Network inputs and targets of a batch."""
        return self.make(*self.bring(batch))


@dataclass(frozen=True)
class Job:
    """What a task is built for.

    Attributes:
        config: of the run, paths and layer filled in.
        backbone: initialised from the configuration's seed, which torch's generator goes on with, or as the run is
            that the settings start from.
        index: of the images.
        world: who this process is among the ranks.
    """

    config: TrainConfig
    backbone: Backbone
    index: Index
    world: World


def mixing(plan: Plan, device: torch.device) -> tuple[Tensor, ...]:
    """What `mix_bags` takes of a batch whose images are mixed, on the device; of any other, nothing."""
    return placed(plan.mixing(plan.kept), device)


def placed(arrays: Iterable[NDArray[Any]], device: torch.device) -> tuple[Tensor, ...]:
    """Arrays as tensors on the device."""
    return tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)


def build_task(config: TrainConfig, index: Index, world: World) -> Task:
    """The task of a configuration.

    The network is randomly initialised from the configuration's seed; where its settings name a run to start from, the
    backbone is that run's, whose weights are then among the task's inputs.

    Raises:
        UsageError: the network does not take images of the size that the task gives it.
    """
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.model)
    _check_side(backbone, config)
    if (frozen := backbone.freeze_unused()) and world.first:
        names = ", ".join(sorted({name.rpartition(".")[0] for name in frozen}))
        say(f"{names} of {backbone.arch}: behind {backbone.layers[-1]}, the last map that is used; not trained")
    started = isinstance(config.task, StartedSettings) and config.task.start
    start = begin_with(started, backbone, config) if started else None
    task: Task = called(TASKS.get(config.task.name).build)(config.task, Job(config, backbone, index, world))
    if start is None:
        return task
    inputs, lineage = {**task.inputs, "start": start.sha256}, {**task.lineage, "start": start.lineage}
    return replace(task, inputs=inputs, lineage=lineage)


def _check_side(backbone: Backbone, config: TrainConfig) -> None:
    """The network takes what the task gives it, or one line says that it does not, before there is anything to do."""
    try:
        backbone.layer_table(config.task.input_side(config.view))
    except UsageError as error:
        raise UsageError(
            f"task {config.task.name}: {error}; set view.size, or the task's own sizes, to what it takes, or another "
            f"model.arch"
        ) from error
