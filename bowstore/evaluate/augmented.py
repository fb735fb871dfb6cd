"""Perturbed images with their labels, for protocols that train on them.

Legend: B samples of this rank's batch, C channels, H W pixels of the network input.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bowstore.config import ViewConfig
from bowstore.data.pipeline import train_batches
from bowstore.data.plan import Schedule, plans
from bowstore.evaluate.protocol import LabelledSplit
from bowstore.train.distributed import World


def augmented(
    split: LabelledSplit, view: ViewConfig, *, batch: int, seed: int, world: World, steps: int
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Yield images (B, C, H, W) of the train view without CutMix, on this rank's device, with their labels (B,).

    Which images, and how they are perturbed, is that of a training run: a function of seed and step, for any number of
    ranks.

    Args:
        split: of shards.
        view: perturbation, size and normalisation.
        batch: samples a step over all ranks; a multiple of 4 x ranks.
        seed: of order and perturbation.
        world: this process's place.
        steps: how many batches.

    Raises:
        UsageError: fewer images than a batch, or a batch that cannot be shared out.
        DataError: an image that cannot be decoded.
    """
    index, rows = split.index, split.rows
    assert index is not None, "the images lie in shards"
    view = view.model_copy(update={"cutmix": False})
    # A plan counts the images of the split, the reader those of the index.
    part = replace(index, height=index.height[rows], width=index.width[rows])
    schedule = Schedule(len(split), batch, seed, world.rank, world.size)
    drawn = plans(schedule, part, view, start=0, stop=steps)
    label_N = np.full(len(index), -1, np.int64)
    label_N[rows] = split.labels
    placed = (replace(plan, rows=rows[plan.rows]) for plan in drawn)
    for made in train_batches(split.open(), view, placed, batch=schedule.rank_batch, device=world.device):
        yield made.images_BCHW, label_N[made.plan.rows]
