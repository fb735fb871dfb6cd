"""RelLoc: where a patch lies around the centre one of a 3 x 3 grid (Doersch et al.; teacher of the paper's Table 3).

All nine patches of an image are in the batch, and all eight pairs with the centre. Most images should be grey
(`view.grey`): those have no colour fringes, by which a network can tell what part of a photograph a patch is from.

Legend: B batch, C channels, H W pixels, P patches of an image, S side of the view, s side of a patch.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bowstore.data.plan import Plan
from bowstore.data.views import Batch
from bowstore.models.heads import PairHead
from bowstore.progress import say
from bowstore.train.schedule import images_in_use
from bowstore.train.tasks.labels import label_loss
from bowstore.train.tasks.settings import LocationSettings
from bowstore.train.tasks.task import Dead, Job, Network, Task, pooled

_GRID = 3
_PATCHES = _GRID**2
_PLACES = _PATCHES - 1  # around the centre
_CHANCE = math.log(_PLACES)
_LEAST_VARIANCE = 1e-10  # the square of 1e-5, which a patch of one colour is divided by; a grey level is about 0.02


def build(settings: LocationSettings, job: Job) -> Task:
    """The task of a job."""
    if job.world.first:
        _say_what_is_enlarged(job)

    def bring(batch: Batch) -> tuple[Tensor, ...]:
        corner_BP2 = torch.from_numpy(corners(batch.plan, settings))
        return batch.images_BCHW, corner_BP2.to(job.world.device, non_blocking=True)

    def make(images_BCHW: Tensor, corner_BP2: Tensor) -> tuple[Tensor, Tensor]:
        patches_NCss = standardised(cut(images_BCHW, corner_BP2, settings.patch))
        return patches_NCss, torch.arange(_PLACES, device=corner_BP2.device).repeat(len(corner_BP2))

    return Task(
        network=Network(job.backbone, PairHead(job.backbone.features, settings.hidden, _PATCHES), pooled),
        bring=bring,
        make=make,
        loss=label_loss,
        constants={"chance_loss": _CHANCE},
        inputs={"shards": job.index.fingerprint},
        views=_PATCHES,
        dead=Dead.at(_CHANCE, "guessing the place"),
    )


def corners(plan: Plan, settings: LocationSettings) -> NDArray[np.int64]:
    """Top and left pixel of each patch in the view, int64 (B, 9, 2), patches in reading order.

    Each patch lies in its cell of the grid by two of the task's own draws, anywhere from its first to its last place;
    the grid is in the middle of the view.
    """
    moved_BP2 = np.floor(plan.task_draws(2 * _PATCHES) * (settings.jitter + 1)).reshape(-1, _PATCHES, 2)
    first = (plan.size - settings.grid_side) // 2
    cell_P2 = np.stack(np.divmod(np.arange(_PATCHES), _GRID), axis=1)
    pitch = settings.patch + settings.jitter + settings.gap
    return first + pitch * cell_P2 + moved_BP2.astype(np.int64)


def cut(images_BCHW: Tensor, corner_BP2: Tensor, side: int) -> Tensor:
    """The patches (B P, C, s, s) of images (B, C, S, S), channels last in memory, those of an image in a row.

    Args:
        images_BCHW: channels last.
        corner_BP2: int64, top and left pixel of each patch.
        side: s.
    """
    (_, channels, size, _), device = images_BCHW.shape, images_BCHW.device
    # All runs of s pixels of the whole batch, as a view: a row of a patch is one of them, and is copied in one piece.
    # (On a CPU 0.5 ms for 1152 patches; indexing pixel by pixel takes 17, and a slice a patch 6.)
    runs_Nr = images_BCHW.permute(0, 2, 3, 1).reshape(-1).unfold(0, side * channels, channels)
    image_B1 = torch.arange(len(images_BCHW), device=device)[:, None]
    first_BP = (image_B1 * size + corner_BP2[..., 0]) * size + corner_BP2[..., 1]
    row_BPs = first_BP[..., None] + size * torch.arange(side, device=device)
    patches_NssC = runs_Nr.index_select(0, row_BPs.flatten()).view(-1, side, side, channels)
    return patches_NssC.permute(0, 3, 1, 2)


def standardised(patches_NCss: Tensor) -> Tensor:
    """Patches less their own mean, over their own deviation, over all values of each; of one colour: zeros."""
    patches_NssC = patches_NCss.permute(0, 2, 3, 1)
    return F.layer_norm(patches_NssC, patches_NssC.shape[1:], eps=_LEAST_VARIANCE).permute(0, 3, 1, 2)


def _say_what_is_enlarged(job: Job) -> None:
    """One line about images that are smaller than the view: they lose nothing, and gain nothing."""
    size, used = job.config.view.size, images_in_use(job.config, len(job.index))
    short_N = np.minimum(job.index.height[:used], job.index.width[:used])
    if small := int((short_N < size).sum()):
        say(
            f"{small} of {used} images are smaller than the view (the smallest has a side of {short_N.min()} pixels): "
            f"they are enlarged to {size} x {size} before patches are cut"
        )
