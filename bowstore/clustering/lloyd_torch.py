"""Lloyd's iteration in PyTorch, over a sample that stays on the device.

Legend: S sampled vectors, p dimensions, K words, B vectors of a block, U words or vectors that are moved or moved to.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.clustering.lloyd import Lloyd, far_vectors, first_vectors
from bowstore.gpu import free_memory
from bowstore.words.assign.assign import PreparedWords, assign, assign_reference, prepare_words

_GPU_BLOCK = 1 << 28  # components processed together: launches stay a small part of the work
_CPU_BLOCK = 1 << 24
_ROOM = 1.25, 1 << 32  # memory that k-means needs: this many copies of the sample, and what the work on a block takes
_PINNED_BYTES = 1 << 26  # of one of the two buffers that a sample passes through on its way to a GPU


class TorchLloyd(Lloyd):
    """The sample on the device, searched there, with sums in a fixed order.

    On a GPU this spares FAISS's float32 products outside tensor cores and its transfer of the sample in each iteration.
    An iteration takes the word that half-precision products on tensor cores find nearest, without the proof that
    `assign` gives: it misses the nearest word only where two are about as near (0.4 % of the vectors of ImageNet
    photographs at K = 20000), which moves no mean by more than the next iteration moves it anyway. The last search
    (`nearest`) is exact. Where there are no tensor cores, all searches are.

    A sample that does not fit as float32 is kept as float16, scaled by a power of two so that nothing overflows: the
    centroids are then means of vectors that are off by up to 2^-11 of each component, and the last search takes the
    vectors as they were given.
    """

    def __init__(
        self, sample_Sp: NDArray[np.float32] | Tensor, num_words: int, seed: int, device: torch.device
    ) -> None:
        self._given_Sp = sample_Sp if isinstance(sample_Sp, Tensor) else torch.from_numpy(sample_Sp)
        self._device = device
        here = self._given_Sp.device.type == device.type
        kept = torch.float32 if here and device.type == "cuda" else kept_as(sample_Sp.nbytes, device) or torch.float16
        self._largest, self._scale = torch.inf, 1.0
        if kept == torch.float16:
            self._largest = _largest(self._given_Sp)
            self._scale = 2.0 ** (14 - math.frexp(self._largest)[1])
        as_it_is = here and kept == torch.float32
        self._sample_Sp = self._given_Sp if as_it_is else _upload(self._given_Sp, device, kept, self._scale)
        if kept == torch.float32:
            self._largest = _largest(self._sample_Sp)  # faster there than where it was given
        first = torch.from_numpy(first_vectors(len(sample_Sp), num_words, seed)).to(self._given_Sp.device)
        self._centroids_Kp = self._given_Sp[first].to(device)
        self._squares = self._sum_of_squares()
        self._rng = np.random.default_rng([seed, 4])
        halved = ", sample in float16" if kept == torch.float16 else ""
        self.backend = f"torch {torch.__version__} {device.type}{halved}"

    def step(self) -> tuple[float, int]:
        """Search, sum by word in a fixed order, divide, and move empty words onto vectors far from their own.

        The device is waited for once. The sum of squared distances needs no pass over the vectors:
        sum |x - c|^2 = sum |x|^2 - 2 sum_k c_k.(sum of the word's x) + sum_k n_k |c_k|^2, in float64.
        """
        before_Kp, words = self._centroids_Kp, prepare_words(self._centroids_Kp)
        sums_Kp = torch.zeros_like(before_Kp)
        counts_K = torch.zeros(len(before_Kp), dtype=torch.int64, device=self._device)
        found = []
        for part_Bp in self._parts():
            found.append(self._likely(part_Bp, words))
            _add_rows(sums_Kp, found[-1], part_Bp)
            counts_K.scatter_add_(0, found[-1], torch.ones_like(found[-1]))  # of integers, so in any order
        self._centroids_Kp = torch.where((counts_K > 0)[:, None], sums_Kp / counts_K.clamp(min=1)[:, None], before_Kp)
        products_K = (before_Kp.double() * (counts_K[:, None] * before_Kp.double() - 2 * sums_Kp.double())).sum(dim=1)
        total, dead = torch.stack([self._squares + products_K.sum(), (counts_K == 0).sum().double()]).tolist()
        moved = self._refill(before_Kp, counts_K, torch.cat(found)) if dead else 0
        return max(total, 0.0) / len(self._sample_Sp), moved

    def nearest(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """By `assign`, of the vectors as they were given; distances from the differences themselves."""
        words, found, distances = prepare_words(self._centroids_Kp), [], []
        for part_Bp in self._given_parts():
            ids_B = assign(part_Bp, words).long()
            found.append(ids_B.cpu().numpy())
            distances.append(_squared_distances(part_Bp, self._centroids_Kp, ids_B).cpu().numpy())
        return np.concatenate(found), np.concatenate(distances)

    def centroids(self) -> NDArray[np.float32]:
        """From the device."""
        centroids_Kp: NDArray[np.float32] = self._centroids_Kp.cpu().numpy()
        return centroids_Kp

    def put(self, words_U: NDArray[np.int64], vectors_U: NDArray[np.int64]) -> None:
        """On the device, the vectors as they were given."""
        vectors_Up = self._given_Sp[torch.from_numpy(vectors_U).to(self._given_Sp.device)]
        self._centroids_Kp[torch.from_numpy(words_U).to(self._device)] = vectors_Up.to(self._device)

    def _refill(self, before_Kp: Tensor, counts_K: Tensor, ids_S: Tensor) -> int:
        dead_U = (counts_K == 0).nonzero()[:, 0].cpu().numpy()
        ids = iter(torch.split(ids_S, self._block))
        distances = [_squared_distances(part_Bp, before_Kp, next(ids)) for part_Bp in self._parts()]
        vectors_U = far_vectors(self._given_Sp, torch.cat(distances).cpu().numpy(), len(dead_U), self._rng)
        self.put(dead_U[: len(vectors_U)], vectors_U)
        return len(vectors_U)

    def _likely(self, part_Bp: Tensor, words: PreparedWords) -> Tensor:
        """The nearest word, int64 (B,), but without proof where there are tensor cores."""
        if words.fast is None:
            return assign_reference(part_Bp, words).long()
        from bowstore.words.assign.assign_triton import likely  # Triton

        return likely(part_Bp, words.fast, largest=self._largest)

    @property
    def _block(self) -> int:
        components = _GPU_BLOCK if self._device.type == "cuda" else _CPU_BLOCK
        return max(1, components // self._given_Sp.shape[1])

    def _parts(self) -> Iterator[Tensor]:
        """The sample as it is kept, float32 (B, p) at a time."""
        for part_Bp in torch.split(self._sample_Sp, self._block):
            yield part_Bp if part_Bp.dtype == torch.float32 else part_Bp.float() / self._scale

    def _given_parts(self) -> Iterator[Tensor]:
        """The sample as it was given, float32 (B, p) at a time."""
        if self._sample_Sp.dtype == torch.float32:
            yield from self._parts()
            return
        for part_Bp in torch.split(self._given_Sp, self._block):
            yield _upload(part_Bp, self._device, torch.float32, 1.0)

    def _sum_of_squares(self) -> Tensor:
        """Of the sample as it is kept, float64."""
        parts = [part_Bp.square().sum(dim=1).sum(dtype=torch.float64) for part_Bp in self._parts()]
        return torch.stack(parts).sum()


def kept_as(sample_bytes: int, device: torch.device) -> torch.dtype | None:
    """How a device can keep a float32 sample of this size: float32, on a full GPU float16, or not at all (None)."""
    if device.type != "cuda":
        return torch.float32
    free = free_memory(device) - _ROOM[1]
    if _ROOM[0] * sample_bytes <= free:
        return torch.float32
    return torch.float16 if _ROOM[0] * sample_bytes / 2 <= free else None


def _largest(sample_Sp: Tensor) -> float:
    """The largest absolute value of a component; in parts, because not all reductions take 2^31 elements."""
    parts = torch.split(sample_Sp, max(1, _GPU_BLOCK // sample_Sp.shape[1]))
    return float(torch.stack([torch.stack(part_Bp.aminmax()).abs().max() for part_Bp in parts]).max())


def _upload(given_Sp: Tensor, device: torch.device, kept: torch.dtype, scale: float) -> Tensor:
    """Vectors on a GPU, sent through two pinned buffers: one is filled while the other is sent."""
    rows = max(1, _PINNED_BYTES // (4 * given_Sp.shape[1]))
    there_Sp = torch.empty(given_Sp.shape, dtype=kept, device=device)
    with torch.cuda.device(device if device.type == "cuda" else -1):  # pinning initialises the current GPU
        buffers = [torch.empty(rows, given_Sp.shape[1], pin_memory=True) for _ in range(2)]
    sent: list[Any] = [torch.cuda.Event() for _ in buffers]  # type: ignore[no-untyped-call]
    for turn, part_Bp in enumerate(torch.split(given_Sp, rows)):
        free = turn % 2
        sent[free].synchronize()  # returns at once if nothing was sent yet
        arrived_Bp = buffers[free][: len(part_Bp)].copy_(part_Bp).to(device, non_blocking=True)
        sent[free].record(torch.cuda.current_stream(device))
        there_Sp[turn * rows : turn * rows + len(part_Bp)] = arrived_Bp * scale if scale != 1 else arrived_Bp
    torch.cuda.synchronize(device)  # before the buffers are freed
    return there_Sp


def _add_rows(sums_Kp: Tensor, ids_B: Tensor, part_Bp: Tensor) -> None:
    """Add each vector to its word's sum, in the order of the vectors.

    PyTorch promises that order only in its deterministic mode. It holds for nothing else here: in that mode products
    of matrices ask for a setting of cuBLAS (CUBLAS_WORKSPACE_CONFIG) that has to be made before CUDA starts.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        sums_Kp.index_put_((ids_B,), part_Bp, accumulate=True)
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _squared_distances(part_Bp: Tensor, centroids_Kp: Tensor, ids_B: Tensor) -> Tensor:
    """Of each vector to its word, float32 (B,)."""
    return (part_Bp - centroids_Kp[ids_B]).square_().sum(dim=1)
