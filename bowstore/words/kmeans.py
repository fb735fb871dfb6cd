"""k-means (paper, Eq. 2): FAISS, or on a GPU a Lloyd iteration of our own over a resident sample.

Words that no vector of the sample is nearest to, and copies of others, are put onto vectors of the sample and moved on,
until every word is used.

Legend: S sampled vectors, p dimensions, K words.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import faiss
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from bowstore.environment import cores
from bowstore.progress import Progress
from bowstore.words.assign import assign, prepare_words

Backend = Literal["faiss", "torch"]
_REFILL_ROUNDS = 20
_ROWS = 1 << 16  # vectors whose distances are looked at together
_ROOM = 1.5  # a sample is kept on a GPU if its memory has this much more than the sample takes


class Clusters(NamedTuple):
    """What k-means gave.

    Attributes:
        centroids_Kp: float32.
        counts_K: int64, sampled vectors nearest to each word.
        inertia: mean squared distance of the sample to its nearest words.
        inertia_history: the same before each iteration's move.
        splits: clusters that ran empty and were split off large ones, by iteration (FAISS).
        refilled: words that were dead or copies at the end and were put elsewhere.
        duplicates: words that are copies of others all the same.
        backend: what computed it.
    """

    centroids_Kp: NDArray[np.float32]
    counts_K: NDArray[np.int64]
    inertia: float
    inertia_history: list[float]
    splits: list[int]
    refilled: int
    duplicates: int
    backend: str


class Lloyd(ABC):
    """Centroids and the iteration that moves them."""

    name: ClassVar[str]

    @abstractmethod
    def step(self) -> tuple[float, int]:
        """Move every centroid to the mean of its vectors; the mean squared distance before, and clusters split."""

    @abstractmethod
    def nearest(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Nearest centroid of each vector, int64 (S,), and the squared distances, float32 (S,)."""

    @abstractmethod
    def centroids(self) -> NDArray[np.float32]:
        """Float32 (K, p)."""

    @abstractmethod
    def put(self, words_U: NDArray[np.int64], vectors_U: NDArray[np.int64]) -> None:
        """Put the given centroids onto vectors of the sample."""


class FaissLloyd(Lloyd):
    """FAISS's k-means, on all cores of the machine or on a GPU; the result is the same for any number of threads."""

    name = "faiss"

    def __init__(self, sample_Sp: NDArray[np.float32], k: int, seed: int, device: torch.device) -> None:
        vectors, dimensions = sample_Sp.shape
        self._sample = sample_Sp
        gpu = device.type == "cuda" and hasattr(faiss, "GpuIndexFlatL2") and faiss.get_num_gpus() > 0
        # torchrun leaves a process one thread; while one makes the vocabulary, the others wait.
        faiss.omp_set_num_threads(cores())
        self._index: Any
        if gpu:
            self._resources = faiss.StandardGpuResources()  # has to outlive the index
            config = faiss.GpuIndexFlatConfig()
            config.device = device.index or 0
            self._index = faiss.GpuIndexFlatL2(self._resources, dimensions, config)
        else:
            self._index = faiss.IndexFlatL2(dimensions)
        self.backend = f"faiss {faiss.__version__} {'gpu' if gpu else 'cpu'}"
        # One iteration a call shows progress; FAISS goes on from the centroids it holds, with the same result.
        self._clustering = faiss.Clustering(dimensions, k)
        self._clustering.niter = 1
        self._clustering.seed = seed % 2**31
        self._clustering.min_points_per_centroid, self._clustering.max_points_per_centroid = 1, vectors
        self._done = 0

    def step(self) -> tuple[float, int]:
        """One call of FAISS with one iteration."""
        self._clustering.train(self._sample, self._index)
        stats: Any = self._clustering.iteration_stats  # a C++ vector
        last = stats.at(self._done)
        self._done += 1
        return float(last.obj) / len(self._sample), int(last.nsplit)

    def nearest(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """FAISS's exhaustive search."""
        self._index.reset()
        self._index.add(self.centroids())
        distance_S, word_S = self._index.search(self._sample, 1)
        return word_S[:, 0], np.maximum(distance_S[:, 0], 0)

    def centroids(self) -> NDArray[np.float32]:
        """Those that FAISS holds."""
        flat: NDArray[np.float32] = faiss.vector_to_array(self._clustering.centroids)
        return flat.reshape(-1, self._sample.shape[1])

    def put(self, words_U: NDArray[np.int64], vectors_U: NDArray[np.int64]) -> None:
        """FAISS starts from what it holds."""
        centroids_Kp = self.centroids()
        centroids_Kp[words_U] = self._sample[vectors_U]
        faiss.copy_array_to_vector(centroids_Kp.ravel(), self._clustering.centroids)


class TorchLloyd(Lloyd):
    """The whole sample on the device, assigned by `assign`, with sums in a fixed order.

    On a GPU this spares FAISS's float32 products outside tensor cores and its transfer of the sample in each iteration.
    """

    name = "torch"

    def __init__(self, sample_Sp: NDArray[np.float32], k: int, seed: int, device: torch.device) -> None:
        self._sample_Sp = torch.from_numpy(sample_Sp).to(device)
        first = np.random.default_rng([seed, 2]).choice(len(sample_Sp), k, replace=False)
        self._centroids_Kp = self._sample_Sp[torch.from_numpy(np.sort(first)).to(device)]
        self.backend = f"torch {torch.__version__} {device.type}"

    def step(self) -> tuple[float, int]:
        """Assign, sum by word in a fixed order, divide; a word without vectors stays where it is."""
        words = prepare_words(self._centroids_Kp)
        sums_Kp, counts_K = torch.zeros_like(self._centroids_Kp), torch.zeros_like(self._centroids_Kp[:, 0])
        total = 0.0
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            for part_Bp in torch.split(self._sample_Sp, _ROWS):
                ids_B = assign(part_Bp, words).long()
                total += float((part_Bp - self._centroids_Kp[ids_B]).square_().sum(dtype=torch.float64))
                sums_Kp.index_put_((ids_B,), part_Bp, accumulate=True)
                counts_K.index_put_((ids_B,), torch.ones_like(part_Bp[:, 0]), accumulate=True)
        finally:
            torch.use_deterministic_algorithms(deterministic)
        used_K1 = (counts_K > 0)[:, None]
        self._centroids_Kp = torch.where(used_K1, sums_Kp / counts_K.clamp(min=1)[:, None], self._centroids_Kp)
        return total / len(self._sample_Sp), 0

    def nearest(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """By `assign`; distances from the differences themselves."""
        words, found, distances = prepare_words(self._centroids_Kp), [], []
        for part_Bp in torch.split(self._sample_Sp, _ROWS):
            ids_B = assign(part_Bp, words).long()
            found.append(ids_B.cpu().numpy())
            distances.append((part_Bp - self._centroids_Kp[ids_B]).square_().sum(dim=1).cpu().numpy())
        return np.concatenate(found), np.concatenate(distances)

    def centroids(self) -> NDArray[np.float32]:
        """From the device."""
        centroids_Kp: NDArray[np.float32] = self._centroids_Kp.cpu().numpy()
        return centroids_Kp

    def put(self, words_U: NDArray[np.int64], vectors_U: NDArray[np.int64]) -> None:
        """On the device."""
        device = self._sample_Sp.device
        vectors = self._sample_Sp[torch.from_numpy(vectors_U).to(device)]
        self._centroids_Kp[torch.from_numpy(words_U).to(device)] = vectors


def kmeans(
    sample_Sp: NDArray[np.float32],
    k: int,
    *,
    seed: int,
    iterations: int,
    device: torch.device,
    backend: Backend | None = None,
    shown: bool = True,
) -> Clusters:
    """Cluster a sample into K words, from random vectors of it, and refill words that nothing is nearest to.

    Deterministic for a seed and a backend on one kind of machine.

    Args:
        sample_Sp: float32 (S, p), finite, with at least K distinct vectors.
        k: number of words.
        seed: of the initial words, and of what dead ones are put onto.
        iterations: of Lloyd's algorithm; each refill adds one.
        device: where it runs.
        backend: None for torch on a GPU whose memory holds the sample, else FAISS.
        shown: whether to show progress.
    """
    kind = TorchLloyd if (backend or default_backend(sample_Sp, device)) == "torch" else FaissLloyd
    lloyd = kind(sample_Sp, k, seed, device)
    history, splits = [], []
    with Progress("k-means", iterations, "iterations", shown=shown) as progress:
        for _ in range(iterations):
            inertia, split = lloyd.step()
            history.append(inertia)
            splits.append(split)
            progress.advance(note=f"mean squared distance {inertia:.6g}")
    word_S, distance_S, refilled = _refill(lloyd, sample_Sp, k, seed)
    centroids_Kp = lloyd.centroids()
    return Clusters(
        centroids_Kp=centroids_Kp,
        counts_K=np.bincount(word_S, minlength=k),
        inertia=float(distance_S.mean(dtype=np.float64)),
        inertia_history=history,
        splits=splits,
        refilled=refilled,
        duplicates=k - distinct_rows(centroids_Kp, k),
        backend=lloyd.backend,
    )


def default_backend(sample_Sp: NDArray[np.float32], device: torch.device) -> Backend:
    """Torch on a GPU whose free memory holds the sample and then some; FAISS everywhere else."""
    if device.type != "cuda":
        return "faiss"
    return "torch" if _ROOM * sample_Sp.nbytes < torch.cuda.mem_get_info(device)[0] else "faiss"


def distinct_rows(rows: NDArray[np.float32], enough: int) -> int:
    """Number of distinct rows, counted no further than `enough`."""
    seen: set[int] = set()
    for row in np.ascontiguousarray(rows):
        seen.add(_identity(row))
        if len(seen) == enough:
            break
    return len(seen)


def _refill(
    lloyd: Lloyd, sample_Sp: NDArray[np.float32], k: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], int]:
    """Move useless words until there are none; the last assignment, its squared distances, and how many were moved."""
    rng, refilled = np.random.default_rng([seed, 3]), 0
    word_S, distance_S = lloyd.nearest()
    for _ in range(_REFILL_ROUNDS):
        useless_U = _useless(lloyd.centroids(), np.bincount(word_S, minlength=k))
        vectors_U = _far_vectors(sample_Sp, distance_S, len(useless_U), rng)
        useless_U = useless_U[: len(vectors_U)]
        if not len(useless_U):
            break
        lloyd.put(useless_U, vectors_U)
        lloyd.step()
        refilled += len(useless_U)
        word_S, distance_S = lloyd.nearest()
    return word_S, distance_S, refilled


def _useless(centroids_Kp: NDArray[np.float32], counts_K: NDArray[np.int64]) -> NDArray[np.int64]:
    """Words that no vector is nearest to, or that are copies of a word before them."""
    seen: set[int] = set()
    useless = []
    for word, row in enumerate(np.ascontiguousarray(centroids_Kp)):
        identity = _identity(row)
        if counts_K[word] == 0 or identity in seen:
            useless.append(word)
        seen.add(identity)
    return np.array(useless, dtype=np.int64)


def _far_vectors(
    sample_Sp: NDArray[np.float32], distance_S: NDArray[np.float32], wanted: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Distinct vectors that are no centroid themselves, drawn by their squared distance, as k-means++ draws."""
    far = np.flatnonzero(distance_S > 0)
    if not wanted or not len(far):
        return np.empty(0, np.int64)
    # The least of exponentials with these rates: one draw without replacement, without sums that saturate.
    order = far[np.argsort(rng.exponential(size=len(far)) / distance_S[far], kind="stable")]
    picked: dict[int, int] = {}
    for vector in order.tolist():
        picked.setdefault(_identity(sample_Sp[vector]), vector)
        if len(picked) == wanted:
            break
    return np.array(list(picked.values()), dtype=np.int64)


def _identity(row: NDArray[np.float32]) -> int:
    return xxhash.xxh3_64_intdigest(row.data)
