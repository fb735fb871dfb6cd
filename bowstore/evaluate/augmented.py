"""Perturbed images with their labels, for protocols that train on them.

Legend: B samples of this rank's batch, C channels, H W pixels of the network input, N images of the index.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from bowstore.config import ViewConfig
from bowstore.data.pipeline import train_batches
from bowstore.data.plan import Plan, Schedule, plans
from bowstore.evaluate.protocol import LabelledSplit
from bowstore.train.distributed import World

# Deviations and directions of ImageNet's colours (RGB, on the scale 0 to 1), as the public code has them.
_COLOUR_DEVIATION_3 = np.array([0.2175, 0.0188, 0.0045])
_COLOUR_DIRECTION_33 = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)  # fmt: skip
_LEAST_DRAW = 2.0**-54  # a draw may be 0, of which the normal quantile is infinite
_SHORT_SIDE = 8 / 7  # of the resized image over the crop's side, where the view has no size to be resized to


def augmented(
    split: LabelledSplit,
    view: ViewConfig,
    *,
    batch: int,
    seed: int,
    world: World,
    steps: int,
    square_crop: bool = False,
    lighting: float = 0.0,
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
        square_crop: instead of a window of random area and ratio, a random square of what `resize` makes of the image.
        lighting: deviation of random shares of the principal colours, which are added (AlexNet's); 0 for none.

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
    if square_crop:
        drawn = (replace(plan, window=square_windows(plan, part.height, part.width, view)) for plan in drawn)
    label_N = np.full(len(index), -1, np.int64)
    label_N[rows] = split.labels
    placed = (replace(plan, rows=rows[plan.rows]) for plan in drawn)
    for made in train_batches(split.open(), view, placed, batch=schedule.rank_batch, device=world.device):
        images_BCHW = made.images_BCHW
        if lighting:
            noise_BC = torch.from_numpy(light(made.plan, lighting) / np.array(view.std)).to(images_BCHW)
            images_BCHW = images_BCHW + noise_BC[:, :, None, None]
        yield images_BCHW, label_N[made.plan.rows]


def square_windows(
    plan: Plan, height_N: NDArray[np.int32], width_N: NDArray[np.int32], view: ViewConfig
) -> NDArray[np.int32]:
    """Windows (B, 4) of a crop of `size` out of the image with its short side at `resize`: top, left, height, width.

    The crop is cut out of the image as it is and then resized, which is the same to a pixel's fraction.
    """
    height_B, width_B = height_N[plan.rows].astype(np.int64), width_N[plan.rows].astype(np.int64)
    short = view.resize or _SHORT_SIDE * view.size
    side_B = np.rint(np.minimum(height_B, width_B) * view.size / short).astype(np.int64).clip(1)
    draw_B2 = plan.task_draws(2)
    top_B, left_B = (
        np.floor(draw_B * (length_B - side_B + 1))
        for draw_B, length_B in zip(draw_B2.T, (height_B, width_B), strict=True)
    )
    return np.stack([top_B, left_B, side_B, side_B], axis=1).astype(np.int32)


def light(plan: Plan, deviation: float) -> NDArray[np.float64]:
    """What is added to each colour of an image, (B, 3) on the scale 0 to 1: a normal share of each principal colour."""
    share_B3 = deviation * ndtri(plan.task_draws(3).clip(_LEAST_DRAW))
    lit_B3: NDArray[np.float64] = (share_B3 * _COLOUR_DEVIATION_3) @ _COLOUR_DIRECTION_33.T
    return lit_B3
