"""A task: was the image turned upside down?

Legend: B batch, C channels, H W pixels.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from bowstore.config import Positive
from bowstore.data.views import Batch
from bowstore.train.tasks.base import Kind, TaskSettings
from bowstore.train.tasks.task import Dead, Job, Network, Task, pooled


class UpsideDownSettings(TaskSettings):
    """What stands beside `name: upside_down` in a configuration."""

    name: Literal["upside_down"] = "upside_down"
    share: Positive = Field(0.5, lt=1, description="of the images that are turned")


def build(settings: UpsideDownSettings, job: Job) -> Task:
    """The task of a job: its network, what a batch's targets are made of, and the loss."""

    def bring(batch: Batch) -> tuple[Tensor, Tensor]:
        # Of numbers that the plan draws for tasks: the same for any number of ranks, and after every stop.
        turned_B = torch.from_numpy(batch.plan.task_draws(1)[:, 0] < settings.share)
        return batch.images_BCHW, turned_B.to(job.world.device, non_blocking=True)

    share = settings.share
    chance = -share * math.log(share) - (1 - share) * math.log(1 - share)
    return Task(
        network=Network(job.backbone, torch.nn.Linear(job.backbone.features, 1), pooled),
        bring=bring,
        make=make,
        loss=loss,
        inputs={"shards": job.index.fingerprint},
        constants={"chance_loss": chance},
        dead=Dead.at(chance, "guessing"),
    )


def make(images_BCHW: Tensor, turned_B: Tensor) -> tuple[Tensor, Tensor]:
    """Network inputs and targets, of tensors alone: this is compiled with the network."""
    return torch.where(turned_B[:, None, None, None], images_BCHW.flip(2), images_BCHW), turned_B


def loss(logits_B1: Tensor, turned_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and further scalars for the log."""
    accuracy = ((logits_B1[:, 0] > 0) == turned_B).float().mean()
    return F.binary_cross_entropy_with_logits(logits_B1[:, 0].float(), turned_B.float()), {"accuracy": accuracy}


KIND = Kind(name="upside_down", settings=UpsideDownSettings, build=build, mixes=False)
