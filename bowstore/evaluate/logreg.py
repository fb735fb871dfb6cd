"""L2-regularised logistic regression on frozen features, its strength chosen on a held-out tenth of the train images.

Solved by scipy's L-BFGS, which is scikit-learn's, on a loss that torch computes where the features lie. On a CPU an
iteration costs what scikit-learn's does (1.2 times for 20,000 images of 64 dimensions, 1.5 for 2,000 of 4,096); a GPU
does those that a CPU would need days for.

Legend: N train images, M test images, d feature width, K classes; n images at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from bowstore.evaluate.blocks import blocks
from bowstore.evaluate.linear import accuracy, of_layers, placed, placed_labels
from bowstore.evaluate.protocol import Features, Scores, num_classes
from bowstore.evaluate.protocols.logreg import COSTS
from bowstore.evaluate.splits import a_tenth
from bowstore.evaluate.train_test import ProbeSettings
from bowstore.progress import Progress, say

MAX_ITERATIONS = 1000
TOLERANCE = 1e-4  # of the largest entry of the gradient, over the one at zero weights
_PROGRESS = 64 * np.finfo(float).eps  # scikit-learn's bound: a loss that falls by less, of itself, is at its end
_LINE_SEARCH = 50  # steps, as in scikit-learn
_BLOCK = 4096


@dataclass(frozen=True)
class Fit:
    """A logistic regression.

    Attributes:
        weights_Ke: float64 (K, d + 1), the intercepts last; of features as they were given.
        loss: mean cross-entropy on the images it was fitted to, nats, without the penalty.
        iterations: of L-BFGS.
        converged: whether it reached the tolerance, or the end of what float64 can tell apart.
    """

    weights_Ke: Tensor
    loss: float
    iterations: int
    converged: bool

    @property
    def how(self) -> dict[str, Any]:
        """How it went, for the result file."""
        return {"train_loss": self.loss, "iterations": self.iterations, "converged": self.converged}

    def logits(self, features_nd: Tensor) -> Tensor:
        """Float64 (n, K)."""
        return features_nd.double() @ self.weights_Ke[:, :-1].T + self.weights_Ke[:, -1]


def score(features: Features, settings: ProbeSettings) -> Scores:
    """Logistic regression of the protocol `logreg`, trained on the split "train" and tested once on "test"."""
    train, test, device = features["train"], features["test"], torch.device(features.device)
    assert train.key_hash is not None, "the images lie in shards"
    held_N = a_tenth(train.labels, train.key_hash)
    how: dict[str, Any] = {
        "classes": num_classes(train),
        "standardise": settings.standardise,
        "device": device,
    }
    scores = {
        tap: logistic_regression(train[tap], train.labels, held_N, test[tap], test.labels, what=f"logreg {tap}", **how)
        for tap in train.taps
    }
    fixed = {"costs": list(COSTS), "max_iterations": MAX_ITERATIONS, "tolerance": TOLERANCE, "classes": how["classes"]}
    return of_layers(scores, settings, fixed)


def logistic_regression(
    train_Nd: NDArray[np.float32],
    train_labels_N: NDArray[np.integer],
    held_N: NDArray[np.bool_],
    test_Md: NDArray[np.float32],
    test_labels_M: NDArray[np.integer],
    *,
    classes: int,
    standardise: bool,
    device: torch.device,
    what: str = "logreg",
) -> Scores:
    """Fit with each cost to the train images that are not held out; with the best of them on those to all; test once.

    Of equally good costs the least is taken. The metrics are top1 and, with more than five classes, top5; the details
    hold the sweep, the cost, and of each fit whether it converged.

    Args:
        train_Nd: finite features.
        train_labels_N: integer labels, 0 to K - 1, each of them also where nothing is held out.
        held_N: which train images choose the cost.
        test_Md: finite features.
        test_labels_M: integer labels, 0 to K - 1.
        classes: K.
        standardise: by mean and deviation of all train images.
        device: where the loss is computed.
        what: name of the step in the progress line.
    """
    train_X, test_X = placed(train_Nd, test_Md, device, standardise=standardise)
    train_y, test_y = (placed_labels(labels, device) for labels in (train_labels_N, test_labels_M))
    held, rest = (torch.from_numpy(np.flatnonzero(rows)).to(train_X.device) for rows in (held_N, ~held_N))
    held_X, held_y = train_X[held], train_y[held.to(device)]
    problem = _Problem(train_X, train_y, rest, classes)
    fits: list[Fit] = []
    sweep: list[float] = []
    with Progress(what, len(COSTS) + 1, "fits") as progress:
        for cost in COSTS:
            fits.append(problem.fit(cost, fits[-1] if fits else None))
            sweep.append(accuracy(fits[-1].logits, classes, held_X, held_y)["top1"])
            progress.advance(note=f"C {cost:g}: {100 * sweep[-1]:.1f} %")
        best = int(np.argmax(sweep))
        last = _Problem(train_X, train_y, torch.arange(len(train_X), device=train_X.device), classes).fit(
            COSTS[best], fits[best]
        )
        progress.advance()
    _warn(what, fits, last)
    tried = [{"cost": cost, "top1": top1, **fit.how} for cost, top1, fit in zip(COSTS, sweep, fits, strict=True)]
    details = {"cost": COSTS[best], **last.how, "sweep": tried}
    return Scores(metrics=accuracy(last.logits, classes, test_X, test_y), details=details)


def _warn(what: str, sweep: Sequence[Fit], last: Fit) -> None:
    """Say which fits stopped before their optimum."""
    short = [f"C {cost:g}" for cost, fit in zip(COSTS, sweep, strict=True) if not fit.converged]
    short += [] if last.converged else ["the one on all train images"]
    if short:
        say(
            f"warning: {what}: {len(short)} of {len(sweep) + 1} fits stopped before they converged, after at most "
            f"{MAX_ITERATIONS} iterations ({', '.join(short)}); the result file says which; --standardise needs fewer"
        )


class _Problem:
    """Softmax cross-entropy of some train images, summed, times C, plus half the squared weights (not intercepts).

    Solved in features minus their mean over their size, which is the same problem: the intercept, which is free, takes
    up the mean, and the penalty the size. L-BFGS needs a fraction of the iterations, and its tolerance means the same
    whatever units a network's features come in.
    """

    def __init__(self, X_Nd: Tensor, y_N: Tensor, rows: Tensor, classes: int) -> None:
        """Of some rows of features and labels, whose gradient at zero weights is what others are measured by."""
        self._y, self._images, self._classes = y_N[rows.to(y_N.device)], len(rows), classes
        parts, dims = torch.split(rows, _BLOCK), X_Nd.shape[1]

        def wide(part: Tensor) -> Tensor:
            return X_Nd[part].to(y_N.device, torch.float64)

        self._mean_d = torch.stack([wide(part).sum(dim=0) for part in parts]).sum(dim=0) / len(rows)
        squares = sum((wide(part) - self._mean_d).square().sum().item() for part in parts)
        self._size = (squares / len(rows) / dims) ** 0.5 or 1.0
        self._blocks = blocks(
            lambda part: (wide(rows[part]) - self._mean_d) / self._size,
            *(len(rows), _BLOCK),
            size_bytes=8 * len(rows) * dims,
            device=y_N.device,
        )
        self._zero = np.zeros(classes * (dims + 1))
        self._steepest = float(np.abs(self._loss(self._zero, 0.0)[1]).max())

    def fit(self, cost: float, start: Fit | None) -> Fit:
        """The optimum, or as near as the iterations come, from another one's weights."""
        decay = 1 / (cost * self._images * self._size**2)
        found = minimize(
            self._loss,
            self._zero if start is None else self._inner(start.weights_Ke),
            (decay,),
            method="L-BFGS-B",
            jac=True,
            options={
                "maxiter": MAX_ITERATIONS,
                "maxls": _LINE_SEARCH,
                "gtol": TOLERANCE * self._steepest,
                "ftol": _PROGRESS,
            },
        )
        inner_Ke = self._matrix(found.x)
        penalty = decay / 2 * float(inner_Ke[:, :-1].square().sum())
        return Fit(self._outer(inner_Ke), float(found.fun) - penalty, int(found.nit), bool(found.success))

    def _matrix(self, weights: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(weights.reshape(self._classes, -1)).to(self._y.device)

    def _outer(self, inner_Ke: Tensor) -> Tensor:
        """The weights on features as they were given."""
        weights_Kd = inner_Ke[:, :-1] / self._size
        return torch.cat([weights_Kd, (inner_Ke[:, -1] - weights_Kd @ self._mean_d)[:, None]], dim=1)

    def _inner(self, weights_Ke: Tensor) -> NDArray[np.float64]:
        intercept_K = weights_Ke[:, -1] + weights_Ke[:, :-1] @ self._mean_d
        return torch.cat([weights_Ke[:, :-1] * self._size, intercept_K[:, None]], dim=1).cpu().numpy().ravel()

    def _loss(self, weights: NDArray[np.float64], decay: float) -> tuple[float, NDArray[np.float64]]:
        """Mean cross-entropy plus decay / 2 * |weights|^2, and its gradient; float64, a block of images at a time."""
        W_Ke = self._matrix(weights)
        loss, gradient_Ke = torch.zeros((), dtype=torch.float64, device=W_Ke.device), torch.zeros_like(W_Ke)
        for X_nd, right_n1 in zip(self._blocks(), torch.split(self._y[:, None], _BLOCK), strict=True):
            log_nK = torch.addmm(W_Ke[:, -1], X_nd, W_Ke[:, :-1].T).log_softmax(dim=1)
            loss -= log_nK.gather(1, right_n1).sum()
            error_nK = log_nK.exp_().scatter_add_(1, right_n1, torch.full_like(log_nK[:, :1], -1))
            gradient_Ke[:, :-1] += error_nK.T @ X_nd
            gradient_Ke[:, -1] += error_nK.sum(dim=0)
        loss, gradient_Ke = loss / self._images, gradient_Ke / self._images
        loss += decay / 2 * W_Ke[:, :-1].square().sum()
        gradient_Ke[:, :-1] += decay * W_Ke[:, :-1]
        return loss.item(), gradient_Ke.cpu().numpy().ravel()
