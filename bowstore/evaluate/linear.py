"""One linear layer trained on features that lie in memory, or are mapped there (paper 4.1.2).

Legend: N training images, M test images, B batch, d feature width, K classes.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bowstore.errors import DataError
from bowstore.evaluate.fitting import TOP, shares
from bowstore.evaluate.protocol import Features, Scores, num_classes
from bowstore.evaluate.protocols.linear import LinearSettings
from bowstore.evaluate.train_test import ProbeSettings
from bowstore.gpu import resident
from bowstore.models.backbone import Backbone
from bowstore.models.pooling import POOLED, Tap, layer_taps
from bowstore.progress import Progress

_SLICE = 8192
_THREADED_MULTIPLICATIONS = 1 << 25  # of a step, from which more than one CPU thread pays


@dataclass(frozen=True)
class LinearConfig:
    """The probe: epochs, lr, its steps and weight decay are the paper's (4.1.2); it is silent on the rest.

    Attributes:
        epochs: passes over the train images.
        lr: learning rate at the start.
        factor: `lr` is multiplied by it every `every_epochs`.
        every_epochs: epochs between two steps of the rate.
        weight_decay: on weights and bias.
        momentum: of SGD.
        nesterov: the kind of momentum.
        batch: images a step; an epoch's last may be smaller.
        seed: of the order of the images.
        standardise: by mean and deviation of the train split.
    """

    epochs: int = 60
    lr: float = 0.1
    factor: float = 0.3
    every_epochs: int = 10
    weight_decay: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = True
    batch: int = 128
    seed: int = 0
    standardise: bool = False


def learning_rate(epoch: int, config: LinearConfig) -> float:
    """Learning rate of an epoch (from 0): lr * factor ** (epoch // every_epochs)."""
    return config.lr * config.factor ** (epoch // config.every_epochs)


def linear_probe(
    train_Nd: NDArray[np.float32],
    train_labels_N: NDArray[np.integer],
    test_Md: NDArray[np.float32],
    test_labels_M: NDArray[np.integer],
    *,
    classes: int,
    config: LinearConfig,
    device: torch.device,
) -> Scores:
    """Train one linear layer with bias by softmax cross-entropy on the train features and test it once.

    Features are finite, labels 0 to K - 1, each of them among the train images. The same inputs, seed and device give
    the same result. On a GPU the features are moved there once when they fit, and batch by batch otherwise. The metrics
    are top1 and, with more than five classes, top5; the details hold the accuracy on the train images and the mean loss
    of each epoch, nats, measured while training.

    Raises:
        DataError: a loss that diverges.
    """
    start = time.monotonic()
    train_X, test_X = placed(train_Nd, test_Md, device, standardise=config.standardise)
    train_y, test_y = (placed_labels(labels, device) for labels in (train_labels_N, test_labels_M))
    layer, losses = _train(train_X, train_y, classes, config)
    metrics, train_top1 = accuracy(layer, classes, test_X, test_y), accuracy(layer, classes, train_X, train_y)["top1"]
    seconds = round(time.monotonic() - start, 3)
    return Scores(metrics=metrics, details={"train_top1": train_top1, "losses": losses, "probe_seconds": seconds})


def taps(backbone: Backbone, settings: ProbeSettings, size: int) -> Mapping[str, Tap]:
    """The pooled output, or the layers that are asked for, each averaged over all places.

    Raises:
        UsageError: a layer that the backbone does not have, or one twice.
    """
    return layer_taps(backbone, settings.layers, size=size, everywhere=True) if settings.layers else POOLED


def score(features: Features, settings: LinearSettings) -> Scores:
    """The probe of the protocol `linear`, trained on the split "train" and tested on "test".

    Raises:
        DataError: as `linear_probe`.
    """
    train, test, device = features["train"], features["test"], torch.device(features.device)
    config = LinearConfig(seed=settings.seed, standardise=settings.standardise)
    how: dict[str, Any] = {"classes": num_classes(train), "config": config, "device": device}
    scores = {tap: linear_probe(train[tap], train.labels, test[tap], test.labels, **how) for tap in train.taps}
    return of_layers(scores, settings, {"probe": asdict(config), "classes": num_classes(train)})


def of_layers(scores: Mapping[str, Scores], settings: ProbeSettings, fixed: Mapping[str, Any]) -> Scores:
    """The scores of each tap as those of a protocol: the pooled output's own, or those of the layers and the best.

    Of layers, the metrics are those of each, `top1_LAYER`, and the best, `top1_best`; details lie under their names.
    """
    if not settings.layers:
        return replace(scores["pooled"], settings=fixed)
    metrics = {f"{name}_{tap}": share for tap, found in scores.items() for name, share in found.metrics.items()}
    best = max(found.metrics["top1"] for found in scores.values())
    details = {tap: found.details for tap, found in scores.items()}
    return Scores(metrics={**metrics, "top1_best": best}, details=details, settings=fixed)


def placed(
    train_Nd: NDArray[np.float32], test_Md: NDArray[np.float32], device: torch.device, *, standardise: bool
) -> tuple[Tensor, Tensor]:
    """Features of both splits, on the device where they fit, standardised by the train split if that is asked for."""
    train_X, test_X = (resident(torch.from_numpy(features), device) for features in (train_Nd, test_Md))
    return standardised(train_X, test_X) if standardise else (train_X, test_X)


def placed_labels(labels_N: NDArray[np.integer], device: torch.device) -> Tensor:
    """Labels (N,), int64, on the device."""
    return torch.from_numpy(labels_N.astype(np.int64)).to(device)


def standardised(train_Nd: Tensor, test_Md: Tensor) -> tuple[Tensor, Tensor]:
    """Both splits minus the train split's mean, over its deviation (population), a dimension at a time.

    A dimension that is constant over the train split becomes 0 there.
    """
    mean_d = train_Nd.mean(dim=0, dtype=torch.float64)
    std_d = (train_Nd - mean_d.to(train_Nd)).square().mean(dim=0, dtype=torch.float64).sqrt()
    std_d = torch.where(std_d > 0, std_d, 1.0)
    mean, std = mean_d.to(train_Nd), std_d.to(train_Nd)
    return (train_Nd - mean) / std, (test_Md - mean) / std


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
                    "take linear/standardised (--standardise)"
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
def accuracy(logits: Callable[[Tensor], Tensor], classes: int, X: Tensor, y: Tensor) -> dict[str, float]:
    """`shares` of images with features X (N, d) and labels y (N,); `logits` (n, K) are of features on y's device."""
    top = min(TOP, classes)
    hits_T = torch.zeros(top, dtype=torch.int64, device=y.device)
    for X_Bd, y_B in zip(torch.split(X, _SLICE), torch.split(y, _SLICE), strict=True):
        ranked_BT = logits(X_Bd.to(y.device)).topk(top, dim=1).indices
        hits_T += (ranked_BT == y_B[:, None]).sum(dim=0)
    return shares(hits_T.cumsum(0).cpu().numpy(), len(y), classes)
