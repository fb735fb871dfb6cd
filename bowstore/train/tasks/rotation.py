"""RotNet: which of four rotations an image is in; all four of each image are in the batch (paper, section 4).

Legend: B batch, C channels, H W pixels.
"""

import math

import torch
from torch import Tensor

from bowstore.models.backbone import Backbone
from bowstore.models.heads import LinearHead, RotationHead
from bowstore.train.tasks.labels import label_loss
from bowstore.train.tasks.settings import RotationSettings
from bowstore.train.tasks.task import Dead, Job, Network, Task, last_map, pooled

ROTATIONS = 4
_CHANCE = math.log(ROTATIONS)


def build(settings: RotationSettings, job: Job) -> Task:
    """The task of a job."""
    return Task(
        network=_network(settings, job.backbone),
        bring=lambda batch: (batch.images_BCHW,),
        make=four_rotations,
        loss=label_loss,
        constants={"chance_loss": _CHANCE},
        inputs={"shards": job.index.fingerprint},
        views=ROTATIONS,
        dead=Dead.at(_CHANCE, "guessing the rotation"),
    )


def _network(settings: RotationSettings, backbone: Backbone) -> Network:
    if settings.head == "linear":
        return Network(backbone, LinearHead(backbone.features, ROTATIONS), pooled)
    return Network(backbone, RotationHead(backbone, settings.blocks), last_map)


def four_rotations(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """All images as they are, then all by a quarter, a half and three quarters, and int64 labels of that, (4 B,)."""
    images_BHWC = images_BCHW.permute(0, 2, 3, 1)
    # Joined as they lie in memory, channels last: joined as BCHW they would be copied once more for the network.
    turned_BHWC = torch.cat([torch.rot90(images_BHWC, quarter, (1, 2)) for quarter in range(ROTATIONS)])
    label_B = torch.arange(ROTATIONS, device=images_BCHW.device).repeat_interleave(len(images_BCHW))
    return turned_BHWC.permute(0, 3, 1, 2), label_B
