"""What the ways of Lloyd's iteration share: where words start, and where useless ones go.

Each way (lloyd_faiss.py, lloyd_torch.py) is a class with four methods, which `kmeans` calls:

    step()                        move every centroid to the mean of its vectors; gives the mean squared distance before
                                  the move, and how many words without vectors were moved elsewhere
    nearest()                     each vector's word, int64 (S,), and squared distance, float32 (S,), by exact search
    centroids()                   float32 (K, p)
    put(words_U, vectors_U)       put these words onto these vectors of the sample

Legend: S sampled vectors, p dimensions, K words, U words or vectors that are moved or moved to.
"""

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor


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
        picked.setdefault(identity(torch.as_tensor(sample_Sp[vector]).cpu().numpy()), vector)
        if len(picked) == wanted:
            break
    return np.array(list(picked.values()), dtype=np.int64)


def identity(row: NDArray[np.float32]) -> int:
    """Equal for equal rows, and for others with a chance of 1 in 2^64."""
    return xxhash.xxh3_64_intdigest(row.data)
