"""Colour jitter and grey as one 3 x 3 matrix and offset an image, applied in one pass over its pixels.

Brightness, contrast around mid-grey, saturation, hue and grey are all linear in RGB, so their product is computed
once an image and not once a pixel. The definition is that of DALI's `color_twist`, which does the same on a GPU;
on a CPU its per-pixel loop takes a third of the whole train view, the vectorised loop here a few percent.

Legend: B images of a batch.
"""

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, types

from bowstore.data.plan import Plan

_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]]
)  # NTSC: luma, in-phase, quadrature
_RGB = np.linalg.inv(_YIQ)
_MID_GREY = 128.0


def colour_matrices(plan: Plan) -> NDArray[np.float32]:
    """Each image's transform [M | o] of 8-bit RGB: float32 (B, 3, 4), result = M rgb + o, then clipped to 0 ... 255.

    Saturation scales and hue turns the chroma plane of YIQ; contrast acts around 128, before brightness.
    """
    count = len(plan.rows)
    angle = plan.hue.astype(np.float64) * (math.pi / 180)
    chroma = np.zeros((count, 3, 3))
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1] = chroma[:, 2, 2] = plan.saturation * np.cos(angle)
    chroma[:, 1, 2] = plan.saturation * np.sin(angle)
    chroma[:, 2, 1] = -chroma[:, 1, 2]
    factor = (plan.brightness * plan.contrast).astype(np.float64)
    offset = (plan.brightness * (1 - plan.contrast)).astype(np.float64) * _MID_GREY
    result = np.empty((count, 3, 4), np.float32)
    result[:, :, :3] = factor[:, None, None] * (_RGB @ chroma @ _YIQ)
    result[:, :, 3] = offset[:, None]
    return result


def jitter(images: Any, matrices: Any) -> Any:
    """Add the transform to a CPU graph: images HWC uint8 and their matrices (3, 4) to images HWC uint8."""
    return fn.reshape(_operator()(images, matrices), layout="HWC")


@cache
def _operator() -> Any:
    """The operator, one for all graphs of a process: each one made anew would be compiled anew, for a second."""
    from numba import njit
    from nvidia.dali.plugin.numba import NumbaFunction

    compiled = njit(fastmath=True)(apply_matrix)

    def run(out: Any, image: Any, matrix: Any) -> None:
        compiled(out, image, matrix)

    return NumbaFunction(
        run_fn=run,
        setup_fn=_set_up,
        in_types=[types.UINT8, types.FLOAT],
        out_types=[types.UINT8],
        ins_ndim=[3, 2],
        outs_ndim=[3],
    )


def _set_up(outs: Any, ins: Any) -> None:  # compiled by DALI's plugin: the output has the input's shape
    for sample in range(len(outs[0])):
        for axis in range(3):
            outs[0][sample][axis] = ins[0][sample][axis]


def apply_matrix(out: Any, image: Any, matrix: Any) -> None:
    """Write M rgb + o, rounded and clipped, of every pixel: `image` and `out` uint8 (H, W, 3), `matrix` float32 (3, 4).

    One flat loop over contiguous bytes, with every coefficient in a register, is what the compiler vectorises.
    """
    source, target = image.reshape(image.size), out.reshape(out.size)
    half, low, high = np.float32(0.5), np.float32(0), np.float32(255)
    rr, rg, rb, ro = matrix[0, 0], matrix[0, 1], matrix[0, 2], matrix[0, 3] + half
    gr, gg, gb, go = matrix[1, 0], matrix[1, 1], matrix[1, 2], matrix[1, 3] + half
    br, bg, bb, bo = matrix[2, 0], matrix[2, 1], matrix[2, 2], matrix[2, 3] + half
    for pixel in range(image.size // 3):
        place = 3 * pixel
        red, green, blue = np.float32(source[place]), np.float32(source[place + 1]), np.float32(source[place + 2])
        target[place] = np.uint8(np.int32(min(max(rr * red + rg * green + rb * blue + ro, low), high)))
        target[place + 1] = np.uint8(np.int32(min(max(gr * red + gg * green + gb * blue + go, low), high)))
        target[place + 2] = np.uint8(np.int32(min(max(br * red + bg * green + bb * blue + bo, low), high)))
