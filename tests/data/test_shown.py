"""What a view shows of each cell, against counted pixels."""

from typing import Any

import numpy as np
import pytest

from bowstore.data.plan import Origin, Plan
from bowstore.data.shown import CleanGrid, shown

SIZE = 16
FINE = (
    12  # parts of a pixel of the view: with the sides of window below, every edge of a cell is a whole number of them
)


def made_plan(height: int, width: int, *, seed: int = 0, mixed: bool = True, images: int = 24) -> Plan:
    """Windows of 16 to 64 pixels anywhere in the images, boxes anywhere in the view, flips and partners."""
    draw = np.random.default_rng(seed)
    sides = 16 * draw.integers(1, 5, (images, 2))
    low = np.stack([draw.integers(0, edge - sides[:, axis] + 1) for axis, edge in enumerate((height, width))], axis=1)
    edges = np.sort(draw.integers(0, SIZE + 1, (images, 2, 2)), axis=2)
    box = np.concatenate([edges[..., 0], edges[..., 1] - edges[..., 0]], axis=1)
    box[:2] = [[0, 0, SIZE, SIZE], [5, 5, 0, 0]]  # all is pasted over; nothing is
    one = np.ones(images, np.float32)
    return Plan(
        rows=np.arange(images),
        window=np.concatenate([low, sides], axis=1).astype(np.int32),
        mirror=draw.integers(0, 2, images).astype(np.int32),
        brightness=one, contrast=one, saturation=one, hue=one,
        partner=draw.permutation(images).astype(np.int32),
        box=(box if mixed else 0 * box).astype(np.int32),
        kept=one,
        mixed=mixed,
        size=SIZE,
        origin=Origin(0, 0, 0),
    )  # fmt: skip


def counted(plan: Plan, image: int, sides: tuple[int, int], grid: CleanGrid) -> tuple[np.ndarray, np.ndarray]:
    """Shares (h, w) of the view that show each cell of the image and of its partner, by counting parts of pixels."""
    top, left, high, wide = plan.box[image]
    place_D2 = (np.stack(np.mgrid[: SIZE * FINE, : SIZE * FINE], axis=-1).reshape(-1, 2) + 0.5) / FINE
    y_D, x_D = place_D2.T
    inside_D = (top <= y_D) & (y_D < top + high) & (left <= x_D) & (x_D < left + wide)
    clean = np.array(sides) if grid.resize is None else np.full(2, min(sides) * grid.size / grid.resize)
    shares = []
    for who, seen_D in ((image, ~inside_D), (int(plan.partner[image]), inside_D)):
        share_D2 = place_D2[seen_D] / SIZE
        if plan.mirror[who]:
            share_D2[:, 1] = 1 - share_D2[:, 1]
        pixel_D2 = plan.window[who, :2] + share_D2 * plan.window[who, 2:]  # of the image
        cell_D2 = np.floor(
            (pixel_D2 - (np.array(sides) - clean) / 2) / clean * (np.array(grid.cells) + 2 * grid.border)
        )
        row_D, column_D = (cell_D2.astype(int) - grid.border).clip(0, np.array(grid.cells) - 1).T  # or the nearest
        share = np.zeros(grid.cells)
        np.add.at(share, (row_D, column_D), 1 / len(place_D2))
        shares.append(share)
    return shares[0], shares[1]


@pytest.mark.parametrize(("sides", "grid"), [
    ((64, 64), CleanGrid((4, 4), 0, 32, None)),  # the clean view is the whole image
    ((80, 96), CleanGrid((2, 2), 1, 64, 80)),  # its centre, with a border: windows outside of both
    ((64, 64), CleanGrid((1, 2), 0, 16, None)),
])  # fmt: skip
def test_shares_are_those_of_counted_pixels(sides: tuple[int, int], grid: CleanGrid) -> None:
    """Flips, each image's own; partial cells; the pasted box; and what lies beyond the clean view."""
    plan = made_plan(*sides)
    height, width = (np.full(len(plan.rows), side, np.int32) for side in sides)
    own_BM, pasted_BM = shown(plan, height, width, grid)
    assert own_BM.dtype == pasted_BM.dtype == np.float32
    for image in range(len(plan.rows)):
        own, pasted = counted(plan, image, sides, grid)
        np.testing.assert_allclose(own_BM[image], own.reshape(-1), atol=1e-6)
        np.testing.assert_allclose(pasted_BM[image], pasted.reshape(-1), atol=1e-6)
    box_area = plan.box[:, 2].astype(float) * plan.box[:, 3] / SIZE**2
    np.testing.assert_allclose(pasted_BM.sum(1), box_area, atol=1e-6)
    np.testing.assert_allclose(own_BM.sum(1), 1 - box_area, atol=1e-6)
    assert not own_BM[0].any()
    assert not pasted_BM[1].any()


def test_the_whole_image_shows_all_cells_alike() -> None:
    plan = made_plan(64, 64, mixed=False)
    plan.window[:] = [0, 0, 64, 64]
    own_BM, pasted_BM = shown(plan, *np.full((2, len(plan.rows)), 64, np.int32), CleanGrid((7, 3), 0, 224, None))
    np.testing.assert_allclose(own_BM, 1 / 21, rtol=1e-6)
    assert not pasted_BM.any()


def test_cells_that_are_not_seen_have_no_share_at_all() -> None:
    """A third of a cell is no whole number of bits: what rounding leaves of it is no word that is seen."""
    cells: Any = []
    for seed in range(20):
        plan = made_plan(64, 64, seed=seed)
        own_BM, pasted_BM = shown(plan, *np.full((2, len(plan.rows)), 64, np.int32), CleanGrid((7, 7), 0, 224, None))
        cells += [own_BM[own_BM != 0], pasted_BM[pasted_BM != 0]]
    assert np.concatenate(cells).min() > 1e-6
