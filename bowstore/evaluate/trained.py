"""Settings of protocols that train on augmented images, of a published data set or of one's own. Loads no torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field

from bowstore.config import Seed, ViewConfig, Workspace
from bowstore.data.plan import MIX_GROUP
from bowstore.errors import DataError, UsageError
from bowstore.evaluate.protocol import DataSets, Protocol
from bowstore.evaluate.splits import NUMBERS
from bowstore.evaluate.train_test import TrainTestSettings, held_out_protocol, resolve_train_test
from bowstore.limits import MAX_BATCH
from bowstore.progress import say_once
from bowstore.torchrun import ranks
from bowstore.train.config import OptimConfig

BATCH = 256
_MAX_EPOCHS = 1000
_PUBLISHED = {"size": 224, "resize": 256}  # pixels, whatever the network was trained at
# Random area and ratio, and flip: what all of these protocols have in common (protocols 3.3 and 3.4).
_CROP_AND_FLIP = {
    "area": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "flip": True,
    "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grey": 0.0, "cutmix": False,
}  # fmt: skip


class TrainedSettings(TrainTestSettings):
    """What a user sets; all else is the protocol's."""

    dataset: ClassVar[str]  # the one whose figures are published

    epochs: int | None = Field(
        None,
        ge=1,
        le=_MAX_EPOCHS,
        description="passes over the train images; lr falls at the same shares (another id); null: as published",
    )
    batch: int | None = Field(
        None,
        ge=MIX_GROUP,
        le=MAX_BATCH,
        description=f"images a step, over all processes (another id); null: {BATCH}, or, of fewer train images, the "
        "largest power of two",
    )
    own_images: bool = Field(
        False,
        description="any images, at the size that the network was trained at (another id); null: those of other data "
        "sets",
    )
    seed: Seed = Field(0, description="of all that is drawn: weights, order, augmentation, a sample of labels")

    def train_view(self, view: ViewConfig, **changes: Any) -> ViewConfig:
        """How images are seen in training, and without its perturbations in the test.

        Args:
            view: of the network; its mean and deviation are always taken.
            changes: what the protocol has beside a random crop and a flip.
        """
        size = {} if self.own_images else _PUBLISHED
        return view.model_copy(update={**_CROP_AND_FLIP, **size, **changes})


S = TypeVar("S", bound=TrainedSettings)


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """When the learning rate falls.

    Attributes:
        length: of the training.
        unit: of the length and of the milestones; an epoch is one pass.
        milestones: after which the rate is multiplied by `factor`.
        factor: less than 1.
    """

    length: int
    unit: Literal["epochs", "iterations"] = "epochs"
    milestones: tuple[int, ...]
    factor: float = 0.1

    def optim(self, settings: TrainedSettings, images: int, **how: Any) -> OptimConfig:
        """The schedule in steps, for a number of train images; `how` says the rest of `OptimConfig`.

        Another number of epochs has its milestones at the same shares of the training.
        """
        batch = settings.batch or BATCH
        of_a_pass = images // batch
        steps = self.length * (of_a_pass if self.unit == "epochs" else 1)
        if settings.epochs:
            steps = settings.epochs * of_a_pass
        falls = dict.fromkeys(max(1, round(steps * milestone / self.length)) for milestone in self.milestones)
        return OptimConfig(
            batch=batch, epochs=steps, steps_per_epoch=1, milestones=tuple(falls), factor=self.factor, **how
        )


def trained_protocol(protocol: Protocol, settings: TrainedSettings, schedule: StepSchedule) -> Protocol:
    """The protocol with all in its id that the settings change."""
    parts = [protocol.id]
    if settings.epochs and (settings.epochs, "epochs") != (schedule.length, schedule.unit):
        parts.append(f"{settings.epochs}-epochs")
    if settings.batch not in (None, BATCH):
        parts.append(f"batch-{settings.batch}")
    if settings.own_images:
        parts.append("own-images")
    protocol = replace(protocol, id="/".join(parts))
    return held_out_protocol(protocol) if settings.held_out else protocol


def resolve_trained(settings: S, workspace: Workspace, images: Callable[[S, Workspace], DataSets]) -> S:
    """The workspace's shards where none are named; whether they are those of the published figures; the batch.

    Args:
        settings: as a user gives them.
        workspace: says what they leave out.
        images: opens the data.
    """
    settings = resolve_train_test(settings, workspace)
    found, said = images(settings, workspace), []
    count, dataset = len(found["train"]), settings.dataset
    own = settings.own_images or found.dataset != dataset
    if own and not settings.own_images:
        classes, train, test = NUMBERS[dataset]
        said.append(
            f"{settings.train} and what is tested on are not {dataset} ({classes} classes, {train} train and {test} "
            "test images): figures get an id of their own, own-images, and images the size that the network was "
            "trained at"
        )
    if (batch := settings.batch or _batch_of(count)) < BATCH and not settings.batch:
        said.append(
            f"{count} train images are fewer than a batch of {BATCH}: the batch is {batch}, in an id of its own"
        )
    for line in said if ranks().first else ():
        say_once(line)
    return settings.model_copy(update={"own_images": own, "batch": batch})


def check_batch(settings: TrainedSettings, data: DataSets) -> DataSets:
    """The data, at the published size or the network's, once a batch can be filled and shared out.

    Raises:
        DataError: fewer images than the smallest batch.
        UsageError: a batch of more images than there are, or one that the processes cannot share.
    """
    images, batch, shares = len(data["train"]), settings.batch or BATCH, MIX_GROUP * ranks().size
    if images < MIX_GROUP:
        raise DataError(f"{images} train images are fewer than the {MIX_GROUP} of the smallest batch; use more images")
    if batch > images:
        raise UsageError(
            f"batch {batch} is more than the {images} train images; give --batch {_batch_of(images)} or less, or more "
            "images"
        )
    if batch % shares:
        raise UsageError(
            f"batch {batch} must be a multiple of {shares} (processes x {MIX_GROUP}); give another --batch, or start "
            "fewer processes"
        )
    return data if settings.own_images else replace(data, view=_PUBLISHED)


def _batch_of(images: int) -> int:
    """As published, or the largest power of two that so many images fill."""
    return BATCH if images >= BATCH else max(MIX_GROUP, 1 << (images.bit_length() - 1))
