"""What every implementation of Lloyd's iteration offers `kmeans`, and what they share.

Legend: S sampled vectors, p dimensions, K words, U words or vectors that are moved or moved to.
"""

from abc import ABC, abstractmethod

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch import Tensor


class Lloyd(ABC):
    """Centroids and the iteration that moves them.

    Attributes:
        backend: what computes, with its version; kept with the words.
    """

    backend: str

    @abstractmethod
    def step(self) -> tuple[float, int]:
        """Move every centroid to the mean of its vectors.

        Returns:
            The mean squared distance before the move, and how many words without vectors were moved elsewhere.
        """

    @abstractmethod
    def nearest(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Nearest centroid of each vector, int64 (S,), and the squared distances, float32 (S,); by exact search."""

    @abstractmethod
    def centroids(self) -> NDArray[np.float32]:
        """Float32 (K, p)."""

    @abstractmethod
    def put(self, words_U: NDArray[np.int64], vectors_U: NDArray[np.int64]) -> None:
        """Put the given centroids onto vectors of the sample."""


def first_vectors(vectors: int, num_words: int, seed: int) -> NDArray[np.int64]:
    """Rows of the sample where the words start: K random ones, ascending."""
    return np.sort(np.random.default_rng([seed, 2]).choice(vectors, num_words, replace=False))


def far_vectors(
    sample_Sp: NDArray[np.float32] | Tensor, distance_S: NDArray[np.float32], wanted: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Up to U distinct vectors that are no centroid themselves, drawn by their squared distance, as k-means++ draws."""
    if not wanted:
        return np.empty(0, np.int64)
    far = np.flatnonzero(distance_S > 0)
    # The smallest of exponential variables with these rates: draws without replacement, and without sums that saturate.
    order = far[np.argsort(rng.exponential(size=len(far)) / distance_S[far], kind="stable")]
    picked: dict[int, int] = {}
    for vector in order.tolist():
        row = sample_Sp[vector]
        picked.setdefault(identity(row.cpu().numpy() if isinstance(row, Tensor) else row), vector)
        if len(picked) == wanted:
            break
    return np.array(list(picked.values()), dtype=np.int64)


def identity(row: NDArray[np.float32]) -> int:
    """Equal for equal rows, and for others with a chance of 1 in 2^64."""
    return xxhash.xxh3_64_intdigest(row.data)
