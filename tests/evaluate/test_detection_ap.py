"""Average precision of detections by VOC2007's rules, beside curves by hand and a loop over everything."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from bowstore.evaluate.detection_ap import THRESHOLDS, Detections, average_precisions, eleven_points, overlaps
from bowstore.evaluate.svm import average_precision
from bowstore.evaluate.voc_boxes import Objects

Box = tuple[float, float, float, float]
HERE, THERE, NOWHERE = (0, 0, 10, 10), (20, 20, 30, 30), (50, 50, 60, 60)


def truth(boxes: list[Box], difficult: list[bool] | None = None, labels: list[int] | None = None) -> Objects:
    return Objects(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels or [0] * len(boxes), np.int64),
        np.array(difficult or [False] * len(boxes), np.bool_),
    )


def found(*each: tuple[int, Box, float], labels: list[int] | None = None) -> Detections:
    images, boxes, scores = zip(*each, strict=True)
    return Detections(
        np.array(images), np.array(boxes, np.float64), np.array(labels or [0] * len(each)), np.array(scores)
    )


def at_half(detections: Detections, objects: list[Objects]) -> float:
    return float(average_precisions(detections, objects, 1, [0.5])[0, 0])


def test_three_definitions_give_three_numbers() -> None:
    """Right, wrong, wrong, right, right, right of four objects: precision 1, 1/2, 1/3, 2/4, 3/5, 4/6."""
    objects = [truth([HERE])] * 4
    right = iter(range(4))
    order = [HERE, NOWHERE, NOWHERE, HERE, HERE, HERE]
    detections = found(*[(next(right) if box == HERE else 0, box, 0.9 - n / 10) for n, box in enumerate(order)])
    assert at_half(detections, objects) == pytest.approx((3 * 1 + 8 * 2 / 3) / 11)  # recalls 0, .1, .2; then .3 to 1
    label, score = np.array([1, 0, 0, 1, 1, 1]), detections.scores
    assert average_precision(score, label) == pytest.approx(0.25 * 1 + 0.75 * 2 / 3)  # below the envelope
    assert average_precision_score(label, score) == pytest.approx(0.25 * (1 + 1 / 2 + 3 / 5 + 4 / 6))  # in steps


def test_eleven_points_are_those_of_everybody() -> None:
    """Three of ten objects do not reach the fourth point, which is 0.30000000000000004 in everybody's code."""
    assert eleven_points(np.array([0.1, 0.2, 0.3]), np.ones(3)) == pytest.approx(3 / 11)
    assert eleven_points(np.array([0.1, 0.2, 0.31]), np.ones(3)) == pytest.approx(4 / 11)
    assert eleven_points(np.array([]), np.array([])) == 0


def test_boxes_are_of_pixels_and_the_last_one_counts() -> None:
    """VOC's 1 1 10 10 (0 to 10 here) are 100 pixels; 1 1 5 10 are half of them, and not more than half."""
    np.testing.assert_allclose(
        overlaps(np.array([[0, 0, 5, 10.0]]), np.array([[0, 0, 10, 10], [5, 0, 10, 10]])), [[0.5, 0]]
    )
    assert at_half(found((0, (0, 0, 5, 10), 1.0)), [truth([HERE])]) == 0
    assert at_half(found((0, (0, 0, 5.1, 10), 1.0)), [truth([HERE])]) == 1


def test_a_second_detection_of_an_object_is_wrong() -> None:
    objects = [truth([HERE, THERE])]
    twice = found((0, HERE, 0.9), (0, HERE, 0.8), (0, THERE, 0.7))
    assert at_half(twice, objects) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert at_half(found((0, HERE, 0.9), (0, THERE, 0.7)), objects) == 1


def test_difficult_objects_count_as_nothing() -> None:
    """Neither found nor missed, however often; but an object that is not difficult beside it counts."""
    objects = [truth([HERE, THERE], [True, False])]
    assert at_half(found((0, HERE, 0.9), (0, HERE, 0.8), (0, THERE, 0.7)), objects) == 1
    assert at_half(found((0, THERE, 0.7)), objects) == 1
    assert at_half(found((0, HERE, 0.9)), objects) == 0
    with pytest.raises(ValueError, match="class 0 has no object that is not difficult"):
        at_half(found((0, HERE, 0.9)), [truth([HERE], [True])])


def test_other_images_and_classes_do_not_match() -> None:
    objects = [truth([HERE], labels=[0]), truth([HERE], labels=[1])]
    detections = found((0, HERE, 0.9), (1, HERE, 0.8), labels=[1, 0])
    assert average_precisions(detections, objects, 2).tolist() == [[0] * 10, [0] * 10]
    detections = found((1, HERE, 0.9), (0, HERE, 0.8), labels=[1, 0])
    assert average_precisions(detections, objects, 2).tolist() == [[1] * 10, [1] * 10]


def loop(detections: Detections, objects: list[Objects], k: int, threshold: float) -> float:
    """VOC's own evaluation, box by box, in pixels from 1."""
    seen, curve, right, wrong = set(), [], 0, 0
    total = sum(int((~o.difficult[o.labels == k]).sum()) for o in objects)
    for d in sorted(np.flatnonzero(detections.labels == k), key=lambda d: -detections.scores[d]):
        image, best, which = int(detections.images[d]), -1.0, -1
        a = detections.boxes[d] + [1, 1, 0, 0]
        for m in np.flatnonzero(objects[image].labels == k):
            b = objects[image].boxes[m] + [1, 1, 0, 0]
            wide, high = (min(a[2 + i], b[2 + i]) - max(a[i], b[i]) + 1 for i in (0, 1))
            inside = max(wide, 0) * max(high, 0)
            area = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
            if (share := inside / (sum(area) - inside)) > best:
                best, which = share, m
        if best <= threshold or (image, which) in seen:
            wrong += 1
        elif not objects[image].difficult[which]:
            right += 1
            seen.add((image, which))
        curve.append((right / total, right / max(right + wrong, 1e-9)))
    return sum(max([p for r, p in curve if r >= t], default=0) for t in np.arange(0, 1.1, 0.1)) / 11


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop_over_everything(seed: int) -> None:
    """Sixty detections near the objects of five images, difficult ones among them, and of both classes."""
    draws = np.random.default_rng(seed)
    objects = []
    for count in draws.integers(2, 5, 5).tolist():
        first = draws.integers(0, 20, (count, 2))
        boxes = np.concatenate([first, first + draws.integers(6, 20, (count, 2))], axis=1)
        objects.append(Objects(boxes.astype(np.float32), draws.integers(0, 2, count), draws.random(count) < 0.2))
    image_D = draws.integers(0, 5, 60)
    near = [objects[image].boxes[draws.integers(0, len(objects[image].boxes))] for image in image_D]
    boxes_D4 = np.array(near, np.float64) + draws.integers(-2, 3, (60, 4))
    detections = Detections(image_D, boxes_D4, draws.integers(0, 2, 60), draws.random(60))
    wanted = [[loop(detections, objects, k, threshold) for threshold in THRESHOLDS] for k in (0, 1)]
    np.testing.assert_allclose(average_precisions(detections, objects, 2), wanted, atol=1e-12)
    assert 0.05 < np.mean(wanted) < 0.95
