"""CutMix in a DALI graph: a box of the partner over each image, what a plan says of it and the operator.

Both are pasted as they are: cropped, flipped and coloured, each by its own numbers (paper, section 2.3).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn

from bowstore.data.plan import Plan


def paste_inputs(plan: Plan, size: int) -> dict[str, NDArray[np.int32]]:
    """The numbers that `paste` takes: in_ids (B, 2), anchors and shapes (B, 2, 2), first of the image, then of the box.

    Args:
        plan: partners and boxes.
        size: side of the square images, pixels.
    """
    place = np.arange(len(plan.rows), dtype=np.int32)
    empty = plan.box[:, 2] * plan.box[:, 3] == 0  # an empty box is refused: paste the image over itself
    whole = np.broadcast_to(np.array([0, 0, size, size], np.int32), plan.box.shape)
    box = np.where(empty[:, None], whole, plan.box)
    return {
        "in_ids": np.stack([place, np.where(empty, place, plan.partner)], axis=1).astype(np.int32),
        "anchors": np.stack([whole[:, :2], box[:, :2]], axis=1),
        "shapes": np.stack([whole[:, 2:], box[:, 2:]], axis=1),
    }


def paste(images: Any, inputs: Mapping[str, Any], size: int) -> Any:
    """Add the paste to a graph: the whole image, then what its partner has in the box over it."""
    return fn.multi_paste(
        images,
        in_ids=inputs["in_ids"],
        in_anchors=inputs["anchors"],
        out_anchors=inputs["anchors"],
        shapes=inputs["shapes"],
        output_size=[size, size],
    )
