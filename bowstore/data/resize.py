"""Resizing on a CPU: antialiased by torch's kernel for 8-bit images, as torchvision calls it, or as OpenCV does it.

Legend: H W pixels of an image, S side of the view; images are HWC.
"""

from collections.abc import Callable, Sequence
from math import ceil, inf, nextafter
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bowstore.data.views import CleanView

_FAR = 8  # views between the border and the centre at most


def resized_by(device: torch.device) -> str:
    """The library that resizes images for a device. The two differ by a grey level in a sixth of the values."""
    return "DALI" if device.type == "cuda" else "torch"


def as_slot(pixels_HW3: NDArray[np.uint8]) -> Tensor:
    """The memory of C-contiguous pixels as the kernel takes it: uint8 (1, 3, H, W), channels_last."""
    return torch.from_numpy(pixels_HW3).permute(2, 0, 1).unsqueeze(0)


def resize_into(
    image_HW3: Tensor, slot_13HW: Tensor, scale: tuple[float | None, float | None] = (None, None)
) -> Tensor:
    """Resize uint8 pixels into memory that is there, bit-equal to torchvision's `resize(..., antialias=True)`.

    Args:
        image_HW3: uint8.
        slot_13HW: of `as_slot`.
        scale: output over input pixels of height and width; None where the whole edge fills the output.

    Returns:
        The slot.
    """
    # What torch.nn.functional.interpolate calls, which cannot be given an output: fresh memory for each image costs
    # half as much again in page faults. (The same as torch.ops.aten costs a third more of a small image.)
    kernel: Any = torch._C._nn._upsample_bilinear2d_aa  # its stub lacks this overload
    kernel(image_HW3.permute(2, 0, 1).unsqueeze(0), slot_13HW.shape[2:], False, *scale, out=slot_13HW)
    return slot_13HW


def without_antialias(image_HW3: Tensor, view: CleanView) -> Tensor:
    """The clean view (S, S, 3) of pixels by linear interpolation between four of them: float32, 0 to 255, unrounded.

    What OpenCV's INTER_LINEAR gives of float32 images (half-pixel centres, the border repeated), to a hundredth of a
    grey level: its weights are float32, as these are.
    """
    whole = [] if view.resize is None else [target(image_HW3.shape, view.resize)]
    last = [(view.size, view.size)] if view.squash or view.resize is None else []
    image_13HW = image_HW3.permute(2, 0, 1).unsqueeze(0).float()
    for shape in (*whole, *last):
        image_13HW = functional.interpolate(image_13HW, shape, mode="bilinear", align_corners=False, antialias=False)
    top, left = (round((edge - view.size) / 2) for edge in image_13HW.shape[2:])
    return image_13HW[0, :, top : top + view.size, left : left + view.size].permute(1, 2, 0)


def target(shape: Sequence[int], resize: int) -> tuple[int, int]:
    """Height and width once the short side is `resize`; the long one is truncated, as in torchvision."""
    height, width = shape[0], shape[1]
    short = min(height, width)
    return height * resize // short, width * resize // short


def centre(image_HW3: Tensor, resize: int, size: int, scratch: Callable[..., NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The centre (S, S, 3) of the image whose short side is resized: torchvision's Resize and CenterCrop.

    Args:
        image_HW3: uint8, C-contiguous.
        resize: short side, pixels.
        size: S, at most `resize`.
        scratch: gives memory of a shape, of which the result is a part.
    """
    whole = target(image_HW3.shape, resize)
    rows, columns = (_Part.of(image_HW3.shape[axis], whole[axis], size) for axis in (0, 1))
    out = scratch(rows.out, columns.out, 3)
    # Columns are cut only of a strip: the kernel copies what is not contiguous.
    part = image_HW3[rows.low : rows.high, columns.low : columns.high if columns.low else None]
    resize_into(part, as_slot(out), (rows.scale, columns.scale))
    return out[rows.start : rows.start + size, columns.start : columns.start + size]


class _Part(NamedTuple):
    """Along one axis, what is resized for the centre's sake: nothing behind it, and little before it.

    Attributes:
        low: first pixel of the image that is used.
        high: the one after the last.
        out: how many pixels are made of them.
        start: where the centre begins in these.
        scale: output over input pixels; None where the whole edge is resized.
    """

    low: int
    high: int
    out: int
    start: int
    scale: float | None

    @classmethod
    def of(cls, edge: int, whole: int, size: int) -> Self:
        """For the centre of `size` pixels of `whole` that `edge` pixels of the image become."""
        start, step = round((whole - size) / 2), edge / whole  # half a pixel goes to the even neighbour, as there
        if start > _FAR * size:
            return cls._of_strip(edge, whole, start, size)
        # The kernel takes the inverse of what it is given; another last bit of that may round a weight otherwise.
        scale = next((scale for scale in _neighbours(whole / edge) if 1 / scale == step), None)
        stop = start + size
        high = min(edge, ceil(stop * step + max(1, step)) + 1)
        if scale is None or stop in (high, edge):  # equal sizes would be taken for a copy
            return cls(0, edge, whole, start, None)
        return cls(0, high, stop, start, scale)

    @classmethod
    def _of_strip(cls, edge: int, whole: int, start: int, size: int) -> Self:
        """What is far before the centre is left out, too: an image one pixel high would be a million pixels wide.

        The kernel counts from a border of source pixels, and that of an output pixel may lie half a source pixel off. A
        step that is a little wider or narrower puts the middle of the centre where it belongs; its edges are off by
        1 / 32 pixel at most.
        """
        skipped, step = start - _FAR * size, edge / whole
        low = round(skipped * step)
        step += (skipped * step - low) / (start - skipped + size / 2)
        stop = start - skipped + size
        high = min(edge, low + ceil(stop * step + max(1, step)) + 1)
        out = next(out for out in (stop, stop + 1, stop + 2) if out not in (high - low, edge - low))
        return cls(low, high, out, start - skipped, 1 / step)


def _neighbours(value: float) -> tuple[float, float, float]:
    return value, nextafter(value, 0), nextafter(value, inf)
