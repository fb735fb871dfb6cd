"""Votes of the nearest train images, against values by hand, a dense formula and scikit-learn."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier

from bowstore.evaluate import neighbours
from bowstore.evaluate.neighbours import knn_accuracy, nearest

CPU = torch.device("cpu")
Labelled = tuple[NDArray[np.float32], NDArray[np.int64]]


def clustered(images: int, classes: int, dims: int, seed: int) -> Labelled:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    centre = np.random.default_rng(99).standard_normal((classes, dims))
    return (0.8 * centre[labels] + rng.standard_normal((images, dims))).astype(np.float32), labels


def accuracy(train: Labelled, test: Labelled, *, k: int, temperature: float = 0.1, classes: int) -> dict[str, float]:
    return knn_accuracy(*train, *test, k=k, temperature=temperature, classes=classes, device=CPU)


def by_dense_formula(train: Labelled, test: Labelled, k: int, temperature: float, classes: int) -> dict[str, float]:
    (X, x), (Y, y) = train, test
    X, Y = (values.astype(float) / np.linalg.norm(values.astype(float), axis=1)[:, None] for values in (X, Y))
    hits = np.zeros((2, len(Y)))
    for n, similarity in enumerate(Y @ X.T):
        votes = [0.0] * classes
        for row in sorted(range(len(X)), key=lambda row: -similarity[row])[:k]:
            votes[x[row]] += math.exp(similarity[row] / temperature)
        ranking = sorted((c for c in range(classes) if votes[c]), key=lambda c: -votes[c])
        hits[:, n] = y[n] == ranking[0], y[n] in ranking[:5]
    return {"top1": hits[0].mean(), "top5": hits[1].mean()}


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (20, 1.0), (150, 0.07), (300, 0.1)])
def test_as_the_dense_formula_gives(monkeypatch: pytest.MonkeyPatch, k: int, temperature: float) -> None:
    train, test = clustered(300, 12, 16, 0), clustered(80, 12, 16, 1)
    expected = by_dense_formula(train, test, k, temperature, 12)
    assert 0.3 < expected["top1"] < 0.9
    assert accuracy(train, test, k=k, temperature=temperature, classes=12) == pytest.approx(expected)
    monkeypatch.setattr(neighbours, "TRAIN_BLOCK", 37)
    monkeypatch.setattr(neighbours, "_TEST_BLOCK", 11)
    assert accuracy(train, test, k=k, temperature=temperature, classes=12) == pytest.approx(expected)


def test_as_scikit_learn_gives() -> None:
    train, test = clustered(400, 4, 8, 2), clustered(100, 4, 8, 3)
    other = KNeighborsClassifier(25, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.2))
    expected = other.fit(*train).score(*test)
    assert accuracy(train, test, k=25, temperature=0.2, classes=4) == {"top1": pytest.approx(expected)}


def test_votes_by_hand() -> None:
    # Cosines with the query (1, 0): 1 of class 0; 0.8 twice of class 1; exp(1/T) against 2 exp(0.8/T).
    train = np.array([[5, 0], [4, 3], [8, -6], [-1, 0]], np.float32), np.array([0, 1, 1, 0])
    test = np.array([[1, 0]], np.float32), np.array([1])
    assert accuracy(train, test, k=3, temperature=0.2, classes=2) == {"top1": 0.0}  # e = 2.7 against 2
    assert accuracy(train, test, k=3, temperature=0.4, classes=2) == {"top1": 1.0}  # 1.6 against 2
    assert accuracy(train, test, k=1, temperature=0.4, classes=2) == {"top1": 0.0}
    assert accuracy(train, test, k=3, temperature=1e-4, classes=2) == {"top1": 0.0}  # exp(10,000) does not overflow


@pytest.mark.parametrize("block", [1, 3, 5, 100])
def test_of_equal_cosines_the_lower_rows_count_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(neighbours, "TRAIN_BLOCK", block)
    train = np.array([[0, 1], [1, 0], [1, 1], [2, 0], [0, 1], [3, 0], [1, 0]], np.float32)
    cosine, rows = nearest(train, np.array([[1, 0], [0, 2]], np.float32), 3, CPU)
    assert rows.tolist() == [[1, 3, 5], [0, 2, 4]]
    assert cosine.tolist() == [[1, 1, 1], [1, pytest.approx(0.5**0.5), 1]]
    assert nearest(np.ones((7, 2), np.float32), np.ones((1, 2), np.float32), 4, CPU)[1].tolist() == [[0, 1, 2, 3]]


def test_of_equal_votes_the_lower_class_counts_and_a_class_without_votes_never_does() -> None:
    train = np.ones((4, 2), np.float32), np.array([3, 1, 3, 1])
    for label, top1, top5 in ((0, 0, 0), (1, 1, 1), (2, 0, 0), (3, 0, 1)):
        test = np.ones((1, 2), np.float32), np.array([label])
        assert accuracy(train, test, k=4, classes=6) == {"top1": top1, "top5": top5}


def test_the_size_of_a_feature_does_not_matter() -> None:
    train, test = clustered(200, 8, 16, 0), clustered(60, 8, 16, 1)
    sizes = 10.0 ** np.random.default_rng(0).integers(-30, 30, (200, 1))
    larger = (train[0] * sizes).astype(np.float32), train[1]
    assert accuracy(larger, test, k=20, classes=8) == accuracy(train, test, k=20, classes=8)
    zeros = np.zeros_like(train[0]), train[1]
    assert 0 <= accuracy(zeros, test, k=20, classes=8)["top1"] <= 1


def test_memory_mapped_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "TRAIN_BLOCK", 64)
    train, test = clustered(200, 8, 16, 0), clustered(60, 8, 16, 1)
    np.save(tmp_path / "train.npy", train[0])
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r"), train[1]
    assert accuracy(mapped, test, k=20, classes=8) == accuracy(train, test, k=20, classes=8)
