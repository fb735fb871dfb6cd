"""What the train view shows of an image, cell by cell of a grid over its clean view, by area.

Legend: B batch, h w cells along the axes, M cells.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bowstore.data.plan import Plan

_NOTHING = 1e-9  # of the view's area; what rounding leaves of a cell that is not seen


class CleanGrid(NamedTuple):
    """Equal cells over the clean view (`bowstore.data.views.CleanView`), without those at its border.

    Attributes:
        cells: (h, w), without the border.
        border: cells left out at each side.
        size: side of the clean view, pixels.
        resize: short side of the image before its centre is cropped, pixels; None where the view is the whole image.
    """

    cells: tuple[int, int]
    border: int
    size: int
    resize: int | None


def shown(
    plan: Plan, height_B: NDArray[np.int32], width_B: NDArray[np.int32], grid: CleanGrid
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Shares of the train view's area in which each cell is seen: of the image itself, and of its CutMix partner.

    Exact, also for cells of which a part is seen: the crop window, each image's own flip, and the pasted box, which
    hides a part of the image and shows what its partner has there. What the view shows of an image beyond the cells
    (the clean view is its centre, and a border is left out) counts for the nearest cell, as if the cells at the edge
    went on. So the shares of both images together sum to 1, and the partner's to the share that is pasted over.

    Args:
        plan: of the batch.
        height_B: of its images, pixels.
        width_B: pixels.
        grid: over the clean view.

    Returns:
        float32 (B, M) each, cells in reading order.
    """
    (h, w), box = grid.cells, plan.box.astype(np.float64) / plan.size
    down, across = _Axis.of(plan, 0, height_B, width_B, grid), _Axis.of(plan, 1, height_B, width_B, grid)
    none, whole, other = np.zeros(len(box)), np.ones(len(box)), plan.partner
    top, left, bottom, right = box[:, 0], box[:, 1], box[:, 0] + box[:, 2], box[:, 1] + box[:, 3]
    in_view = _areas(down.shares(none, whole, h), across.shares(none, whole, w))
    hidden = _areas(down.shares(top, bottom, h), across.shares(left, right, w))
    pasted = _areas(down.at(other).shares(top, bottom, h), across.at(other).shares(left, right, w))
    return _without_rounding(in_view - hidden), _without_rounding(pasted)


class _Axis(NamedTuple):
    """Along one axis, where the view's edges lie, counted in cells from the first that is not border.

    Attributes:
        start_B: the cell at the view's first edge.
        extent_B: how many cells it covers; negative where it is mirrored.
    """

    start_B: NDArray[np.float64]
    extent_B: NDArray[np.float64]

    @classmethod
    def of(cls, plan: Plan, axis: int, height_B: NDArray[Any], width_B: NDArray[Any], grid: CleanGrid) -> "_Axis":
        side_B = (height_B, width_B)[axis].astype(np.float64)
        clean_B = side_B if grid.resize is None else np.minimum(height_B, width_B) * (grid.size / grid.resize)
        of_cells_B = (grid.cells[axis] + 2 * grid.border) / clean_B
        start_B = (plan.window[:, axis] - (side_B - clean_B) / 2) * of_cells_B - grid.border
        extent_B = plan.window[:, 2 + axis] * of_cells_B
        mirrored_B = plan.mirror.astype(np.bool_) & (axis == 1)
        return cls(np.where(mirrored_B, start_B + extent_B, start_B), np.where(mirrored_B, -extent_B, extent_B))

    def at(self, places_B: NDArray[np.int32]) -> "_Axis":
        """Of other images of the batch."""
        return _Axis(self.start_B[places_B], self.extent_B[places_B])

    def shares(self, begin_B: NDArray[np.float64], end_B: NDArray[np.float64], cells: int) -> NDArray[np.float64]:
        """How much of the view each cell takes (B, cells), between two places on the view's side of length 1."""
        edges_B2 = np.stack([self.start_B + self.extent_B * begin_B, self.start_B + self.extent_B * end_B], axis=1)
        edges_B2.sort(axis=1)
        bounds = np.arange(cells + 1, dtype=np.float64)
        bounds[0], bounds[-1] = -np.inf, np.inf  # the outermost cells go on
        covered: NDArray[np.float64] = np.diff(bounds.clip(edges_B2[:, :1], edges_B2[:, 1:]), axis=1)
        return covered / np.abs(self.extent_B)[:, None]


def _areas(down_Bh: NDArray[np.float64], across_Bw: NDArray[np.float64]) -> NDArray[np.float64]:
    return (down_Bh[:, :, None] * across_Bw[:, None, :]).reshape(len(down_Bh), -1)


def _without_rounding(area_BM: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.where(area_BM < _NOTHING, 0, area_BM).astype(np.float32)
