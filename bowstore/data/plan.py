"""What a training run reads, and how each image is perturbed: a pure function of (seed, epoch, position).

An epoch here is one pass over the rows. Every number comes from the counter-based generator Philox: the order of
a pass from the key (seed, pass), and the random numbers of a sample from its position in the pass. Any step can be
recomputed alone, and no number depends on the number of ranks.

Legend: N rows, B samples of one rank's batch, T tries for a crop window, P cells of a grid over the output.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowstore.config import ViewConfig
from bowstore.data.index import Index
from bowstore.errors import UsageError

MIX_GROUP = 4  # CutMix partners lie in groups of this many consecutive positions
_TRIES = 10
_BLOCK = 4  # numbers of one Philox block: what its counter counts
_DRAWS = 32  # uniform numbers a sample; a multiple of a block
# What each of these numbers decides. Resumed runs must find the same ones: a new use takes a stream of its own.
COLUMNS: Mapping[str, int | slice] = {
    "area": slice(0, _TRIES),
    "ratio": slice(_TRIES, 2 * _TRIES),
    "top": 20,
    "left": 21,
    "mirror": 22,
    "jitter": slice(23, 26),  # brightness, contrast, saturation
    "hue": 26,
    "grey": 27,
    "partner": 28,  # the first sample's, for its whole group
    "box_area": 29,
    "box_centre": slice(30, 32),
}
_ORDER, _SAMPLES, _TASK = 0, 1, 2  # streams of one (seed, pass)
Draws = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Origin:
    """Where a batch comes from: what its random numbers are a function of.

    Attributes:
        seed: the run's seed.
        epoch: the pass over the rows.
        first: position in the pass of the batch's first sample.
    """

    seed: int
    epoch: int
    first: int


@dataclass(frozen=True)
class Plan:
    """One rank's batch: which rows, and the perturbation of each.

    Attributes:
        rows: int64 (B,), rows of the index.
        window: int32 (B, 4), crop window in the image: top, left, height, width in pixels.
        mirror: int32 (B,), 1 for a horizontal flip of this image, wherever it is pasted.
        brightness: float32 (B,), factor.
        contrast: float32 (B,), factor around mid-grey.
        saturation: float32 (B,), factor; 0 makes the image grey.
        hue: float32 (B,), degrees.
        partner: int32 (B,), place in this batch of the CutMix partner (itself without CutMix).
        box: int32 (B, 4), the pasted box in the output, which is not flipped again: top, left, height, width in
            pixels (0 without CutMix). It shows what the partner, cropped, flipped and coloured by its own numbers,
            has in the same place.
        kept: float32 (B,), the paper's lambda: share of the output's area that is not pasted over, exactly.
        mixed: whether images are mixed at all; if not, each is its own partner.
        size: side of the square output, pixels.
        origin: where the batch comes from.
    """

    rows: NDArray[np.int64]
    window: NDArray[np.int32]
    mirror: NDArray[np.int32]
    brightness: NDArray[np.float32]
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    hue: NDArray[np.float32]
    partner: NDArray[np.int32]
    box: NDArray[np.int32]
    kept: NDArray[np.float32]
    mixed: bool
    size: int
    origin: Origin

    def kept_in(self, grid: tuple[int, int]) -> NDArray[np.float32]:
        """Share of each cell's area that is not pasted over, exactly: float32 (B, P), cells in reading order.

        Args:
            grid: rows and columns of equal cells that the output is cut into; cells need not be whole pixels.
        """
        rows, columns = grid
        # In units of 1 / rows of a pixel (1 / columns across), a cell has the side `size`, and all edges are integers.
        down_Br = _covered(self.box[:, 0], self.box[:, 2], rows, self.size)
        across_Bc = _covered(self.box[:, 1], self.box[:, 3], columns, self.size)
        pasted_Brc = down_Br[:, :, None] * across_Bc[:, None, :]
        shown_Brc = self.size**2 - pasted_Brc
        return (shown_Brc.reshape(len(self.box), -1) / self.size**2).astype(np.float32)

    def mixing(self, kept: NDArray[np.float32]) -> tuple[NDArray[Any], ...]:
        """Where images are mixed, each one's partner, int64 (B,), and what is kept of it, as given; else nothing."""
        return (self.partner.astype(np.int64), kept) if self.mixed else ()

    def task_draws(self, count: int) -> NDArray[np.float64]:
        """Uniform numbers of a task's own, float64 (B, count) in [0, 1): others than those of the perturbation.

        A sample's numbers follow from seed, pass and position. More of them begin with the same ones.
        """
        at = self.origin
        # Four columns at a time, told apart by the counter's second word, so that no column depends on their number.
        parts = [
            generator(at.seed, at.epoch, _TASK, at.first, part).random((len(self.rows), _BLOCK))
            for part in range(-(-count // _BLOCK))
        ]
        return np.concatenate(parts, axis=1)[:, :count]

    def unmixed(self) -> "Plan":
        """The same without CutMix."""
        place = np.arange(len(self.rows), dtype=np.int32)
        return replace(self, mixed=False, partner=place, box=np.zeros_like(self.box), kept=np.ones_like(self.kept))


def _covered(start_B: NDArray[np.int32], length_B: NDArray[np.int32], cells: int, size: int) -> NDArray[np.int64]:
    """What a box covers of each cell along one axis, int64 (B, cells), in units of 1 / cells of a pixel."""
    low_B1 = start_B.astype(np.int64)[:, None] * cells
    high_B1 = low_B1 + length_B.astype(np.int64)[:, None] * cells
    edge = np.arange(cells, dtype=np.int64) * size
    covered: NDArray[np.int64] = np.minimum(high_B1, edge + size) - np.maximum(low_B1, edge)
    return covered.clip(0)


@dataclass(frozen=True)
class Schedule:
    """The order of a run: which positions of which pass each step takes.

    Attributes:
        images: number of rows N in use (the first N of the index).
        batch: samples a step over all ranks.
        seed: the run's seed.
        rank: this process.
        world: number of processes.
    """

    images: int
    batch: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch % (self.world * MIX_GROUP):
            raise UsageError(
                f"optim.batch {self.batch} must be a multiple of {self.world * MIX_GROUP} "
                f"({self.world} ranks x CutMix groups of {MIX_GROUP})"
            )
        if self.images < self.batch:
            raise UsageError(f"{self.images} images are fewer than one batch of {self.batch}; lower optim.batch")

    @property
    def steps_per_pass(self) -> int:
        """Steps of one pass over the rows; the same on every rank, the incomplete rest is dropped."""
        return self.images // self.batch

    @property
    def rank_batch(self) -> int:
        """Samples a step on this rank."""
        return self.batch // self.world


def generator(seed: int, epoch: int, stream: int, block: int = 0, part: int = 0) -> np.random.Generator:
    """The Philox stream of a pass, started at the counter (`block`, `part`): four 64-bit numbers a block."""
    return np.random.Generator(np.random.Philox(key=[seed, (epoch << 8) | stream], counter=[block, part, 0, 0]))


def epoch_order(images: int, seed: int, epoch: int) -> NDArray[np.int32]:
    """Order of a pass: a permutation of the rows, int32 (N,)."""
    order_N = np.arange(images, dtype=np.int32)
    generator(seed, epoch, _ORDER).shuffle(order_N)  # in place: a second array of 400 million rows is 1.6 GB
    return order_N


def plans(schedule: Schedule, index: Index, view: ViewConfig, *, start: int, stop: int) -> Iterator[Plan]:
    """Yield this rank's plan of the steps `start` to `stop` (exclusive)."""
    order: NDArray[np.int32] | None = None
    current = -1
    for step in range(start, stop):
        epoch, step_of_pass = divmod(step, schedule.steps_per_pass)
        if order is None or epoch != current:
            order = None  # one order in memory at a time
            order, current = epoch_order(schedule.images, schedule.seed, epoch), epoch
        first = step_of_pass * schedule.batch + schedule.rank * schedule.rank_batch
        rows = order[first : first + schedule.rank_batch].astype(np.int64)
        yield plan_of(rows, index, view, Origin(schedule.seed, epoch, first))


def plan_of(rows: NDArray[np.int64], index: Index, view: ViewConfig, origin: Origin) -> Plan:
    """The plan of rows (B,) that stand at the positions of a pass from the origin's first on."""
    first = origin.first * _DRAWS // _BLOCK
    draws = generator(origin.seed, origin.epoch, _SAMPLES, first).random((len(rows), _DRAWS))
    return perturb(rows, index.height[rows], index.width[rows], draws, view, origin)


def perturb(
    rows: NDArray[np.int64],
    height: NDArray[np.int32],
    width: NDArray[np.int32],
    draws: NDArray[np.float64],
    view: ViewConfig,
    origin: Origin,
) -> Plan:
    """Turn uniform draws (B, 32) into the perturbation g of the paper (section 2.3).

    Args:
        rows: int64 (B,).
        height: (B,) pixels of each image.
        width: (B,) pixels.
        draws: float64 (B, 32) in [0, 1), by `COLUMNS`.
        view: strengths.
        origin: where the batch comes from.
    """
    draw = {name: draws[:, columns] for name, columns in COLUMNS.items()}
    jitter = 2 * draw["jitter"] - 1
    factor = 1 + jitter * np.array([view.brightness, view.contrast, view.saturation])
    saturation = np.where(draw["grey"] < view.grey, 0.0, factor[:, 2])
    partner, box = _mix(draw, view)
    return Plan(
        rows=rows,
        window=_windows(height, width, draw, view),
        mirror=((draw["mirror"] < 0.5) & view.flip).astype(np.int32),
        brightness=factor[:, 0].astype(np.float32),
        contrast=factor[:, 1].astype(np.float32),
        saturation=saturation.astype(np.float32),
        hue=(360 * view.hue * (2 * draw["hue"] - 1)).astype(np.float32),
        partner=partner,
        box=box,
        kept=(1 - box[:, 2].astype(np.float64) * box[:, 3] / view.size**2).astype(np.float32),
        mixed=view.cutmix,
        size=view.size,
        origin=origin,
    )


def _windows(height: NDArray[np.int32], width: NDArray[np.int32], draw: Draws, view: ViewConfig) -> NDArray[np.int32]:
    """Crop windows int32 (B, 4) of random area and ratio, the first of ten tries that fits.

    As torchvision's RandomResizedCrop: area uniform, ratio log-uniform; where no try fits, the largest centred
    window whose ratio is in range.
    """
    area_B1 = (height.astype(np.float64) * width)[:, None]
    low, high = view.area
    area_BT = area_B1 * (low + (high - low) * draw["area"])
    logs = np.log(view.ratio)
    ratio_BT = np.exp(logs[0] + (logs[1] - logs[0]) * draw["ratio"])
    widths = np.rint(np.sqrt(area_BT * ratio_BT)).astype(np.int64)
    heights = np.rint(np.sqrt(area_BT / ratio_BT)).astype(np.int64)
    fits = (widths > 0) & (widths <= width[:, None]) & (heights > 0) & (heights <= height[:, None])
    first = fits.argmax(axis=1)
    pick = np.arange(len(first))
    own = width / np.maximum(height, 1)
    fall_w = np.where(own > view.ratio[1], np.rint(height * view.ratio[1]), width)
    fall_h = np.where(own < view.ratio[0], np.rint(width / view.ratio[0]), height)
    found = fits.any(axis=1)
    w = np.clip(np.where(found, widths[pick, first], fall_w), 1, width).astype(np.int64)
    h = np.clip(np.where(found, heights[pick, first], fall_h), 1, height).astype(np.int64)
    top = np.where(found, np.floor(draw["top"] * (height - h + 1)), (height - h) // 2)
    left = np.where(found, np.floor(draw["left"] * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int32)


def _mix(draw: Draws, view: ViewConfig) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """CutMix partner (B,) and box (B, 4): lambda uniform, centre uniform, box clipped to the output.

    The partner is the neighbour 1 to 3 places further in the group of four, by the first sample's draw.
    """
    count = len(draw["partner"])
    place = np.arange(count, dtype=np.int32)
    if not view.cutmix:
        return place, np.zeros((count, 4), np.int32)
    start = place - place % MIX_GROUP
    shift = 1 + np.floor(draw["partner"][start] * (MIX_GROUP - 1)).astype(np.int32)
    partner = (start + (place - start + shift) % MIX_GROUP).astype(np.int32)
    side = view.size * np.sqrt(draw["box_area"])  # the share 1 - lambda of the area is uniform
    centre = draw["box_centre"] * view.size
    low = np.clip(np.rint(centre - side[:, None] / 2), 0, view.size).astype(np.int32)
    high = np.clip(np.rint(centre + side[:, None] / 2), 0, view.size).astype(np.int32)
    return partner, np.concatenate([low, high - low], axis=1)
