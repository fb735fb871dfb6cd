"""Lloyd's iteration by FAISS: its k-means as it is, and the search of its SuperKMeans.

Legend: S sampled vectors, p dimensions, K words, B vectors of a slice, U words or vectors that are moved or moved to.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
import scipy.fft
import scipy.sparse
from numpy.typing import NDArray

from bowstore.clustering.lloyd import first_vectors, put_far
from bowstore.environment import cores

_faiss: Any = faiss  # its type stubs do not know all of it
_SUPER_WORDS, _SUPER_DIMENSIONS = 1024, 128  # from where its authors recommend SuperKMeans (faiss/SuperKMeans.h)
_SLICE = 2048, 8192  # vectors that one thread searches at a time: enough slices for 16 cores, and few layouts
_TURNS = 2  # of signs and cosines: one already mixes well, two leave no trace of the features' own axes


class FaissLloyd:
    """FAISS's k-means, on all cores of the machine; the result is the same for any number of threads."""

    def __init__(self, sample_Sp: NDArray[np.float32], num_words: int, seed: int) -> None:
        vectors, dimensions = sample_Sp.shape
        self._sample = sample_Sp
        self._index: Any = faiss.IndexFlatL2(dimensions)
        self.backend = f"faiss {faiss.__version__} cpu"
        # One iteration a call shows progress; FAISS continues from the centroids it holds, with the same result.
        self._clustering = faiss.Clustering(dimensions, num_words)
        self._clustering.niter = 1
        self._clustering.seed = seed % 2**31
        self._clustering.min_points_per_centroid, self._clustering.max_points_per_centroid = 1, vectors
        # All cores: torchrun leaves a process one, but while this one makes words, the others wait. A thread of its
        # own, because the number is a setting of the thread that makes it, which PyTorch may share.
        self._pool = ThreadPoolExecutor(1, "k-means", initializer=faiss.omp_set_num_threads, initargs=(cores(),))

    def step(self) -> tuple[float, int]:
        """One call of FAISS with one iteration; it splits large clusters for words that ran empty."""
        self._pool.submit(self._clustering.train, self._sample, self._index).result()
        stats: Any = self._clustering.iteration_stats  # a C++ vector
        last = stats.at(stats.size() - 1)
        return float(last.obj) / len(self._sample), int(last.nsplit)

    def nearest(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """FAISS's exhaustive search."""
        distance_S, word_S = self._pool.submit(faiss.knn, self._sample, self.centroids(), 1).result()
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


class SuperLloyd:
    """Lloyd's iteration with the search of FAISS's SuperKMeans (Kuffo et al. 2026, arXiv:2603.20009), on a CPU.

    Vectors and words are turned at random, which spreads every distance evenly over the dimensions. A matrix product
    over the first few dimensions then gives a share of each distance. A word whose share is larger than that of the
    present word's distance would be, except with a chance of 1 in p, is dropped; the others gain dimensions until they
    are dropped or nearer. The first search and the last one (`nearest`) are exact.

    `faiss.SuperKMeans` itself gives other centroids on another number of threads: its rotation and its products are
    cut by the number of threads. Here slices of the sample, whose length depends on the sample alone, are searched by
    one thread each, the rotation is one of cosines, and words are moved in the order of the vectors. So the bytes are
    the same for any number of cores. A second copy of the sample, turned, is kept in memory.
    """

    def __init__(self, sample_Sp: NDArray[np.float32], num_words: int, seed: int) -> None:
        vectors, dimensions = sample_Sp.shape
        self.backend = f"faiss {faiss.__version__} cpu superkmeans"
        self._sample_Sp = np.ascontiguousarray(sample_Sp)
        self._rng = np.random.default_rng([seed, 4])
        self._signs = self._rng.choice(np.array([-1, 1], np.float32), (_TURNS, dimensions))
        step = min(max(vectors // 64, _SLICE[0]), _SLICE[1])
        self._slices = [slice(start, min(start + step, vectors)) for start in range(0, vectors, step)]
        # Here each thread of the pool has one of OpenMP, and the pool the cores.
        self._pool = ThreadPoolExecutor(cores(), "k-means", initializer=faiss.omp_set_num_threads, initargs=(1,))
        self._turned_Sp = np.concatenate(self._each(lambda part: self._turn(self._sample_Sp[part])))
        self._centroids_Kp = self._sample_Sp[first_vectors(vectors, num_words, seed)]
        self._word_S = np.empty(0, np.int32)  # the first search finds them
        self._settings = _faiss.SuperKMeansParameters()
        shares = _faiss.precompute_ad_thresholds(dimensions, self._settings.ad_epsilon_factor / dimensions)
        self._shares = faiss.vector_to_array(shares)
        self._leading = self._within(int(self._settings.d_prime_fraction * dimensions))

    @staticmethod
    def suits(num_words: int, dimensions: int) -> bool:
        """Whether this FAISS has the search, and there are enough words and dimensions for it to pay."""
        has = hasattr(faiss, "super_kmeans_assign_iteration")
        return has and num_words >= _SUPER_WORDS and dimensions >= _SUPER_DIMENSIONS

    def step(self) -> tuple[float, int]:
        """Search, average in the order of the vectors, and move empty words onto vectors far from their own."""
        distance_S = self._prune() if len(self._word_S) else self._search()
        num_words, vectors = len(self._centroids_Kp), len(self._sample_Sp)
        counts_K = np.bincount(self._word_S, minlength=num_words)
        order_S = np.argsort(self._word_S.astype(np.uint16), kind="stable").astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(counts_K)]).astype(np.int32)
        chooses = scipy.sparse.csr_array((np.ones(vectors, np.float32), order_S, starts), shape=(num_words, vectors))
        used_U = np.flatnonzero(counts_K)
        self._centroids_Kp[used_U] = (chooses @ self._sample_Sp)[used_U] / counts_K[used_U, None].astype(np.float32)
        moved = put_far(self.put, np.flatnonzero(counts_K == 0), self._sample_Sp, distance_S, self._rng)
        return float(distance_S.mean(dtype=np.float64)), moved

    def nearest(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """FAISS's exhaustive search, slice by slice."""
        distance_S = self._search()
        return self._word_S.astype(np.int64), distance_S

    def centroids(self) -> NDArray[np.float32]:
        """Means of the vectors as they were given."""
        return self._centroids_Kp.copy()

    def put(self, words_U: NDArray[np.int64], vectors_U: NDArray[np.int64]) -> None:
        """The next search finds what is nearest to them."""
        self._centroids_Kp[words_U] = self._sample_Sp[vectors_U]

    def _each(self, work: Callable[[slice], Any]) -> list[Any]:
        return list(self._pool.map(work, self._slices))

    def _turn(self, vectors_Bp: NDArray[np.float32]) -> NDArray[np.float32]:
        """A rotation at random: signs, then a cosine transform, twice; row by row, so no product of matrices."""
        for signs_p in self._signs:
            turned_Bp: NDArray[np.float32] = scipy.fft.dct(vectors_Bp * signs_p, norm="ortho", axis=1)
            vectors_Bp = turned_Bp
        return vectors_Bp

    def _search(self) -> NDArray[np.float32]:
        """Exact nearest words and their squared distances, float32 (S,)."""
        found = self._each(lambda part: faiss.knn(self._sample_Sp[part], self._centroids_Kp, 1))
        self._word_S = np.concatenate([words[:, 0] for _, words in found]).astype(np.int32)
        distance_S: NDArray[np.float32] = np.concatenate([distances[:, 0] for distances, _ in found])
        return np.maximum(distance_S, 0, out=distance_S)

    def _prune(self) -> NDArray[np.float32]:
        """Words that are nearer than the present ones, and squared distances, float32 (S,)."""
        words_Kp, word_S = self._turn(self._centroids_Kp), self._word_S
        distance_S = np.empty(len(word_S), np.float32)

        def prune(part: slice) -> tuple[int, int]:
            vectors_Bp, word_B, distance_B = self._turned_Sp[part], word_S[part], distance_S[part]
            rows_B, present_B = np.arange(len(word_B)), word_B.astype(np.int64)
            _faiss.pairwise_indexed_L2sqr(
                vectors_Bp.shape[1], len(word_B), faiss.swig_ptr(vectors_Bp), faiss.swig_ptr(rows_B),
                faiss.swig_ptr(words_Kp), faiss.swig_ptr(present_B), faiss.swig_ptr(distance_B),
            )  # fmt: skip
            pairs: tuple[int, int] = _faiss.super_kmeans_assign_iteration(
                vectors_Bp, words_Kp, distance_B, word_B, self._leading, self._shares, self._settings
            )
            return pairs

        pairs, dropped = np.sum(self._each(prune), axis=0)
        # As SuperKMeans does: the product should drop nearly all words, but not cost more than it spares.
        if dropped > self._settings.pruning_target_high * pairs:
            self._leading = self._within(round(self._leading * (1 - self._settings.d_prime_adjust)))
        elif dropped < self._settings.pruning_target_low * pairs:
            self._leading = self._within(round(self._leading * (1 + self._settings.d_prime_adjust)))
        return distance_S

    def _within(self, leading: int) -> int:
        least: int = self._settings.d_prime_min  # below it the bound on a share does not hold
        return min(max(leading, least), len(self._signs[0]) // 2)
