"""Fine-tuning the whole network on 1 % or 10 % of the labels, by obow's schedule (semi-supervised ImageNet)."""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from bowstore.config import Place, Workspace
from bowstore.errors import UsageError
from bowstore.evaluate.protocol import DataSets, Kind, Protocol
from bowstore.evaluate.subsets import check_filled, listed, sampled
from bowstore.evaluate.train_test import open_train_test
from bowstore.evaluate.trained import (
    StepSchedule,
    TrainedSettings,
    check_batch,
    resolve_trained,
    trained_protocol,
)
from bowstore.progress import say_once
from bowstore.torchrun import ranks

SCHEDULES = {
    1: StepSchedule(length=40, milestones=(24, 32), factor=0.2),
    10: StepSchedule(length=20, milestones=(12, 16), factor=0.2),
}
_LISTED = {1: 12_811, 10: 128_116}  # images of the published lists


class SemisupSettings(TrainedSettings):
    """What a user sets of the fine-tuning."""

    dataset = "imagenet"

    percent: Literal[1, 10] = Field(1, description="of the train images that have labels (in the protocol id)")
    names: Place | None = Field(
        None,
        description="file of their names, one a line, as the published lists; null: a sample (another id)",
    )


def describe(settings: SemisupSettings) -> Protocol:
    """The share of labels is in the id, and whether they are a sample, or anything else but the published ones."""
    kind = "" if settings.names else "/sample"
    protocol = Protocol(
        id=f"semisup/{settings.percent}-percent{kind}",
        version=1,
        description=f"the whole network and a linear layer, fine-tuned on {settings.percent} % of the labels (obow's)",
        headline="top1",
    )
    return trained_protocol(protocol, settings, SCHEDULES[settings.percent])


def _images(settings: SemisupSettings, workspace: Workspace) -> DataSets:
    """The labelled part of the train images, and the test images.

    Raises:
        MismatchError, DataError: as `open_train_test`, `subsets.listed` and `subsets.check_filled`.
    """
    found = open_train_test(settings, workspace)
    train = found["train"]
    if settings.names:
        part, what = listed(train, settings.names, str(settings.train)), str(settings.names)
        remedy = "list an image of each at least"
    else:
        part, what = sampled(train, settings.percent, settings.seed), f"a sample of {settings.percent} %"
        remedy = f"{'give --percent 10, ' if settings.percent == 1 else ''}use more images, or list some by --list"
    check_filled(part, f"{what} of {settings.train}", remedy)
    dataset = found.dataset
    if settings.names and dataset == settings.dataset and len(part) != (images := _LISTED[settings.percent]):
        say_once(f"{settings.names} lists {len(part)} images, and the published list of {settings.percent} % {images}")
        dataset = None
    return replace(found, splits={**found.splits, "train": part}, dataset=dataset)


def resolve(settings: SemisupSettings, workspace: Workspace) -> SemisupSettings:
    """The workspace's shards, whether images and labels are the published ones, and the batch."""
    return resolve_trained(settings, workspace, _images)


def data(settings: SemisupSettings, workspace: Workspace) -> DataSets:
    """Labelled train images, each class among them, a batch at least, and test images.

    Raises:
        MismatchError, DataError: as `_images` and `check_batch`.
        UsageError: as `check_batch`, or several processes.
    """
    if (size := ranks().size) > 1:
        raise UsageError(
            f"eval semisup is for one process, and torchrun started {size}: batch norms take their statistics over the "
            "whole batch; start it without torchrun"
        )
    return check_batch(settings, _images(settings, workspace))


KIND = Kind(
    name="semisup",
    help="Fine-tuning of the whole network on 1 % or 10 % of the labels of ImageNet or class folders.",
    settings=SemisupSettings,
    flags={"names": "--list"},
    describe=describe,
    resolve=resolve,
    data=data,
    run="bowstore.evaluate.finetuned:run",
)
