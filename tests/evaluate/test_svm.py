import os
import subprocess
import sys
import warnings

import joblib
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from bowstore.errors import BowstoreError, DataError
from bowstore.evaluate import svm
from bowstore.evaluate.protocols.voc07 import COSTS, CostList, Solver
from bowstore.evaluate.svm import (
    ABSENT,
    IGNORED,
    PRESENT,
    average_precision,
    check_problem,
    evaluate_svms,
    normalise_rows,
    train_targets,
)

Problem = tuple[NDArray[np.float32], NDArray[np.int8], NDArray[np.float32], NDArray[np.int8]]


def problem(seed: int = 0, images: int = 60, dims: int = 6, noise: float = 0.6) -> Problem:
    """Two classes, each along an axis of its own, for both splits."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, 2, (2 * images, 2)).astype(np.int8)
    features = np.abs(labels @ np.eye(2, dims) + noise * draws.standard_normal((2 * images, dims)))
    features = features.astype(np.float32)
    return features[:images], labels[:images], features[images:], labels[images:]


def eleven_point(ranked: NDArray[np.bool_]) -> float:
    """The metric of 2007: mean over recalls 0, 0.1, ... 1 of the best precision from there on."""
    recall = np.cumsum(ranked) / ranked.sum()
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return float(np.mean([precision[recall >= level / 10].max() for level in range(11)]))


class TestAveragePrecision:
    def test_golden_triple(self) -> None:
        # Ranking + - + + -: precision at the positives 1, 2/3, 3/4; the envelope lifts the second to 3/4.
        labels = np.array([1, 0, 1, 1, 0], np.int8)
        scores = np.array([5.0, 4, 3, 2, 1])
        step = average_precision_score(labels, scores)
        assert step == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
        assert average_precision(scores, labels) == pytest.approx((1 + 3 / 4 + 3 / 4) / 3)
        assert eleven_point(labels == 1) == pytest.approx((4 * 1 + 7 * 3 / 4) / 11)
        assert step < average_precision(scores, labels) < eleven_point(labels == 1)

    def test_perfect(self) -> None:
        assert average_precision(np.array([3.0, 2, 1, 0]), np.array([1, 1, 0, 0], np.int8)) == 1

    def test_reversed(self) -> None:
        # Ranks 3 and 4 of 4: precision 1/3 and 1/2, the envelope 1/2 at both.
        assert average_precision(np.array([0.0, 1, 2, 3]), np.array([1, 1, 0, 0], np.int8)) == pytest.approx(0.5)

    def test_ties_reverse_the_images(self) -> None:
        equal = np.zeros(4)
        assert average_precision(equal, np.array([0, 0, 0, 1], np.int8)) == 1
        assert average_precision(equal, np.array([1, 0, 0, 0], np.int8)) == pytest.approx(1 / 4)

    def test_ignored_images_are_dropped(self) -> None:
        labels = np.array([IGNORED, 1, IGNORED, 0], np.int8)
        assert average_precision(np.array([9.0, 2, 8, 1]), labels) == 1

    def test_order_of_images_does_not_matter_without_ties(self) -> None:
        draws = np.random.default_rng(0)
        scores, labels = draws.standard_normal(50), draws.integers(-1, 2, 50).astype(np.int8)
        order = draws.permutation(50)
        assert average_precision(scores[order], labels[order]) == average_precision(scores, labels)

    def test_no_positive(self) -> None:
        with pytest.raises(DataError, match="no positive among 2 test images"):
            average_precision(np.array([1.0, 2, 3]), np.array([0, 0, -1], np.int8))

    def test_scores_must_be_finite(self) -> None:
        with pytest.raises(DataError, match="1 of 2 SVM scores"):
            average_precision(np.array([1.0, np.nan]), np.array([1, 0], np.int8))


class TestCosts:
    @pytest.mark.parametrize(("name", "count"), [("fair", 26), ("vissl", 11), ("obow", 23)])
    def test_lengths(self, name: CostList, count: int) -> None:
        assert len(COSTS[name]) == len(set(COSTS[name])) == count

    def test_ends(self) -> None:
        assert COSTS["fair"][:2] == (1e-7, 1e-6)
        assert COSTS["fair"][9:11] == (100.0, 0.5**4)
        assert COSTS["fair"][-1] == COSTS["obow"][-1] == 0.5**19
        assert COSTS["vissl"] == (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000)
        assert COSTS["obow"][:8] == (0.05, 0.1, 0.3, 0.5, 1, 3, 5, 0.0625)


def test_label_mapping() -> None:
    labels = np.array([PRESENT, ABSENT, IGNORED], np.int8)
    assert labels.tolist() == [1, 0, -1]
    assert train_targets(labels).tolist() == [1, -1, -1]  # difficult images are negatives in training


def test_rows_are_normalised_in_float64() -> None:
    rows = normalise_rows(np.array([[3, 4], [0, 0]], np.float32))
    assert rows.dtype == np.float64
    np.testing.assert_allclose(rows, np.array([[3 / 5.00001, 4 / 5.00001], [0, 0]]), rtol=1e-12)


def run(data: Problem, **options: object) -> svm.SvmScores:
    settings = {"costs": (0.01, 1.0, 100.0), "jobs": 1} | options
    return evaluate_svms(*data, **settings)  # type: ignore[arg-type]


def test_separable_classes_are_found() -> None:
    scores = run(problem(noise=0.05))
    assert scores.mean_average_precision > 0.99
    assert scores.fits == 2 * (3 * 3 + 1)


def test_first_of_equal_costs_is_taken() -> None:
    scores = run(problem(noise=0.0), costs=(10.0, 1.0, 100.0))
    assert (scores.validation_KC == 1).all()
    assert scores.cost_K.tolist() == [10.0, 10.0]


def test_best_cost_of_each_class() -> None:
    scores = run(problem(noise=0.8))
    costs = np.array((0.01, 1.0, 100.0))
    assert scores.cost_K.tolist() == costs[scores.validation_KC.argmax(axis=1)].tolist()
    assert np.ptp(scores.validation_KC, axis=1).min() > 0


@pytest.mark.parametrize(("solver", "images", "dims"), [("exact", 400, 350), ("liblinear", 3000, 48)])
def test_number_of_jobs_and_runs_change_nothing(solver: Solver, images: int, dims: int) -> None:
    data = problem(images=images, dims=dims)  # above a megabyte, so that processes share it through a memory map
    one, two, again = (run(data, costs=(0.01, 1.0), jobs=jobs, solver=solver) for jobs in (1, 2, 1))
    for other in (two, again):
        np.testing.assert_array_equal(one.validation_KC, other.validation_KC)
        np.testing.assert_array_equal(one.average_precision_K, other.average_precision_K)
        np.testing.assert_array_equal(one.cost_K, other.cost_K)
        assert one.unconverged == other.unconverged


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("solver", ["exact", "liblinear"])
def test_agrees_with_fitting_every_cost_by_hand(solver: Solver) -> None:
    """liblinear to the last digit; the optima give the same rankings where it comes near them."""
    train, labels, test, test_labels = problem(noise=0.7)
    scores = run((train, labels, test, test_labels), solver=solver)
    for k in range(2):
        tried: list[tuple[float, int, float]] = []
        for cost in (0.01, 1.0, 100.0):
            machine = LinearSVC(C=cost, dual=True, tol=1e-4, max_iter=2000, class_weight={1: 2, -1: 1}, random_state=0)
            target = np.where(labels[:, k] == 1, 1, -1)
            folds = cross_val_score(machine, normalise_rows(train), target, cv=3, scoring="average_precision")
            machine.fit(normalise_rows(train), target)
            decision = machine.decision_function(normalise_rows(test))
            tried.append((folds.mean(), -len(tried), average_precision(decision, test_labels[:, k])))
        assert scores.average_precision_K[k] == max(tried)[2]


def test_difficult_images_train_as_negatives_and_are_not_tested() -> None:
    train, labels, test, test_labels = problem()
    ignored, absent = labels.copy(), labels.copy()
    ignored[labels == ABSENT] = np.where(np.arange((labels == ABSENT).sum()) % 2, IGNORED, ABSENT)
    one, two = run((train, ignored, test, test_labels)), run((train, absent, test, test_labels))
    np.testing.assert_array_equal(one.average_precision_K, two.average_precision_K)
    dropped = test_labels.copy()
    dropped[test_labels == ABSENT] = IGNORED
    assert run((train, labels, test, dropped)).average_precision_K.tolist() == [1, 1]


def test_unconverged_fits_are_counted_not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svm, "MAX_ITERATIONS", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = run(problem(), costs=(100.0,), solver="liblinear")
    assert scores.unconverged == scores.fits == 8


def test_optima_that_are_not_reached_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bowstore.evaluate.exact_svm._STEPS", 1)
    scores = run(problem(), costs=(1e-6, 100.0))
    assert 0 < scores.unconverged < scores.fits


def test_worker_processes_do_not_load_torch() -> None:
    code = "import sys, bowstore.evaluate.svm; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


class TestErrors:
    def test_too_few_positives_to_cross_validate(self) -> None:
        labels = problem()[1]
        labels[:, 1] = 0
        labels[:2, 1] = 1
        with pytest.raises(DataError, match="class b: 2 positive training images; cross-validation needs at least 3"):
            check_problem(labels, ("a", "b"))

    def test_too_few_negatives(self) -> None:
        labels = problem()[1]
        labels[:, 0] = 1
        with pytest.raises(DataError, match="class a: 0 negative training images"):
            check_problem(labels, ("a", "b"))

    def test_a_killed_process_is_one_line(self) -> None:
        tasks = [joblib.delayed(os._exit)(9)] * 2
        with pytest.raises(BowstoreError, match=r"a process of 2 fitting SVMs was killed.*use fewer --jobs"):
            list(svm.in_processes(2, tasks))
