"""What the ways of Lloyd's iteration share: where words start, and where useless ones go.

Each way (lloyd_faiss.py, lloyd_torch.py) is a class with four methods, which `kmeans` calls:

    step()                        move every centroid to the mean of its vectors; gives the mean squared distance before
                                  the move, and how many words without vectors were moved elsewhere
    nearest()                     each vector's word, int64 (S,), and squared distance, float32 (S,), by exact search
    centroids()                   float32 (K, p)
    put(words_U, vectors_U)       put these words onto these vectors of the sample

Legend: S sampled vectors, p dimensions, K words, U words or vectors that are moved or moved to.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor


def first_vectors(vectors: int, num_words: int, seed: int) -> NDArray[np.int64]:
    """Rows of the sample where the words start: K random ones, ascending."""
    return np.sort(np.random.default_rng([seed, 2]).choice(vectors, num_words, replace=False))


def put_far(
    put: Callable[[NDArray[np.int64], NDArray[np.int64]], None],
    words_U: NDArray[np.int64],
    sample_Sp: NDArray[np.float32] | Tensor,
    distance_S: NDArray[np.float32],
    rng: np.random.Generator,
) -> int:
    """Put words onto distinct vectors that are no centroid themselves; how many, as there may be fewer such vectors.

    They are drawn by their squared distance, as k-means++ draws.
    """
    if not len(words_U):
        return 0
    far = np.flatnonzero(distance_S > 0)
    # The smallest of exponential variables with these rates: draws without replacement, and without sums that saturate.
    order = far[np.argsort(rng.exponential(size=len(far)) / distance_S[far], kind="stable")]
    rows = (torch.as_tensor(sample_Sp[vector]).cpu().numpy() for vector in order)
    vectors_U = order[distinct_rows(rows, len(words_U))]
    put(words_U[: len(vectors_U)], vectors_U)
    return len(vectors_U)


def distinct_rows(rows: Iterable[NDArray[np.float32]], enough: int) -> list[int]:
    """Places of distinct rows, each the first of its equals, up to `enough`; an unequal row is missed once in 2^64."""
    seen: dict[int, int] = {}
    for place, row in enumerate(rows):
        seen.setdefault(xxhash.xxh3_64_intdigest(np.ascontiguousarray(row).data), place)
        if len(seen) == enough:
            break
    return list(seen.values())
