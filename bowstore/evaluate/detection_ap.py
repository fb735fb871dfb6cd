"""Average precision of detections by VOC2007's rules, as Detectron2 measures it.

Own code: no library that is kept has these rules (eleven points, difficult objects ignored, boxes of whole pixels, of
which the last belongs to the box). It follows Detectron2's `PascalVOCDetectionEvaluator`, which goes back to Ross
Girshick's voc_eval.

Legend: N images, D detections, M objects, K classes, T thresholds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bowstore.evaluate.voc_boxes import Objects

THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))  # of the overlap, which must be larger
_POINTS = np.arange(0.0, 1.1, 0.1)  # as everybody has them: 0.3 is a little more than 3 of 10 objects
Floats = NDArray[np.float64]


class Detections(NamedTuple):
    """Detections of all test images, in any order.

    Attributes:
        images: int64 (D,), rows.
        boxes: float (D, 4), left, top, right and bottom edge, pixels, as in `Objects`.
        labels: int64 (D,), places among the classes.
        scores: float (D,).
    """

    images: NDArray[np.int64]
    boxes: NDArray[np.floating]
    labels: NDArray[np.int64]
    scores: NDArray[np.floating]


def average_precisions(
    found: Detections, truth: Sequence[Objects], num_classes: int, thresholds: Sequence[float] = THRESHOLDS
) -> Floats:
    """Average precision of each class at each threshold of the overlap, (K, T).

    Of each class, detections are looked at by falling score (of equals, in the order of images, then as given). One
    belongs to the object of its image that it overlaps most. If it overlaps that by more than the threshold, it is
    right, unless an earlier one was: then it is wrong; but where the object is difficult, it counts as nothing. All
    others are wrong.

    Args:
        found: the detections.
        truth: objects of each image.
        num_classes: K.
        thresholds: shares of the union.

    Raises:
        ValueError: a class without an object that is not difficult.
    """
    return np.array([_of_class(found, truth, k, thresholds) for k in range(num_classes)])


def _of_class(found: Detections, truth: Sequence[Objects], k: int, thresholds: Sequence[float]) -> list[float]:
    mine = np.flatnonzero(found.labels == k)
    mine = mine[np.argsort(found.images[mine], kind="stable")]
    boxes = [objects.boxes[objects.labels == k] for objects in truth]
    difficult_M = np.concatenate([objects.difficult[objects.labels == k] for objects in truth])
    first_N = np.cumsum([0, *map(len, boxes)])  # place of an image's first object among all of the class
    overlap_D, object_D = np.zeros(len(mine)), np.zeros(len(mine), np.int64)
    image_D = found.images[mine]
    for image in np.unique(image_D).tolist():
        if len(boxes[image]):
            here = slice(*np.searchsorted(image_D, (image, image + 1)))
            overlap_DM = overlaps(found.boxes[mine[here]], boxes[image])
            overlap_D[here], object_D[here] = overlap_DM.max(axis=1), first_N[image] + overlap_DM.argmax(axis=1)
    order = np.argsort(-found.scores[mine], kind="stable")
    overlap_D, object_D = overlap_D[order], object_D[order]
    positives = int((~difficult_M).sum())
    if not positives:
        raise ValueError(f"class {k} has no object that is not difficult")
    return [eleven_points(*_curve(overlap_D > threshold, object_D, difficult_M, positives)) for threshold in thresholds]


def _curve(
    hit_D: NDArray[np.bool_], object_D: NDArray[np.int64], difficult_M: NDArray[np.bool_], positives: int
) -> tuple[Floats, Floats]:
    """Recall and precision after each detection; `hit_D`: whether it belongs to its object."""
    hits = np.flatnonzero(hit_D)
    _, first = np.unique(object_D[hits], return_index=True)
    right_D = np.zeros(len(hit_D), np.bool_)
    right_D[hits[first]] = True
    ignored_D = np.zeros_like(right_D)
    ignored_D[hits] = difficult_M[object_D[hits]]
    right_D &= ~ignored_D
    right, wrong = np.cumsum(right_D), np.cumsum(~right_D & ~ignored_D)
    return right / positives, right / np.maximum(right + wrong, np.finfo(np.float64).eps)


def overlaps(boxes_D4: NDArray[np.floating], other_M4: NDArray[np.floating]) -> Floats:
    """Intersection over union of boxes of pixels that are counted from 1, the last one included, (D, M)."""
    first, last = boxes_D4[:, None].astype(np.float64), other_M4[None].astype(np.float64)
    # Pixels from left + 1 to right: a box is right - left wide, since it was moved by one at its first edge alone.
    sides = np.minimum(first[..., 2:], last[..., 2:]) - np.maximum(first[..., :2], last[..., :2])
    inside = np.prod(np.maximum(sides, 0), axis=-1)
    area = [np.prod(each[..., 2:] - each[..., :2], axis=-1) for each in (first, last)]
    shares: Floats = inside / (area[0] + area[1] - inside)
    return shares


def eleven_points(recall_D: Floats, precision_D: Floats) -> float:
    """VOC2007's average precision: the mean, over recalls 0, 0.1 to 1, of the best precision at that recall or more."""
    best = [precision_D[recall_D >= point].max(initial=0.0) for point in _POINTS]
    return float(np.mean(best))
