"""What the graphs give: the clean view's geometry, and a batch of the train view. Loads no DALI.

Legend: B batch, C channels, H W pixels of the network input.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.config import Triple, ViewConfig
from bowstore.data.plan import Plan

Stage = Literal["decode", "resize", "flip", "jitter", "cutmix", "normalise"]


def stages(device: torch.device) -> tuple[Stage, ...]:
    """What is done to an image, in this order; on a CPU all after the resize is one pass, and each adds to it."""
    if device.type == "cuda":
        return ("decode", "resize", "flip", "jitter", "cutmix", "normalise")
    return ("decode", "resize", "normalise", "flip", "jitter", "cutmix")


@dataclass(frozen=True)
class CleanView:
    """The un-augmented image as the network sees it.

    Attributes:
        size: side of the square output, pixels.
        resize: short side before cropping, pixels; None resizes the whole image to size x size.
        squash: True squashes the resized image to size x size instead of cropping its centre (VOC07 protocol).
        mean: RGB mean on the scale 0 to 1.
        std: RGB deviation on the scale 0 to 1.
        antialias: False interpolates linearly between four pixels, however much smaller the image gets, as OpenCV does.
    """

    size: int
    resize: int | None
    squash: bool
    mean: Triple
    std: Triple
    antialias: bool = True

    def recorded(self) -> dict[str, Any]:
        """The fields as files hold them: `antialias` where it is off alone, as all files from before it are with it."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("antialias", True)}


def clean_view(view: ViewConfig, *, squash: bool = False) -> CleanView:
    """The clean view that goes with a training view."""
    return CleanView(size=view.size, resize=view.resize, squash=squash, mean=view.mean, std=view.std)


def normalisation(view: ViewConfig | CleanView) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and factor of 8-bit values, float32 (3,) each: the network's input is (value - mean) * factor.

    These operations on these numbers are DALI's too, to the bit.
    """
    mean, std = (np.array([255 * value for value in values], np.float32) for values in (view.mean, view.std))
    return mean, np.float32(1) / std


def jitters(view: ViewConfig) -> bool:
    """Whether a view changes colours."""
    return any((view.brightness, view.contrast, view.saturation, view.hue, view.grey))


@dataclass(frozen=True)
class Batch:
    """One training batch of this rank.

    Attributes:
        images_BCHW: normalised; channels_last in memory; float32 on CPU, float16 on a GPU.
        plan: the rows and numbers behind it.
        ahead: what `ahead(plan)` gave in the reading thread.
    """

    images_BCHW: Tensor
    plan: Plan
    ahead: Any = None
