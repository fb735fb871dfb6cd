"""Linear SVMs solved to their optimum for many costs, in the kernel of their training images (Chapelle, 2007).

The problem is liblinear's: half the squared weights plus, summed over images, cost x class weight x squared hinge
loss, the intercept a weight of a feature that is 1. Its optimum is w = sum of beta_i x_i, and beta is zero outside
the margin. Newton's method in the set A of images inside it solves (K_AA + D_A) beta_A = y_A, with D = 1 / (2 cost
weight) and K the inner products plus 1 for the intercept: a few steps from the optimum of the next smaller cost. The
number of dimensions enters only in K, which all classes, folds and costs share.

Needs no torch: worker processes import this module alone.

Legend: n training images, a of them inside the margin, C costs.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.blas import dsymv

POSITIVE_WEIGHT = 2.0  # of positive images; that of others is 1
_STEPS = 100  # of Newton's method; 3 are usual
_AT_OPTIMUM = 1e-12  # of the objective: what one more step would gain
_RESIDUAL = 1e-13  # of a linear system that is solved by iteration, over its right side
_PATIENCE = 15  # images an iteration: so many more of them make a factorisation longer by as much as one takes
_BISECTIONS = 50

Floats = NDArray[np.float64]


def optima(kernel_nn: Floats, targets_n: NDArray[np.integer], costs: Sequence[float]) -> tuple[Floats, int]:
    """Coefficients beta (n, C) of the optimum of each cost, and how many of them were not reached.

    An image of kernel k_n with the training images has the score k_n @ beta.

    Args:
        kernel_nn: inner products of the training images, plus 1; C-contiguous.
        targets_n: 1 and -1.
        costs: above 0, in any order.
    """
    y_n = targets_n.astype(np.float64)
    weight_n = np.where(y_n > 0, POSITIVE_WEIGHT, 1.0)
    beta_nC, short = np.empty((len(y_n), len(costs))), 0
    beta_n, score_n = np.zeros(len(y_n)), np.zeros(len(y_n))
    for c in np.argsort(costs, kind="stable").tolist():
        beta_n, score_n, reached = _optimum(kernel_nn, y_n, costs[c] * weight_n, beta_n, score_n)
        beta_nC[:, c] = beta_n
        short += not reached
    return beta_nC, short


def _optimum(
    kernel_nn: Floats, y_n: Floats, cost_n: Floats, beta_n: Floats, score_n: Floats
) -> tuple[Floats, Floats, bool]:
    """Coefficients and scores of the optimum, from those of another point, and whether it was reached."""
    inside_n = y_n * score_n < 1
    for _ in range(_STEPS):
        rows_a = np.flatnonzero(inside_n)
        new_n = np.zeros_like(beta_n)
        new_n[rows_a] = _solved(kernel_nn, rows_a, 0.5 / cost_n[rows_a], y_n[rows_a], beta_n[rows_a])
        new_score_n = _times(kernel_nn, new_n)
        now_inside_n = y_n * new_score_n < 1
        if np.array_equal(now_inside_n, inside_n):
            return new_n, new_score_n, True
        share, gain = _line_search(y_n, cost_n, beta_n, score_n, new_n - beta_n, new_score_n - score_n)
        beta_n, score_n = beta_n + share * (new_n - beta_n), score_n + share * (new_score_n - score_n)
        inside_n = y_n * score_n < 1
        objective = beta_n @ score_n / 2 + cost_n @ np.maximum(0, 1 - y_n * score_n) ** 2
        if gain <= _AT_OPTIMUM * objective:  # an image at the margin, in or out of the set by rounding
            return beta_n, score_n, True
    return beta_n, score_n, False


def _line_search(
    y_n: Floats, cost_n: Floats, beta_n: Floats, score_n: Floats, step_n: Floats, change_n: Floats
) -> tuple[float, float]:
    """How much of a Newton step to take, where the objective is least along it, and the slope at its start.

    The objective is convex and quadratic piece by piece; where a whole step overshoots, sets could go round in circles.
    """

    def slope(share: float) -> float:
        hinge_n = np.maximum(0, 1 - y_n * (score_n + share * change_n))
        return float((beta_n + share * step_n) @ change_n - 2 * (cost_n * y_n * hinge_n) @ change_n)

    low, high = 0.0, 1.0
    if slope(high) > 0:
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    else:
        low = high
    return low, -slope(0.0)


def _solved(kernel_nn: Floats, rows_a: NDArray[np.int64], diagonal_a: Floats, y_a: Floats, guess_a: Floats) -> Floats:
    """(K_AA + diagonal) x = y: by conjugate gradients where few iterations do (small costs), else by Cholesky."""
    whole = len(rows_a) == len(kernel_nn)
    kernel_aa = kernel_nn if whole else kernel_nn[np.ix_(rows_a, rows_a)]
    found_a = _iterated(kernel_aa, diagonal_a, y_a, guess_a)
    if found_a is not None:
        return found_a
    matrix_aa = kernel_aa.copy() if whole else kernel_aa
    np.einsum("ii->i", matrix_aa)[:] += diagonal_a
    # Its transpose is the same matrix in the order in which LAPACK may overwrite it.
    factor = cho_factor(matrix_aa.T, lower=True, overwrite_a=True, check_finite=False)
    solution_a: Floats = cho_solve(factor, y_a, check_finite=False)
    return solution_a


def _times(kernel_aa: Floats, vector_a: Floats) -> Floats:
    """The product, of which memory is the bound: by BLAS's routine for symmetric matrices, which reads half of it."""
    product_a: Floats = dsymv(1.0, kernel_aa.T, vector_a, lower=1)  # transposed it is in BLAS's order: not copied
    return product_a


def _iterated(kernel_aa: Floats, diagonal_a: Floats, y_a: Floats, guess_a: Floats) -> Floats | None:
    """The solution by conjugate gradients, scaled by the diagonal; None where a factorisation is quicker."""
    scale_a = 1 / np.sqrt(diagonal_a)  # the system is I + scale K scale then
    right_a = scale_a * y_a
    x_a = guess_a / scale_a
    left_a = right_a - x_a - scale_a * _times(kernel_aa, scale_a * x_a)
    direction_a, squares = left_a.copy(), float(left_a @ left_a)
    bound = _RESIDUAL**2 * float(right_a @ right_a)
    for _ in range(len(y_a) // _PATIENCE):
        if squares <= bound:
            return scale_a * x_a
        image_a = direction_a + scale_a * _times(kernel_aa, scale_a * direction_a)
        length = squares / float(direction_a @ image_a)
        x_a += length * direction_a
        left_a -= length * image_a
        squares, before = float(left_a @ left_a), squares
        direction_a = left_a + squares / before * direction_a
    return None
