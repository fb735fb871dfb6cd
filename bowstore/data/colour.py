"""Colour jitter and grey as one 3 x 3 matrix and offset an image.

Brightness, contrast around mid-grey, saturation, hue and grey are all linear in RGB, so their product is computed
once an image and not once a pixel. The definition is that of DALI's `color_twist`, which does the same on a GPU.

Legend: B images of a batch.
"""

import math

import numpy as np
from numpy.typing import NDArray

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
