"""k-means (paper, Eq. 2): by FAISS's search, or on a GPU over a sample that stays there.

Legend: S sampled vectors, p dimensions, K words.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from bowstore.clustering.lloyd import distinct_rows, put_far
from bowstore.clustering.lloyd_torch import TorchLloyd
from bowstore.progress import Progress

if TYPE_CHECKING:  # with FAISS
    from bowstore.clustering.lloyd_faiss import FaissLloyd, SuperLloyd

Backend = Literal["faiss", "super", "torch"]
Lloyd: TypeAlias = "FaissLloyd | SuperLloyd | TorchLloyd"
_REFILL_ROUNDS = 8  # each costs one more search; iterations refill too, so that one or two are the rule


class Clusters(NamedTuple):
    """What k-means gave.

    Attributes:
        centroids_Kp: float32.
        words_S: int64, the nearest word of each vector of the sample.
        counts_K: int64, sampled vectors nearest to each word.
        inertia: mean squared distance of the sample to its nearest words.
        inertia_history: the same before each iteration's move.
        splits: words that ran empty and were moved, by iteration; FAISS splits large clusters for them.
        refilled: words that were dead or copies at the end and were moved.
        duplicates: words that are still copies of others.
        backend: what computed it.
    """

    centroids_Kp: NDArray[np.float32]
    words_S: NDArray[np.int64]
    counts_K: NDArray[np.int64]
    inertia: float
    inertia_history: list[float]
    splits: list[int]
    refilled: int
    duplicates: int
    backend: str


def kmeans(
    sample_Sp: NDArray[np.float32],
    num_words: int,
    *,
    seed: int,
    iterations: int,
    device: torch.device,
    backend: Backend | None = None,
) -> Clusters:
    """Cluster a sample into K words, starting from random vectors of it.

    Words that nothing is nearest to, and copies, are put onto vectors and iterated again, until every word is used.
    Deterministic for a seed and a backend on one kind of machine, whatever the number of cores.

    Args:
        sample_Sp: float32 (S, p), finite, with at least K distinct vectors.
        num_words: number of words.
        seed: of the initial words, and of where dead ones are moved to.
        iterations: of Lloyd's algorithm; each refill adds one.
        device: where it runs.
        backend: None for `default_backend`.
    """
    backend = backend or default_backend(sample_Sp.shape, num_words, device)
    lloyd = make_lloyd(backend, sample_Sp, num_words, seed, device)
    history, splits = [], []
    with Progress("k-means", iterations, "iterations") as progress:
        for _ in range(iterations):
            inertia, split = lloyd.step()
            history.append(inertia)
            splits.append(split)
            progress.advance(note=f"mean squared distance {inertia:.6g}")
    word_S, distance_S, refilled = _refill(lloyd, sample_Sp, num_words, seed)
    centroids_Kp = lloyd.centroids()
    return Clusters(
        centroids_Kp=centroids_Kp,
        words_S=word_S,
        counts_K=np.bincount(word_S, minlength=num_words),
        inertia=float(distance_S.mean(dtype=np.float64)),
        inertia_history=history,
        splits=splits,
        refilled=refilled,
        duplicates=num_words - len(distinct_rows(centroids_Kp, num_words)),
        backend=lloyd.backend,
    )


def default_backend(shape: tuple[int, int], num_words: int, device: torch.device) -> Backend:
    """For a sample (S, p): torch on a GPU, and where there is no FAISS; else FAISS.

    That is the search of its SuperKMeans, where K and p are large.
    """
    if device.type == "cuda" or find_spec("faiss") is None:
        return "torch"
    from bowstore.clustering.lloyd_faiss import SuperLloyd  # FAISS

    return "super" if SuperLloyd.suits(num_words, shape[1]) else "faiss"


def make_lloyd(
    backend: Backend, sample_Sp: NDArray[np.float32], num_words: int, seed: int, device: torch.device
) -> Lloyd:
    """Lloyd's iteration of one backend, before its first step; that of FAISS runs on a CPU."""
    if backend == "torch":
        return TorchLloyd(sample_Sp, num_words, seed, device)
    from bowstore.clustering.lloyd_faiss import FaissLloyd, SuperLloyd  # FAISS

    return (SuperLloyd if backend == "super" else FaissLloyd)(sample_Sp, num_words, seed)


def _refill(
    lloyd: Lloyd, sample_Sp: NDArray[np.float32], num_words: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], int]:
    """Move useless words until there are none; the last assignment, its squared distances, and how many were moved."""
    rng, refilled = np.random.default_rng([seed, 3]), 0
    word_S, distance_S = lloyd.nearest()
    for _ in range(_REFILL_ROUNDS):
        counts_K = np.bincount(word_S, minlength=num_words)
        useful = [word for word in distinct_rows(lloyd.centroids(), num_words) if counts_K[word]]
        useless_U = np.setdiff1d(np.arange(num_words), useful)
        if not (moved := put_far(lloyd.put, useless_U, sample_Sp, distance_S, rng)):
            break
        lloyd.step()
        refilled += moved
        word_S, distance_S = lloyd.nearest()
    return word_S, distance_S, refilled
