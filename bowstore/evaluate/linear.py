"""One linear layer trained on features that lie in memory, or are mapped there (paper 4.1.2).

Legend: N training images, M test images, B batch, d feature width, K classes.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from bowstore.config import Strict, dump
from bowstore.environment import choose_device
from bowstore.errors import DataError
from bowstore.evaluate.protocol import Features, Scores
from bowstore.evaluate.protocols.linear import LinearSettings
from bowstore.evaluate.splits import check_classes, check_labels
from bowstore.gpu import free_memory
from bowstore.progress import Progress

_TOP = 5
_SLICE = 8192
_THREADED_MULTIPLICATIONS = 1 << 25  # of a step, from which more than one CPU thread pays
_GPU_SHARE = 0.8  # of the free memory that features may take


class LinearConfig(Strict):
    """The probe: epochs, lr, its steps and weight decay are the paper's (4.1.2); it is silent on the rest."""

    epochs: int = Field(default=60, ge=1)
    lr: float = Field(default=0.1, gt=0)
    factor: float = Field(default=0.3, gt=0, le=1, description="lr is multiplied by it every `every_epochs`")
    every_epochs: int = Field(default=10, ge=1)
    weight_decay: float = Field(default=1e-3, ge=0, description="on weights and bias")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="paper silent")
    nesterov: bool = Field(default=True, description="paper silent")
    batch: int = Field(default=128, ge=1, description="paper silent; an epoch's last may be smaller")
    seed: int = Field(default=0, ge=0, lt=2**32, description="order of the images")
    standardise: bool = Field(default=False, description="by mean and deviation of the train split")

    @model_validator(mode="after")
    def _momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0; set nesterov: false")
        return self


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """What a probe gives.

    Attributes:
        accuracy_top1: share of test images, 0 to 1.
        accuracy_top5: the same for the five best classes; None with five classes or fewer.
        train_accuracy_top1: share of training images, 0 to 1.
        losses: mean training cross-entropy of each epoch, nats, measured while training.
        classes: K.
        seconds: wall clock of training and testing.
    """

    accuracy_top1: float
    accuracy_top5: float | None
    train_accuracy_top1: float
    losses: tuple[float, ...]
    classes: int
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """The accuracies as a result file names them."""
        top5 = {} if self.accuracy_top5 is None else {"top5": self.accuracy_top5}
        return {"top1": self.accuracy_top1, **top5}

    @property
    def details(self) -> dict[str, Any]:
        """What else a result file keeps."""
        return {
            "train_top1": self.train_accuracy_top1,
            "losses": list(self.losses),
            "probe_seconds": round(self.seconds, 3),
        }


def learning_rate(epoch: int, config: LinearConfig) -> float:
    """Learning rate of an epoch (from 0): lr * factor ** (epoch // every_epochs)."""
    return config.lr * config.factor ** (epoch // config.every_epochs)


def linear_probe(
    train_Nd: NDArray[np.float32],
    train_labels_N: NDArray[np.integer],
    test_Md: NDArray[np.float32],
    test_labels_M: NDArray[np.integer],
    *,
    config: LinearConfig | None = None,
    classes: int | None = None,
    device: torch.device | None = None,
) -> LinearResult:
    """Train one linear layer with bias by softmax cross-entropy on the train features and test it once.

    The same inputs, seed and device give the same result. On a GPU the features are moved there once when
    they fit, and batch by batch otherwise.

    Args:
        train_Nd: float32 features.
        train_labels_N: integer labels, 0 to K - 1.
        test_Md: float32 features.
        test_labels_M: integer labels.
        config: the probe; None for the paper's.
        classes: K; None for the largest training label plus one.
        device: where to train; None for the GPU where there is one.

    Raises:
        DataError: shapes that do not fit, NaN or infinity, missing labels, a class without training images,
            test labels outside the classes, fewer than two classes, or a loss that diverges.
    """
    config, device = config or LinearConfig(), device or choose_device("auto")
    _check_split("train", train_Nd, train_labels_N)
    _check_split("test", test_Md, test_labels_M)
    if train_Nd.shape[1] != test_Md.shape[1]:
        raise DataError(f"train features have {train_Nd.shape[1]} dimensions, test features {test_Md.shape[1]}")
    classes = check_classes(train_labels_N, test_labels_M, classes)

    start = time.monotonic()
    train_X, test_X = (_resident(torch.from_numpy(features), device) for features in (train_Nd, test_Md))
    if config.standardise:
        train_X, test_X = standardised(train_X, test_X)
    train_y, test_y = (
        torch.from_numpy(labels.astype(np.int64)).to(device) for labels in (train_labels_N, test_labels_M)
    )
    layer, losses = _train(train_X, train_y, classes, config)
    top1, top5 = _accuracy(layer, test_X, test_y)
    return LinearResult(
        accuracy_top1=top1,
        accuracy_top5=top5,
        train_accuracy_top1=_accuracy(layer, train_X, train_y)[0],
        losses=tuple(losses),
        classes=classes,
        seconds=time.monotonic() - start,
    )


def score(features: Features, settings: LinearSettings) -> Scores:
    """The probe of the protocol `linear`, trained on the split "train" and tested on "test".

    Raises:
        DataError: as `linear_probe`.
    """
    train, test = features["train"], features["test"]
    config = LinearConfig(seed=settings.seed, standardise=settings.standardise)
    probe = linear_probe(
        train["pooled"],
        train.labels,
        test["pooled"],
        test.labels,
        config=config,
        classes=len(train.classes) or None,
        device=torch.device(features.device),
    )
    return Scores(
        metrics=probe.metrics, details=probe.details, settings={"probe": dump(config), "classes": probe.classes}
    )


def standardised(train_Nd: Tensor, test_Md: Tensor) -> tuple[Tensor, Tensor]:
    """Both splits minus the train split's mean, over its deviation (population), a dimension at a time.

    A dimension that is constant over the train split becomes 0 there.
    """
    mean_d = train_Nd.mean(dim=0, dtype=torch.float64)
    std_d = (train_Nd - mean_d.to(train_Nd)).square().mean(dim=0, dtype=torch.float64).sqrt()
    std_d = torch.where(std_d > 0, std_d, 1.0)
    mean, std = mean_d.to(train_Nd), std_d.to(train_Nd)
    return (train_Nd - mean) / std, (test_Md - mean) / std


def _resident(features: Tensor, device: torch.device) -> Tensor:
    """The features on the GPU when a good part of its free memory holds them, else where they are."""
    if device.type != "cuda":
        return features
    return features.to(device) if features.nbytes < _GPU_SHARE * free_memory(device) else features


@contextmanager
def _cpu_threads(device: torch.device, multiplications: int) -> Iterator[None]:
    """One thread for small steps on the CPU: starting and joining threads would take most of the time."""
    threads = torch.get_num_threads()
    if device.type == "cpu" and multiplications < _THREADED_MULTIPLICATIONS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(train_X: Tensor, train_y: Tensor, classes: int, config: LinearConfig) -> tuple[nn.Linear, list[float]]:
    """SGD from zero weights: the problem is convex, so that no random start is needed."""
    device = train_y.device
    layer = nn.Linear(train_X.shape[1], classes, device=device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(
        layer.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    generator = torch.Generator().manual_seed(config.seed)
    losses: list[float] = []
    step = config.batch * train_X.shape[1] * classes
    with _cpu_threads(device, step), Progress("linear probe", config.epochs, "epochs") as progress:
        for epoch in range(config.epochs):
            optimizer.param_groups[0]["lr"] = learning_rate(epoch, config)
            order_N = torch.randperm(len(train_X), generator=generator).to(train_X.device)
            loss = _epoch(layer, optimizer, train_X, train_y, torch.split(order_N, config.batch))
            if not np.isfinite(loss):
                raise DataError(
                    f"the probe's loss is {loss} in epoch {epoch + 1} of {config.epochs} at lr {config.lr}: "
                    f"features up to {train_X.abs().max().item():.3g} are too large for it; "
                    "use linear/standardised or a lower lr"
                )
            losses.append(loss)
            progress.advance(note=f"loss {loss:.3f}")
    return layer, losses


def _epoch(
    layer: nn.Linear,
    optimizer: torch.optim.SGD,
    train_X: Tensor,
    train_y: Tensor,
    batches: tuple[Tensor, ...],
) -> float:
    """One pass; the mean loss. The host waits for the device once, at the end."""
    total = torch.zeros((), device=train_y.device)
    for rows_B in batches:
        X_Bd, y_B = train_X[rows_B].to(train_y.device), train_y[rows_B.to(train_y.device)]
        loss = F.cross_entropy(layer(X_Bd), y_B)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach() * len(rows_B)
    return (total / len(train_y)).item()


@torch.no_grad()
def _accuracy(layer: nn.Linear, X: Tensor, y: Tensor) -> tuple[float, float | None]:
    """Top-1 and, with more than five classes, top-5 accuracy."""
    top = min(_TOP, layer.out_features)
    hits = torch.zeros(top, dtype=torch.int64, device=y.device)
    for X_Bd, y_B in zip(torch.split(X, _SLICE), torch.split(y, _SLICE), strict=True):
        ranked_BT = layer(X_Bd.to(y.device)).topk(top, dim=1).indices
        hits += (ranked_BT == y_B[:, None]).sum(dim=0)
    shares = (hits.cumsum(0).double() / len(y)).tolist()
    return shares[0], shares[-1] if layer.out_features > _TOP else None


def _check_split(split: str, features: NDArray[np.float32], labels: NDArray[np.integer]) -> None:
    if features.ndim != 2 or len(features) != len(labels) or len(labels) == 0:
        raise DataError(
            f"{split}: features of shape {features.shape} and {len(labels)} labels; need (images, d) and one label each"
        )
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise DataError(
            f"{split}: NaN or infinity in the features of {len(bad)} of {len(features)} images "
            f"(first: row {bad[0]}); check the weights and the normalisation"
        )
    check_labels(split, labels)
