"""The vocabulary: a sample of feature vectors spread over the data set, and k-means over it (paper, Eq. 2).

Legend: N images, B batch, c channels, p dimensions of a word, h w word grid, S sampled vectors, K words.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.clustering.kmeans import distinct_rows, kmeans
from bowstore.clustering.projection import Projection, fit_projection, project_sample
from bowstore.environment import cores
from bowstore.errors import DataError
from bowstore.words.store.statistics import perplexity

# An image gives at least this many vectors: fewer would mean a pass over all of a large set for no better words.
_POSITIONS_PER_IMAGE = 16
_CACHED_BYTES = 1 << 20  # of a part that the search for NaN looks at twice


@dataclass(frozen=True)
class SamplePlan:
    """Which vectors to sample: a pure function of (N, h w, K, sample_per_word, seed).

    Attributes:
        rows: int64, ascending, the images to look at.
        counts: int64, vectors to take of each.
        seed: of the positions.
    """

    rows: NDArray[np.int64]
    counts: NDArray[np.int64]
    seed: int

    @property
    def vectors(self) -> int:
        """S."""
        return int(self.counts.sum())


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


def plan_sample(images: int, positions: int, num_words: int, *, sample_per_word: int, seed: int) -> SamplePlan:
    """Choose images, and how many vectors of each, for K * sample_per_word vectors or all there are, at least K.

    Args:
        images: N.
        positions: h * w.
        num_words: number of words.
        sample_per_word: vectors for each word.
        seed: of the choice.
    """
    there = images * positions
    wanted = min(num_words * sample_per_word, there)
    rng = np.random.default_rng([seed, 0])
    used = min(images, -(-wanted // min(positions, _POSITIONS_PER_IMAGE)))
    rows = np.sort(rng.permutation(images)[:used]).astype(np.int64)
    counts = np.full(used, wanted // used, dtype=np.int64)
    counts[rng.permutation(used)[: wanted % used]] += 1
    return SamplePlan(rows, counts, seed)


class Sample:
    """The planned vectors of one layer, gathered as the maps of their images arrive."""

    def __init__(self, plan: SamplePlan, channels: int) -> None:
        self._plan = plan
        self._rng = np.random.default_rng([plan.seed, 1])
        self._vectors_Sc = np.empty((plan.vectors, channels), np.float32)
        self._filled = self._done = 0

    def add(self, rows_B: NDArray[np.int64], maps_Bchw: Tensor) -> None:
        """Take the vectors of a batch at random positions of each map.

        Args:
            rows_B: int64, ascending over all calls; rows that are not planned are skipped.
            maps_Bchw: their maps.
        """
        planned = np.flatnonzero(np.isin(rows_B, self._plan.rows, assume_unique=True))
        if not len(planned):
            return
        maps_Bchw = maps_Bchw[torch.from_numpy(planned).to(maps_Bchw.device)]
        batch, device = len(planned), maps_Bchw.device
        # Drawn image by image, so that the positions do not depend on the batch size.
        order = self._rng.random((batch, maps_Bchw[0, 0].numel())).argsort(axis=1, kind="stable")
        taken = np.arange(order.shape[1]) < self._plan.counts[self._done : self._done + batch, None]
        image, place = np.nonzero(taken)
        flat_BMc = maps_Bchw.flatten(2).transpose(1, 2)
        some = flat_BMc[torch.from_numpy(image).to(device), torch.from_numpy(order[image, place]).to(device)]
        self._vectors_Sc[self._filled : self._filled + len(some)] = some.cpu().numpy()
        self._filled, self._done = self._filled + len(some), self._done + batch

    def vectors(self) -> NDArray[np.float32]:
        """The sample, float32 (S, c), once all planned images have been seen."""
        assert self._filled == self._plan.vectors, f"{self._filled} of {self._plan.vectors} vectors came"
        return self._vectors_Sc


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
        sample_Sc: float32 (S, c), of a `plan_sample`, which has at least K vectors.
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
