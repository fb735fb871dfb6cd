"""The vocabulary: k-means over a sample of feature vectors (paper, Eq. 2).

Legend: c channels, p dimensions of a word, S sampled vectors, K words.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bowstore.clustering.kmeans import distinct_rows, kmeans
from bowstore.clustering.projection import Projection, fit_projection, project_sample
from bowstore.environment import cores
from bowstore.errors import DataError
from bowstore.words.store.statistics import perplexity

_CACHED_BYTES = 1 << 20  # of a part that the search for NaN looks at twice


@dataclass(frozen=True)
class Vocabulary:
    """Words and how they were made.

    Attributes:
        centroids_Kp: float32.
        projection: applied to the map's vectors; None if there is none, then p = c.
        provenance: plain values: seed, sample, iterations, inertia, refilled and dead words, health.
    """

    centroids_Kp: NDArray[np.float32]
    projection: Projection | None
    provenance: dict[str, Any]


def build_vocabulary(
    sample_Sc: NDArray[np.float32],
    num_words: int,
    *,
    seed: int,
    iterations: int,
    device: torch.device,
    pca: int | None = None,
    whiten: bool = False,
) -> Vocabulary:
    """Cluster a sample into K words, from random vectors of the sample, all of them used.

    Deterministic for a seed on one machine.

    Args:
        sample_Sc: float32 (S, c), of a `bowstore.words.encode.sample`, which has at least K vectors.
        num_words: number of words.
        seed: of the initial words.
        iterations: of Lloyd's algorithm.
        device: where k-means runs.
        pca: principal components that are clustered; None for the vectors themselves.
        whiten: scale the components to unit variance.

    Raises:
        UsageError: more components than vectors.
        DataError: fewer distinct vectors than words, or vectors that are not finite.
    """
    if not _all_finite(sample_Sc):
        raise DataError("the sample of feature vectors holds NaN or infinity; is the teacher trained?")
    projection, about = None, {}
    if pca is not None:
        projection, share = fit_projection(sample_Sc, pca, whiten=whiten)
        sample_Sc, about = project_sample(projection, sample_Sc), {"explained_variance": share}
    distinct = distinct_rows(sample_Sc, num_words)
    if distinct < num_words:
        raise DataError(
            f"the sample's {len(sample_Sc)} feature vectors hold only {distinct} distinct ones, too few for "
            f"K = {num_words} words; is the teacher trained? Choose --K at most {distinct}, or another layer"
        )
    found = kmeans(sample_Sc, num_words, seed=seed, iterations=iterations, device=device)
    return Vocabulary(found.centroids_Kp, projection, {
        "seed": seed,
        "sample": len(sample_Sc),
        "iterations": iterations,
        **about,
        "inertia": found.inertia,
        "inertia_history": found.inertia_history,
        "splits": found.splits,
        "refilled_words": found.refilled,
        "dead_words": int((found.counts_K == 0).sum()),
        "duplicate_words": found.duplicates,
        "perplexity": perplexity(found.counts_K),
        "largest_share": float(found.counts_K.max() / found.counts_K.sum()),
        "kmeans": found.backend,
    })  # fmt: skip


def _all_finite(sample_Sc: NDArray[np.float32]) -> bool:
    """Whether a sample is finite throughout; on all cores, each part checked while it is in their cache."""
    rows = max(1, _CACHED_BYTES // max(1, sample_Sc[:1].nbytes))

    def finite(start: int) -> bool:
        part = sample_Sc[start : start + rows]
        return bool(np.isfinite([part.min(), part.max()]).all())

    with ThreadPoolExecutor(cores()) as pool:
        return all(pool.map(finite, range(0, len(sample_Sc), rows)))
