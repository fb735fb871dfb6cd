"""Flip, colour, CutMix and normalisation of resized images in one pass on a CPU.

An output pixel is made once, of the image or of its partner: cropped, flipped and coloured by that image's own
numbers, as in the GPU's graph (`bowstore.data.cutmix`), and rounded to 8 bits in between as there.

Legend: B batch, G images of a group, S side of the view.
"""

from functools import cache
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from bowstore.config import ViewConfig
from bowstore.data.colour import colour_matrices
from bowstore.data.plan import MIX_GROUP, Plan
from bowstore.data.views import jitters, normalisation


class Mixing(NamedTuple):
    """The numbers of a batch, as the pass takes them.

    Attributes:
        mirror: bool (B,), which images are flipped.
        coloured: whether any image's colours change.
        colour: float32 (B, 3, 4), matrix and offset of each image (`colour_matrices`).
        partner: int32 (B,), place in the batch of the image that is pasted, in the same group of four.
        box: int32 (B, 4), what it is pasted over: top, left, height, width.
        mean: float32 (3,), of 255.
        scale: float32 (3,), one over the deviation of 255.
    """

    mirror: NDArray[np.bool_]
    coloured: bool
    colour: NDArray[np.float32]
    partner: NDArray[np.int32]
    box: NDArray[np.int32]
    mean: NDArray[np.float32]
    scale: NDArray[np.float32]

    @classmethod
    def of(cls, plan: Plan, view: ViewConfig) -> Self:
        """What a view takes of a plan.

        Raises:
            ValueError: a partner of another group, or a box beyond the view; the pass checks no bounds.
        """
        count = len(plan.rows)
        place = np.arange(count, dtype=np.int32)
        if (plan.partner // MIX_GROUP != place // MIX_GROUP).any() or (plan.partner >= count).any():
            raise ValueError(f"CutMix partners {plan.partner} are not in their groups of {MIX_GROUP}")
        if (plan.box < 0).any() or (plan.box[:, :2] + plan.box[:, 2:] > view.size).any():
            raise ValueError(f"CutMix boxes {plan.box} do not lie in a view of {view.size} pixels")
        coloured = jitters(view)
        mean, scale = normalisation(view)
        return cls(
            mirror=plan.mirror.astype(bool) & view.flip,
            coloured=coloured,
            colour=colour_matrices(plan) if coloured else np.zeros((count, 3, 4), np.float32),
            partner=np.ascontiguousarray(plan.partner, np.int32),
            box=np.ascontiguousarray(plan.box, np.int32),
            mean=mean,
            scale=scale,
        )


def mix(out: NDArray[np.float32], resized: NDArray[np.uint8], first: int, mixing: Mixing) -> None:
    """Write the finished images of one group; lets go of the interpreter's lock.

    Args:
        out: float32 (B, S, 3 S), C-contiguous: the whole batch.
        resized: uint8 (G, S, 3 S), C-contiguous: the images of the group as they were resized.
        first: place in the batch of the group's first image.
        mixing: the numbers of the batch.
    """
    _compiled()(out, resized, first, *mixing)


@cache
def _compiled() -> Any:
    """The pass, compiled once a process: in two seconds, by the first batch.

    No fast maths: each value is rounded as written, whether its loop is vectorised or not, so that a pixel does not
    depend on where a box begins, nor on the processor.
    """
    from numba import njit  # a second, where nothing may ever be mixed

    piece = njit(nogil=True)(_piece)

    def run(
        out: Any,
        resized: Any,
        first: Any,
        mirror: Any,
        coloured: Any,
        colour: Any,
        partner: Any,
        box: Any,
        mean: Any,
        scale: Any,
    ) -> None:
        size = out.shape[1]
        red, green, blue = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
        for own in range(resized.shape[0]):
            place = first + own
            top, bottom = box[place, 0], box[place, 0] + box[place, 2]
            for y in range(size):
                # Three pieces of a row: the image, its partner in the box, the image; each may be empty.
                inside = top <= y < bottom
                left = box[place, 1] if inside else size
                right = left + box[place, 3] if inside else size
                for part in range(3):
                    shown = partner[place] if part == 1 else place
                    begin = 0 if part == 0 else left if part == 1 else right
                    end = left if part == 0 else right if part == 1 else size
                    if begin < end:
                        piece(
                            out[place, y],
                            resized[shown - first, y],
                            begin,
                            end,
                            mirror[shown],
                            coloured,
                            colour[shown],
                            mean,
                            scale,
                            red,
                            green,
                            blue,
                        )

    return njit(nogil=True)(run)


def _piece(
    out: Any,
    source: Any,
    begin: Any,
    end: Any,
    mirror: Any,
    coloured: Any,
    colour: Any,
    mean: Any,
    scale: Any,
    red: Any,
    green: Any,
    blue: Any,
) -> None:
    """Write the pixels `begin` to `end` of a row: `out` float32 (3 S,), `source` uint8 (3 S,), the rest scratch.

    What the compiler vectorises: one loop that takes channels apart, one over planes, one that puts them together, each
    over contiguous memory that is sliced to begin at index 0, with every coefficient in a register, and backwards only
    by an unsigned index (a signed one may count from the end, for all that the compiler knows).
    """
    count = end - begin
    first = out.size // 3 - end if mirror else begin
    pixels = source[3 * first : 3 * (first + count)]
    for x in range(count):
        red[x] = pixels[3 * x]
        green[x] = pixels[3 * x + 1]
        blue[x] = pixels[3 * x + 2]
    if coloured:
        half, low, high = np.float32(0.5), np.int32(0), np.int32(255)
        rr, rg, rb, ro = colour[0, 0], colour[0, 1], colour[0, 2], colour[0, 3] + half
        gr, gg, gb, go = colour[1, 0], colour[1, 1], colour[1, 2], colour[1, 3] + half
        br, bg, bb, bo = colour[2, 0], colour[2, 1], colour[2, 2], colour[2, 3] + half
        for x in range(count):
            r, g, b = red[x], green[x], blue[x]
            red[x] = np.float32(min(max(np.int32(rr * r + rg * g + rb * b + ro), low), high))
            green[x] = np.float32(min(max(np.int32(gr * r + gg * g + gb * b + go), low), high))
            blue[x] = np.float32(min(max(np.int32(br * r + bg * g + bb * b + bo), low), high))
    mean_r, mean_g, mean_b = mean[0], mean[1], mean[2]
    scale_r, scale_g, scale_b = scale[0], scale[1], scale[2]
    result = out[3 * begin : 3 * end]
    if mirror:
        for x in range(count):
            back = np.uintp(count - 1) - np.uintp(x)
            result[3 * x] = (red[back] - mean_r) * scale_r
            result[3 * x + 1] = (green[back] - mean_g) * scale_g
            result[3 * x + 2] = (blue[back] - mean_b) * scale_b
    else:
        for x in range(count):
            result[3 * x] = (red[x] - mean_r) * scale_r
            result[3 * x + 1] = (green[x] - mean_g) * scale_g
            result[3 * x + 2] = (blue[x] - mean_b) * scale_b
