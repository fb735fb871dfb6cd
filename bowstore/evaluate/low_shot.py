"""SVMs on few images of VOC07 (`protocols/voc07_lowshot.py`; protocols 3.2): the samples, and what is made of them.

Legend: N training images, M test images, K classes, C costs, S samples; n images of a sample of one class.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from threadpoolctl import threadpool_limits

from bowstore.config import Workspace
from bowstore.errors import DataError
from bowstore.evaluate.exact_svm import optima
from bowstore.evaluate.protocol import DataSets, Features, Scores
from bowstore.evaluate.protocols.voc07 import COSTS
from bowstore.evaluate.protocols.voc07_lowshot import SAMPLES, LowShotSettings, metric
from bowstore.evaluate.results import INTERVAL
from bowstore.evaluate.svm import (
    ABSENT,
    NORM_EPSILON,
    PRESENT,
    average_precision,
    in_processes,
    kernel,
    normalise_rows,
)
from bowstore.evaluate.voc import open_voc
from bowstore.progress import Progress


def data(settings: LowShotSettings, _workspace: Workspace) -> DataSets:
    """Both splits, once they fit each other and the shots: what can be wrong before an image is read.

    Raises:
        MissingError, DataError, MismatchError: as `open_voc`.
        DataError: a class has fewer images than a sample takes of it.
    """
    found = open_voc(settings)
    train = found["trainval"]
    check_shots(train.labels, train.classes, settings.shots[-1])
    return found


def check_shots(labels_NK: NDArray[np.integer], classes: Sequence[str], shots: int) -> None:
    """Refuse classes with too few images for so many shots.

    Raises:
        DataError: one class, so that there would be no negatives, or a class that has too few of either sign.
    """
    if len(classes) < 2:
        raise DataError(f"{len(classes)} class; a sample takes negatives for each other class, so that two are needed")
    others = len(classes) - 1
    for k, name in enumerate(classes):
        positives, negatives = (int((labels_NK[:, k] == label).sum()) for label in (PRESENT, ABSENT))
        if (spare := min(positives, negatives // others)) < shots:
            raise DataError(
                f"class {name}: {positives} positive and {negatives} negative training images, and {shots} shots need "
                f"{shots} and {others * shots}; " + (f"take --shots up to {spare}" if spare else "use the full devkit")
            )


def sampled(labels_N: NDArray[np.integer], shots: int, negatives: int, place: Sequence[int]) -> NDArray[np.int64]:
    """Rows of a sample of one class: so many positives, then so many negatives, without replacement.

    Difficult images are neither. A function of the labels and of `place` alone: seed, class, shots and sample.
    """
    seed, *counter = place
    draws = np.random.Generator(np.random.Philox(key=seed, counter=[0, *counter]))
    chosen = []
    for label, count in ((PRESENT, shots), (ABSENT, negatives)):
        rows = np.flatnonzero(labels_N == label)
        chosen.append(rows[np.argsort(draws.random(len(rows)), kind="stable")[:count]])
    return np.concatenate(chosen)


def score(features: Features, settings: LowShotSettings) -> Scores:
    """Train SVMs on samples of trainval and test them, for each layer.

    The metrics are those of the best layer by number of shots, each at the cost with the best mean over the samples;
    the details of a layer have mean, least, largest and population deviation over the samples, and the cost.

    Raises:
        DataError: as `svm.average_precision`.
    """
    train, test = features["trainval"], features["test"]
    costs = COSTS[settings.costs]
    details: dict[str, dict[str, Any]] = {}
    how: dict[str, Any] = {"shots": settings.shots, "costs": costs, "seed": settings.seed, "jobs": settings.jobs}
    for layer in train.taps:
        precision, short = low_shot_precision(
            train[layer], train.labels, test[layer], test.labels, what=f"svm {layer}", **how
        )
        details[layer] = {metric(shots): _summary(map_SC, costs) for shots, map_SC in precision.items()}
        details[layer]["unconverged_fits"] = short
    best = {
        name: max((found[name] for found in details.values()), key=lambda one: one["mean"])
        for name in map(metric, settings.shots)
    }
    half = float(stdtrit(SAMPLES - 1, 0.975)) / np.sqrt(SAMPLES)
    return Scores(
        metrics={name: one["mean"] for name, one in best.items()},
        details={**details, INTERVAL: {name: half * np.std(one["samples"], ddof=1) for name, one in best.items()}},
        settings={"norm_epsilon": NORM_EPSILON, "costs": list(costs), "samples": SAMPLES},
    )


def _summary(map_SC: NDArray[np.float64], costs: Sequence[float]) -> dict[str, Any]:
    """At the cost with the best mean over the samples, of equals the first."""
    best = int(map_SC.mean(axis=0).argmax())
    map_S = map_SC[:, best]
    found = {name: float(getattr(map_S, name)()) for name in ("mean", "min", "max", "std")}
    return {**found, "cost": costs[best], "samples": map_S.tolist()}


def low_shot_precision(
    train_Nd: NDArray[np.floating],
    train_labels_NK: NDArray[np.integer],
    test_Md: NDArray[np.floating],
    test_labels_MK: NDArray[np.integer],
    *,
    shots: Sequence[int],
    costs: Sequence[float],
    seed: int,
    jobs: int | None = None,
    what: str = "svm",
) -> tuple[Mapping[int, NDArray[np.float64]], int]:
    """Mean average precision on the test images, (S, C), by number of shots; and how many optima were not reached.

    The SVMs are those of `svm.evaluate_svms`, solved exactly, each on the sample of a class: shots positives and
    (K - 1) times as many negatives. The number of jobs does not change the result.

    Memory: N x N and N x M inner products, shared between the processes (0.4 GB for VOC07).

    Args:
        train_Nd: features, not normalised.
        train_labels_NK: int8, 1 present, 0 absent, -1 only difficult objects; as `check_shots` wants them.
        test_Md: features, not normalised.
        test_labels_MK: int8, as for training.
        shots: ascending.
        costs: above 0.
        seed: of the samples.
        jobs: processes; None for one a core.
        what: name of the step in the progress line.

    Raises:
        DataError: as `svm.average_precision`.
        BowstoreError: a worker process was killed.
    """
    jobs, classes = jobs or joblib.cpu_count(), train_labels_NK.shape[1]
    # Many shots take longest: first in line, so that no process is left alone with one at the end.
    order = [(k, s, c) for k in reversed(shots) for s in range(SAMPLES) for c in range(classes)]
    precision, short = {k: np.empty((SAMPLES, classes, len(costs))) for k in shots}, 0
    with Progress(what, len(order) * len(costs), "fits") as progress:
        train, test = normalise_rows(train_Nd), normalise_rows(test_Md)
        shared = kernel(train, train, jobs), kernel(train, test, jobs)
        tasks = (
            joblib.delayed(_fit_and_test)(
                *shared,
                sampled(train_labels_NK[:, c], k, (classes - 1) * k, (seed, c, k, s)),
                k,
                test_labels_MK[:, c],
                costs,
            )
            for k, s, c in order
        )
        for (k, s, c), (precision_C, stopped) in zip(order, in_processes(jobs, tasks), strict=True):
            precision[k][s, c] = precision_C
            short += stopped
            progress.advance(len(costs))
    return {k: precision[k].mean(axis=1) for k in shots}, short


def _fit_and_test(
    kernel_NN: NDArray[np.float64],
    test_kernel_NM: NDArray[np.float64],
    rows_n: NDArray[np.int64],
    positives: int,
    labels_M: NDArray[np.integer],
    costs: Sequence[float],
) -> tuple[list[float], int]:
    """Average precision (C,) of SVMs on rows, the first so many of them positive; how many optima were not reached."""
    targets_n = np.where(np.arange(len(rows_n)) < positives, 1, -1)
    with threadpool_limits(limits=1):
        beta_nC, short = optima(kernel_NN[np.ix_(rows_n, rows_n)], targets_n, costs)
        scores_CM = beta_nC.T @ test_kernel_NM[rows_n]
    return [average_precision(scores_M, labels_M) for scores_M in scores_CM], short
