"""A protocol on features: each test image gets the class whose mean of train features is nearest.

Legend: N images, K classes, d width of a feature.
"""

import numpy as np

from bowstore.evaluate.protocol import Features, Kind, Protocol, Scores
from bowstore.evaluate.train_test import TrainTestSettings, open_train_test, resolve_train_test


class ClassMeansSettings(TrainTestSettings):
    """What a user sets: which images, and whether only directions count."""

    cosine: bool = False


def describe(settings: ClassMeansSettings) -> Protocol:
    """Id and version; all that changes what the numbers mean is in the id."""
    name = "class-means/cosine" if settings.cosine else "class-means/euclidean"
    return Protocol(
        id=f"{name}-held-out" if settings.held_out else name,
        version=1,
        description="the class with the nearest mean of pooled train features",
        headline="top1",
    )


def score(features: Features, settings: ClassMeansSettings) -> Scores:
    """Metrics of features that were taken, once for all protocols, with their labels."""
    train, test = features["train"], features["test"]
    train_Nd, test_Nd = (_scaled(split["pooled"], settings.cosine) for split in (train, test))
    mean_Kd = np.stack([train_Nd[train.labels == k].mean(axis=0) for k in range(len(train.classes))])
    distance_NK = np.square(test_Nd[:, None] - mean_Kd).sum(axis=2)
    correct_N = distance_NK.argmin(axis=1) == test.labels
    by_class = {name: float(correct_N[test.labels == k].mean()) for k, name in enumerate(test.classes)}
    return Scores(metrics={"top1": float(correct_N.mean())}, details={"by_class": by_class})


def _scaled(features_Nd: np.ndarray, cosine: bool) -> np.ndarray:
    return features_Nd / np.linalg.norm(features_Nd, axis=1, keepdims=True) if cosine else features_Nd


KIND = Kind(
    name="class-means",
    help="Nearest class mean on frozen pooled features.",
    settings=ClassMeansSettings,
    describe=describe,
    resolve=resolve_train_test,
    data=open_train_test,
    score=score,
)
