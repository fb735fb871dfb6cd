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
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold, cross_validate
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from bowstore.errors import BowstoreError, DataError
from bowstore.evaluate.exact_svm import optima
from bowstore.evaluate.protocols.voc07 import Solver
from bowstore.progress import Progress

NORM_EPSILON = 1e-5
MAX_ITERATIONS = 2000
FOLDS = 3
SEED = 0  # liblinear's
_KERNEL_ROWS = 512
PRESENT, ABSENT, IGNORED = 1, 0, -1


@dataclass(frozen=True, kw_only=True)
class SvmScores:
    """What the SVMs of one feature give.

    Attributes:
        average_precision_K: float64, on the test split, 0 to 1.
        cost_K: float64, the chosen cost.
        validation_KC: float64, mean cross-validated average precision (scikit-learn's) by class and cost.
        fits: how many SVMs were fitted.
        unconverged: how many of them stopped before their optimum, at the limit of iterations.
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
    costs: Sequence[float],
    solver: Solver = "exact",
    jobs: int | None = None,
    what: str = "svm",
) -> SvmScores:
    """Choose a cost for each class by cross-validation, fit with it, and test.

    Only the chosen cost is fitted on all training images: fitting every cost, as the public codes do, gives
    the same scores, because the others are never looked at. Every fit runs in one thread, so that the number of jobs
    does not change the result. Jobs are processes and not threads, because liblinear's random numbers are a global of
    the process.

    Memory: normalised features are shared between the processes. "exact" shares N x N inner products, too (0.2 GB for
    5011 images), and a job needs as much again; liblinear copies the features at 16 bytes a value, about 0.8 GB a job
    for 5011 images with 9216 dimensions.

    Args:
        train_Nd: features, not normalised.
        train_labels_NK: int8, 1 present, 0 absent, -1 only difficult objects; as `check_problem` wants them.
        test_Md: features, not normalised.
        test_labels_MK: int8, as for training.
        costs: tried in this order; of equally good ones the first is taken.
        solver: "exact" finds the optima (`bowstore.evaluate.exact_svm`), "liblinear" stops where the public codes do.
        jobs: processes; None for one a core.
        what: name of the step in the progress line.

    Raises:
        DataError: as `average_precision`.
        BowstoreError: a worker process was killed.
    """
    targets_NK, classes = train_targets(train_labels_NK), train_labels_NK.shape[1]
    train, test = normalise_rows(train_Nd), normalise_rows(test_Md)
    fits = classes * (len(costs) * FOLDS + 1)
    with Progress(what, fits, "fits") as progress:
        solved_by = (_Exact if solver == "exact" else _Liblinear)(train, targets_NK, jobs or joblib.cpu_count())
        validation_KC, short = solved_by.validation(costs, progress)
        cost_K = np.array([costs[c] for c in validation_KC.argmax(axis=1)])
        precision_K = np.empty(classes)
        for k, (scores_M, stopped) in enumerate(solved_by.refitted(cost_K, test)):
            precision_K[k] = average_precision(scores_M, test_labels_MK[:, k])
            short += stopped
            progress.advance()
    return SvmScores(
        average_precision_K=precision_K,
        cost_K=cost_K,
        validation_KC=validation_KC,
        fits=fits,
        unconverged=short,
    )


@dataclass(frozen=True)
class _Liblinear:
    """scikit-learn's LinearSVC, as the public codes call it."""

    train_Nd: NDArray[np.float64]
    targets_NK: NDArray[np.int8]
    jobs: int

    def validation(self, costs: Sequence[float], progress: Progress) -> tuple[NDArray[np.float64], int]:
        """Mean cross-validated average precision (K, C), and how many fits did not converge."""
        classes = self.targets_NK.shape[1]
        validation_KC, short = np.empty((classes, len(costs))), 0
        # Large costs take longest: first in line, so that no process is left alone with one at the end.
        order = [(k, c) for c in np.argsort(costs)[::-1].tolist() for k in range(classes)]
        tasks = (joblib.delayed(_cross_validate)(self.train_Nd, self.targets_NK[:, k], costs[c]) for k, c in order)
        for (k, c), (score, stopped) in zip(order, in_processes(self.jobs, tasks), strict=True):
            validation_KC[k, c] = score
            short += stopped
            progress.advance(FOLDS)
        return validation_KC, short

    def refitted(self, cost_K: NDArray[np.float64], test_Md: NDArray[np.float64]) -> Iterator[tuple[Any, int]]:
        """Test scores (M,) of each class fitted with its cost, and whether the fit did not converge."""
        pairs = zip(self.targets_NK.T, cost_K.tolist(), strict=True)
        return in_processes(
            self.jobs, (joblib.delayed(_fit_and_score)(self.train_Nd, y_N, test_Md, cost) for y_N, cost in pairs)
        )


class _Exact:
    """The optima, in the kernel of the training images that all classes, folds and costs share."""

    def __init__(self, train_Nd: NDArray[np.float64], targets_NK: NDArray[np.int8], jobs: int) -> None:
        self._train_Nd, self._targets_NK, self._jobs = train_Nd, targets_NK, jobs
        self._kernel_NN = kernel(train_Nd, train_Nd, jobs)

    def validation(self, costs: Sequence[float], progress: Progress) -> tuple[NDArray[np.float64], int]:
        """Mean cross-validated average precision (K, C), and how many optima were not reached."""
        classes = self._targets_NK.shape[1]
        precision_KFC, short = np.empty((classes, FOLDS, len(costs))), 0
        order = [(k, fold) for k in range(classes) for fold in range(FOLDS)]
        tasks = (joblib.delayed(_fold)(self._kernel_NN, self._targets_NK[:, k], fold, costs) for k, fold in order)
        for (k, fold), (precision_C, stopped) in zip(order, in_processes(self._jobs, tasks), strict=True):
            precision_KFC[k, fold] = precision_C
            short += stopped
            progress.advance(len(costs))
        return precision_KFC.mean(axis=1), short

    def refitted(self, cost_K: NDArray[np.float64], test_Md: NDArray[np.float64]) -> Iterator[tuple[Any, int]]:
        """Test scores (M,) of each class fitted with its cost, and whether the optimum was not reached."""
        pairs = zip(self._targets_NK.T, cost_K.tolist(), strict=True)
        shared = self._kernel_NN, self._train_Nd, test_Md
        return in_processes(self._jobs, (joblib.delayed(_optimum)(*shared, y_N, cost) for y_N, cost in pairs))


def kernel(left_Nd: NDArray[np.float64], right_Md: NDArray[np.float64], jobs: int) -> NDArray[np.float64]:
    """Inner products (N, M) plus 1, which stands for the intercept; a block of rows a task, for any number of jobs."""
    starts = range(0, len(left_Nd), _KERNEL_ROWS)
    parts = (joblib.delayed(_products)(left_Nd, right_Md, start) for start in starts)
    return np.concatenate(list(in_processes(jobs, parts)))


def _products(left_Nd: NDArray[np.float64], right_Md: NDArray[np.float64], start: int) -> NDArray[np.float64]:
    with threadpool_limits(limits=1):
        products = left_Nd[start : start + _KERNEL_ROWS] @ right_Md.T
        products += 1
        return products


def in_processes(jobs: int, tasks: Iterable[Any]) -> Iterator[Any]:
    """What each task gives (`joblib.delayed`), in their order; large arrays are shared through memory maps."""
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator", batch_size=1)
    try:
        yield from parallel(tasks)
    except BrokenProcessPool as error:
        raise BowstoreError(
            f"a process of {jobs} fitting SVMs was killed, most often for want of memory; use fewer --jobs"
        ) from error


def _fold(
    kernel_NN: NDArray[np.float64], targets_N: NDArray[np.int8], fold: int, costs: Sequence[float]
) -> tuple[list[float], int]:
    """Average precision (C,) on one of the folds that `cross_validate` makes, and how many optima were not reached."""
    fit, held = list(StratifiedKFold(FOLDS).split(targets_N, targets_N))[fold]
    with threadpool_limits(limits=1):
        beta_nC, short = optima(kernel_NN[np.ix_(fit, fit)], targets_N[fit], costs)
        scores_hC = kernel_NN[np.ix_(held, fit)] @ beta_nC
    return [float(average_precision_score(targets_N[held], scores_h)) for scores_h in scores_hC.T], short


def _optimum(
    kernel_NN: NDArray[np.float64],
    train_Nd: NDArray[np.float64],
    test_Md: NDArray[np.float64],
    targets_N: NDArray[np.int8],
    cost: float,
) -> tuple[NDArray[np.float64], int]:
    """Decision values (M,) on the test images, and whether the optimum was not reached."""
    with threadpool_limits(limits=1):
        beta_N1, short = optima(kernel_NN, targets_N, [cost])
        return test_Md @ (beta_N1[:, 0] @ train_Nd) + beta_N1.sum(), short


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
