"""Optima of linear SVMs: by hand, by their conditions, and by liblinear where it is made to converge."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.svm import LinearSVC

from bowstore.evaluate import exact_svm
from bowstore.evaluate.exact_svm import optima
from bowstore.evaluate.svm import normalise_rows

COSTS = (100.0, 1e-6, 0.01, 1.0, 10.0)


def problem(images: int = 90, dims: int = 40, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    """Overlapping classes, a quarter of the images positive; more dimensions than many VOC classes have positives."""
    draws = np.random.default_rng(seed)
    targets = np.where(np.arange(images) % 4 == 0, 1, -1).astype(np.int8)
    features = np.maximum(
        draws.standard_normal((images, dims)) + 0.5 * (targets[:, None] > 0) * (np.arange(dims) < 8), 0
    )
    return normalise_rows(features), targets


def test_one_image_by_hand() -> None:
    """K = |x|^2 + 1 = 2; beta = 1 / (2 + 1 / (2 * cost * 2)) for a positive, and half that weight for a negative."""
    kernel = np.array([[2.0]])
    assert optima(kernel, np.array([1]), [0.25])[0].tolist() == [[pytest.approx(1 / (2 + 1))]]
    assert optima(kernel, np.array([-1]), [0.25])[0].tolist() == [[pytest.approx(-1 / (2 + 2))]]


@pytest.mark.parametrize("dims", [5, 40, 300])
def test_as_liblinear_where_it_converges(dims: int) -> None:
    X, y = problem(dims=dims)
    beta_nC, short = optima(X @ X.T + 1, y, COSTS)
    assert short == 0
    for c, cost in enumerate(COSTS):
        other = LinearSVC(C=cost, dual=False, tol=1e-12, max_iter=100_000, class_weight={1: 2, -1: 1}).fit(X, y)
        np.testing.assert_allclose(beta_nC[:, c] @ X, other.coef_[0], rtol=1e-4, atol=1e-6)
        assert beta_nC[:, c].sum() == pytest.approx(other.intercept_[0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("patience", [1, 30, 10**9])
def test_the_conditions_of_the_optimum(monkeypatch: pytest.MonkeyPatch, patience: int) -> None:
    """beta = 2 cost weight (y - score) inside the margin, else 0; whichever way the systems are solved."""
    monkeypatch.setattr(exact_svm, "_PATIENCE", patience)
    X, y = problem()
    kernel = X @ X.T + 1
    beta_nC, short = optima(kernel, y, COSTS)
    assert short == 0
    for c, cost in enumerate(COSTS):
        score = kernel @ beta_nC[:, c]
        expected = 2 * cost * np.where(y > 0, 2, 1) * y * np.maximum(0, 1 - y * score)
        np.testing.assert_allclose(beta_nC[:, c], expected, atol=1e-7 * np.abs(expected).max())
    assert 0 < (beta_nC[:, 0] != 0).sum() < len(y)


def test_costs_in_any_order_and_alone_have_the_same_optimum() -> None:
    X, y = problem()
    kernel = X @ X.T + 1
    beta_nC, _ = optima(kernel, y, COSTS)
    for c, cost in enumerate(COSTS):
        alone, _ = optima(kernel, y, [cost])
        np.testing.assert_allclose(alone[:, 0], beta_nC[:, c], rtol=1e-6, atol=1e-10)


def test_images_that_are_the_same_and_features_of_nothing() -> None:
    X, y = problem(images=40)
    X, y = np.concatenate([X, X, 0 * X]), np.concatenate([y, y, y])
    beta_nC, short = optima(X @ X.T + 1, y, COSTS)
    assert short == 0
    np.testing.assert_allclose(beta_nC[:40], beta_nC[40:80], atol=1e-6)


def test_optima_that_are_not_reached_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_svm, "_STEPS", 1)
    X, y = problem()
    assert optima(X @ X.T + 1, y, (1e-6, 100.0))[1] == 1
