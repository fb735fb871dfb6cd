"""The vocabulary: a sample of feature vectors spread over the data set, and k-means over it (paper, Eq. 2).

Legend: N images, B batch, c channels, h w word grid, S sampled vectors, K words.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from bowstore.errors import DataError, UsageError
from bowstore.progress import Progress
from bowstore.words.assign import MAX_WORDS, assign, prepare_words
from bowstore.words.statistics import perplexity

# An image gives at least so many vectors: fewer would mean passing over all of a large set for no better words.
_POSITIONS_PER_IMAGE = 16
_ASSIGN_ROWS = 1 << 16


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
    """Words and how they came about.

    Attributes:
        centroids_Kc: float32.
        provenance: plain values: seed, sample, iterations, inertia, empty and dead words, health.
    """

    centroids_Kc: NDArray[np.float32]
    provenance: dict[str, Any]


def plan_sample(images: int, positions: int, k: int, *, sample_per_word: int, seed: int) -> SamplePlan:
    """Choose images, and how many vectors of each, for K * sample_per_word vectors or all there are.

    Args:
        images: N.
        positions: h * w.
        k: number of words.
        sample_per_word: vectors for each word.
        seed: of the choice.

    Raises:
        UsageError: more words than vectors, than 65535, or a number that is not positive.
    """
    if not 1 <= k <= MAX_WORDS:
        raise UsageError(f"K = {k} words: a store holds from 1 to {MAX_WORDS}; choose --K in that range")
    if sample_per_word < 1:
        raise UsageError(f"sample_per_word = {sample_per_word} must be at least 1")
    there = images * positions
    if k > there:
        raise UsageError(
            f"K = {k} words need as many feature vectors, and {images} images give {there} "
            f"({positions} each); choose --K at most {there}, or encode more images"
        )
    wanted = min(k * sample_per_word, there)
    rng = np.random.default_rng([seed, 0])
    used = min(images, -(-wanted // min(positions, _POSITIONS_PER_IMAGE)))
    rows = np.sort(rng.permutation(images)[:used]).astype(np.int64)
    counts = np.full(used, wanted // used, dtype=np.int64)
    counts[rng.permutation(used)[: wanted % used]] += 1
    return SamplePlan(rows, counts, seed)


def draw_sample(plan: SamplePlan, maps: Iterable[Tensor], shown: bool = True) -> NDArray[np.float32]:
    """Gather the planned vectors, float32 (S, c), at random positions of each map.

    Args:
        plan: the images and counts.
        maps: feature maps (B, c, h, w) of `plan.rows`, in order, in batches of any size.
        shown: whether to show progress.
    """
    rng = np.random.default_rng([plan.seed, 1])
    sample_Sc, filled, done = np.empty((0, 0), np.float32), 0, 0
    with Progress("sample", len(plan.rows), "images", shown=shown) as progress:
        for maps_Bchw in maps:
            batch, channels = maps_Bchw.shape[:2]
            if not filled:
                sample_Sc = np.empty((plan.vectors, channels), np.float32)
            # Drawn image by image, so that the positions do not depend on the batch size.
            order = rng.random((batch, maps_Bchw[0, 0].numel())).argsort(axis=1, kind="stable")
            taken = np.arange(order.shape[1]) < plan.counts[done : done + batch, None]
            image, place = np.nonzero(taken)
            flat_BMc = maps_Bchw.flatten(2).transpose(1, 2)
            device = maps_Bchw.device
            some = flat_BMc[torch.from_numpy(image).to(device), torch.from_numpy(order[image, place]).to(device)]
            sample_Sc[filled : filled + len(some)] = some.cpu().numpy()
            filled, done = filled + len(some), done + batch
            progress.advance(batch)
    assert filled == plan.vectors, f"{filled} of {plan.vectors} vectors came"
    return sample_Sc


def build_vocabulary(
    sample_Sc: NDArray[np.float32],
    k: int,
    *,
    seed: int,
    iterations: int,
    device: torch.device,
    shown: bool = True,
) -> Vocabulary:
    """Cluster a sample into K words with FAISS k-means, from random vectors of the sample.

    Deterministic for a seed on one machine. Empty clusters are refilled by FAISS, which splits large ones.

    Args:
        sample_Sc: float32 (S, c), finite.
        k: number of words.
        seed: of the initial words.
        iterations: of Lloyd's algorithm.
        device: where the health figures are computed; k-means runs there too, if FAISS can.
        shown: whether to show progress.

    Raises:
        UsageError: more words than vectors, or no iteration.
        DataError: fewer distinct vectors than words, or vectors that are not finite.
    """
    if k > len(sample_Sc):
        raise UsageError(f"K = {k} words need as many vectors, the sample has {len(sample_Sc)}; choose a lower --K")
    if iterations < 1:
        raise UsageError(f"iterations = {iterations} must be at least 1")
    if not np.isfinite([sample_Sc.min(), sample_Sc.max()]).all():
        raise DataError("the sample of feature vectors holds NaN or infinity; is the teacher trained?")
    distinct = _distinct(sample_Sc, k)
    if distinct < k:
        raise DataError(
            f"the sample's {len(sample_Sc)} feature vectors hold only {distinct} distinct ones, too few for "
            f"K = {k} words; is the teacher trained? Choose --K at most {distinct}, or another layer"
        )
    centroids_Kc, splits, gpu = _kmeans(sample_Sc, k, seed=seed, iterations=iterations, device=device, shown=shown)
    inertia, counts_K = _fit(sample_Sc, centroids_Kc, device)
    share_K = counts_K / counts_K.sum()
    return Vocabulary(
        centroids_Kc,
        {
            "seed": seed,
            "sample": len(sample_Sc),
            "iterations": iterations,
            "inertia": inertia,
            "splits": splits,
            "empty_words": splits[-1],
            "dead_words": int((counts_K == 0).sum()),
            "duplicate_words": k - _distinct(centroids_Kc, k),
            "perplexity": perplexity(counts_K),
            "largest_share": float(share_K.max()),
            "faiss": f"{faiss.__version__} {'gpu' if gpu else 'cpu'}",
        },
    )


def _kmeans(
    sample_Sc: NDArray[np.float32], k: int, *, seed: int, iterations: int, device: torch.device, shown: bool
) -> tuple[NDArray[np.float32], list[int], bool]:
    """Centroids (K, c), how many clusters FAISS had to refill in each iteration, and whether on a GPU."""
    vectors, channels = sample_Sc.shape
    gpu = device.type == "cuda" and hasattr(faiss, "GpuIndexFlatL2") and faiss.get_num_gpus() > 0
    index: Any
    if gpu:
        resources = faiss.StandardGpuResources()  # has to outlive the index
        index = faiss.GpuIndexFlatL2(resources, channels)
    else:
        index = faiss.IndexFlatL2(channels)
    clustering = faiss.Clustering(channels, k)
    # One iteration a call shows progress; FAISS goes on from the centroids it holds, with the same result.
    clustering.niter = 1
    clustering.seed = seed % 2**31
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, vectors
    splits = []
    with Progress("k-means", iterations, "iterations", shown=shown) as progress:
        for done in range(iterations):
            clustering.train(sample_Sc, index)
            stats: Any = clustering.iteration_stats  # a C++ vector
            step = stats.at(done)
            splits.append(int(step.nsplit))
            progress.advance(note=f"mean squared distance {step.obj / vectors:.6g}")
    return faiss.vector_to_array(clustering.centroids).reshape(k, channels), splits, gpu


def _fit(
    sample_Sc: NDArray[np.float32], centroids_Kc: NDArray[np.float32], device: torch.device
) -> tuple[float, NDArray[np.int64]]:
    """Mean squared distance of the sample to its nearest words, and vectors of each word, int64 (K,)."""
    centroids = torch.from_numpy(centroids_Kc).to(device)
    words, total = prepare_words(centroids), 0.0
    counts_K = np.zeros(len(centroids_Kc), dtype=np.int64)
    for start in range(0, len(sample_Sc), _ASSIGN_ROWS):
        vectors = torch.from_numpy(sample_Sc[start : start + _ASSIGN_ROWS]).to(device)
        ids = assign(vectors, words).long()
        total += float((vectors - centroids[ids]).square_().sum(dtype=torch.float64))
        counts_K += np.bincount(ids.cpu().numpy(), minlength=len(counts_K))
    return total / len(sample_Sc), counts_K


def _distinct(rows: NDArray[np.float32], enough: int) -> int:
    """Number of distinct rows, counted no further than `enough`."""
    seen: set[int] = set()
    for row in np.ascontiguousarray(rows):
        seen.add(xxhash.xxh3_64_intdigest(row.data))
        if len(seen) == enough:
            break
    return len(seen)
