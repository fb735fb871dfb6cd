"""One-vs-rest linear SVMs with a cost chosen for each class, and VOC average precision (protocols 3.1).

Needs no torch: worker processes import this module alone.

Legend: N training images, M test images, d feature width, K classes, C costs.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any
from warnings import catch_warnings, simplefilter

import joblib
import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_validate
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from bowstore.errors import BowstoreError, DataError
from bowstore.progress import Progress

NORM_EPSILON = 1e-5
MAX_ITERATIONS = 2000
FOLDS = 3
SEED = 0  # liblinear's
PRESENT, ABSENT, IGNORED = 1, 0, -1


@dataclass(frozen=True, kw_only=True)
class SvmScores:
    """What the SVMs of one feature give.

    Attributes:
        average_precision_K: float64, on the test split, 0 to 1.
        cost_K: float64, the chosen cost.
        validation_KC: float64, mean cross-validated average precision (scikit-learn's) by class and cost.
        fits: how many SVMs were fitted.
        unconverged: how many of them stopped at the limit of iterations.
    """

    average_precision_K: NDArray[np.float64]
    cost_K: NDArray[np.float64]
    validation_KC: NDArray[np.float64]
    fits: int
    unconverged: int

    @property
    def mean_average_precision(self) -> float:
        """Mean over the classes, 0 to 1."""
        return float(self.average_precision_K.mean())


def normalise_rows(features_Nd: NDArray[np.floating]) -> NDArray[np.float64]:
    """Each row over (its L2 norm + 1e-5), in float64, as the public codes do."""
    wide_Nd = features_Nd.astype(np.float64)
    wide_Nd /= np.linalg.norm(wide_Nd, axis=1, keepdims=True) + NORM_EPSILON
    return wide_Nd


def train_targets(labels: NDArray[np.integer]) -> NDArray[np.int8]:
    """Labels for training: 1 where the class is present, else -1.

    The protocol's quirk: images with only difficult objects of the class (-1) are negatives in training and
    cross-validation, while the test drops them.
    """
    return np.where(labels == PRESENT, np.int8(1), np.int8(-1))


def average_precision(scores_M: NDArray[np.float64], labels_M: NDArray[np.integer]) -> float:
    """VOC average precision over all points of the envelope, 0 to 1; ignored images (-1) are dropped.

    Images are ranked by falling score, equal scores in reverse order of the images. Precision is made
    non-increasing from the right; the area sums it over the points where recall changes. This is neither the
    11-point metric of 2007 nor scikit-learn's step function, which both give other numbers.

    Raises:
        DataError: no positive image, or a score that is not finite.
    """
    kept = labels_M != IGNORED
    scores, positive = scores_M[kept], labels_M[kept] == PRESENT
    if not positive.any():
        raise DataError(f"no positive among {len(positive)} test images: average precision is not defined")
    if not np.isfinite(scores).all():
        raise DataError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} SVM scores are NaN or infinite")
    ranked = positive[np.argsort(scores, kind="stable")[::-1]]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # Recall rises by one part in the number of positives at each positive and nowhere else.
    return float(envelope[ranked].sum() / ranked.sum())


def check_problem(train_labels_NK: NDArray[np.integer], classes: Sequence[str]) -> None:
    """Refuse what `evaluate_svms` cannot do, before any feature is computed.

    Raises:
        DataError: a class with fewer than 3 positive or negative training images.
    """
    for k, name in enumerate(classes):
        positives = int((train_labels_NK[:, k] == PRESENT).sum())
        for sign, count in (("positive", positives), ("negative", len(train_labels_NK) - positives)):
            if count < FOLDS:
                raise DataError(
                    f"class {name}: {count} {sign} training images; cross-validation needs at least {FOLDS}, "
                    "one a fold: use the full devkit"
                )


def evaluate_svms(
    train_Nd: NDArray[np.floating],
    train_labels_NK: NDArray[np.integer],
    test_Md: NDArray[np.floating],
    test_labels_MK: NDArray[np.integer],
    *,
    classes: Sequence[str],
    costs: Sequence[float],
    jobs: int | None = None,
    what: str = "svm",
) -> SvmScores:
    """Choose a cost for each class by cross-validation, fit with it, and test.

    Only the chosen cost is fitted on all training images: fitting every cost, as the public codes do, gives
    the same scores, because the others are never looked at. Every fit is seeded by `SEED` and runs in one
    thread, so that the number of jobs does not change the result. Jobs are processes and not threads, because
    liblinear's random numbers are a global of the process.

    Memory: normalised features are shared between the processes; liblinear copies them at 16 bytes a value,
    about 0.8 GB a job for 5011 images with 9216 dimensions.

    Args:
        train_Nd: features, not normalised.
        train_labels_NK: int8, 1 present, 0 absent, -1 only difficult objects; as `check_problem` wants them.
        test_Md: features, not normalised.
        test_labels_MK: int8, as for training.
        classes: names of the K classes.
        costs: tried in this order; of equally good ones the first is taken.
        jobs: processes; None for one a core.
        what: name of the step in the progress line.

    Raises:
        DataError: as `average_precision`.
        BowstoreError: a worker process was killed.
    """
    jobs = jobs or joblib.cpu_count()
    targets_NK = train_targets(train_labels_NK)
    train, test = normalise_rows(train_Nd), normalise_rows(test_Md)

    validation_KC = np.empty((len(classes), len(costs)))
    unconverged = 0
    fits = len(classes) * (len(costs) * FOLDS + 1)
    # Large costs take longest: first in line, so that no process is left alone with one at the end.
    order = [(k, c) for c in np.argsort(costs)[::-1].tolist() for k in range(len(classes))]
    with Progress(what, fits, "fits") as progress:
        searches = (joblib.delayed(_cross_validate)(train, targets_NK[:, k], costs[c]) for k, c in order)
        for (k, c), (score, stopped) in zip(order, _in_processes(jobs, searches), strict=True):
            validation_KC[k, c] = score
            unconverged += stopped
            progress.advance(FOLDS)
        cost_K = np.array([costs[c] for c in validation_KC.argmax(axis=1)])
        precision_K = np.empty(len(classes))
        refits = (joblib.delayed(_fit_and_score)(train, targets_NK[:, k], test, cost) for k, cost in enumerate(cost_K))
        for k, (scores_M, stopped) in enumerate(_in_processes(jobs, refits)):
            precision_K[k] = average_precision(scores_M, test_labels_MK[:, k])
            unconverged += stopped
            progress.advance()
    return SvmScores(
        average_precision_K=precision_K,
        cost_K=cost_K,
        validation_KC=validation_KC,
        fits=fits,
        unconverged=unconverged,
    )


def _in_processes(jobs: int, tasks: Iterable[Any]) -> Iterator[Any]:
    """What each task gives (`joblib.delayed`), in their order; large arrays are shared through memory maps."""
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator", batch_size=1)
    try:
        yield from parallel(tasks)
    except BrokenProcessPool as error:
        raise BowstoreError(
            f"a process of {jobs} fitting SVMs was killed, most often for want of memory; use fewer --jobs"
        ) from error


def _svm(cost: float) -> LinearSVC:
    return LinearSVC(
        C=cost,
        penalty="l2",
        loss="squared_hinge",
        dual=True,
        tol=1e-4,
        max_iter=MAX_ITERATIONS,
        intercept_scaling=1.0,
        class_weight={1: 2, -1: 1},
        random_state=SEED,
    )


def _cross_validate(train_Nd: NDArray[np.float64], targets_N: NDArray[np.int8], cost: float) -> tuple[float, int]:
    """Mean average precision over unshuffled stratified folds, and how many fits did not converge."""
    with threadpool_limits(limits=1), catch_warnings():
        simplefilter("ignore", ConvergenceWarning)  # counted instead
        folds = cross_validate(
            _svm(cost),
            train_Nd,
            targets_N,
            cv=FOLDS,
            scoring="average_precision",
            return_estimator=True,
            error_score="raise",
        )
    return float(folds["test_score"].mean()), sum(svm.n_iter_ >= MAX_ITERATIONS for svm in folds["estimator"])


def _fit_and_score(
    train_Nd: NDArray[np.float64],
    targets_N: NDArray[np.int8],
    test_Md: NDArray[np.float64],
    cost: float,
) -> tuple[NDArray[np.float64], int]:
    """Decision values (M,) on the test images, and whether the fit did not converge."""
    with threadpool_limits(limits=1), catch_warnings():
        simplefilter("ignore", ConvergenceWarning)
        svm = _svm(cost).fit(train_Nd, targets_N)
        return svm.decision_function(test_Md), int(svm.n_iter_ >= MAX_ITERATIONS)
