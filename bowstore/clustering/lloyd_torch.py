"""Lloyd's iteration in PyTorch, over a sample that stays on the device where there is room for it.

Legend: S sampled vectors, p dimensions, K words, B vectors of a block, U words or vectors that are moved or moved to.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.clustering.lloyd import first_vectors, put_far
from bowstore.gpu import holds
from bowstore.words.assign.assign import PreparedWords, assign, assign_reference, prepare_words

_GPU_BLOCK = 1 << 28  # components processed together: launches stay a small part of the work
_CPU_BLOCK = 1 << 24
_WORK_BYTES = 1 << 32  # what the work on a block takes beside the sample


class TorchLloyd:
    """The sample on the device, searched there, with sums in a fixed order.

    On a GPU this spares FAISS's float32 products outside tensor cores and its transfer of the sample in each iteration.
    An iteration takes the word that half-precision products on tensor cores find nearest, without the proof that
    `assign` gives: it misses the nearest word only where two are about as near (0.4 % of the vectors of ImageNet
    photographs at K = 20000), which moves no mean by more than the next iteration moves it anyway. The last search
    (`nearest`) is exact. Where there are no tensor cores, all searches are.

    A sample that does not fit beside that work stays where it is and is sent to the device in parts, in
    each iteration (which no GPU has run yet).
    """

    def __init__(
        self, sample_Sp: NDArray[np.float32] | Tensor, num_words: int, seed: int, device: torch.device
    ) -> None:
        given_Sp, self._device = torch.as_tensor(sample_Sp), device
        self._sample_Sp = given_Sp.to(device) if holds(device, given_Sp.nbytes + _WORK_BYTES) else given_Sp
        squares, largest = [], []
        for part_Bp in self._parts():
            squares.append(part_Bp.square().sum(dim=1).sum(dtype=torch.float64))
            largest.append(torch.stack(part_Bp.aminmax()).abs().max())
        self._squares, self._largest = torch.stack(squares).sum(), float(torch.stack(largest).max())
        first_K = torch.from_numpy(first_vectors(len(given_Sp), num_words, seed))
        self._centroids_Kp = self._sample_Sp[first_K].to(device)
        self._rng = np.random.default_rng([seed, 4])
        self.backend = f"torch {torch.__version__} {device.type}"

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
        moved = self._refill(before_Kp, counts_K, found) if dead else 0
        return max(total, 0.0) / len(self._sample_Sp), moved

    def nearest(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """By `assign`; distances from the differences themselves."""
        words, found, distances = prepare_words(self._centroids_Kp), [], []
        for part_Bp in self._parts():
            ids_B = assign(part_Bp, words).long()
            found.append(ids_B.cpu().numpy())
            distances.append(_squared_distances(part_Bp, self._centroids_Kp, ids_B).cpu().numpy())
        return np.concatenate(found), np.concatenate(distances)

    def centroids(self) -> NDArray[np.float32]:
        """From the device."""
        centroids_Kp: NDArray[np.float32] = self._centroids_Kp.cpu().numpy()
        return centroids_Kp

    def put(self, words_U: NDArray[np.int64], vectors_U: NDArray[np.int64]) -> None:
        """On the device."""
        self._centroids_Kp[torch.from_numpy(words_U)] = self._sample_Sp[torch.from_numpy(vectors_U)].to(self._device)

    def _refill(self, before_Kp: Tensor, counts_K: Tensor, found: list[Tensor]) -> int:
        dead_U = (counts_K == 0).nonzero()[:, 0].cpu().numpy()
        pairs = zip(self._parts(), found, strict=True)
        distances = [_squared_distances(part_Bp, before_Kp, ids_B) for part_Bp, ids_B in pairs]
        return put_far(self.put, dead_U, self._sample_Sp, torch.cat(distances).cpu().numpy(), self._rng)

    def _likely(self, part_Bp: Tensor, words: PreparedWords) -> Tensor:
        """The nearest word, int64 (B,), but without proof where there are tensor cores."""
        if words.fast is None:
            return assign_reference(part_Bp, words).long()
        from bowstore.words.assign.assign_triton import likely  # Triton

        return likely(part_Bp, words.fast, largest=self._largest)

    @property
    def _block(self) -> int:
        components = _GPU_BLOCK if self._sample_Sp.is_cuda else _CPU_BLOCK
        return max(1, components // self._sample_Sp.shape[1])

    def _parts(self) -> Iterator[Tensor]:
        """The sample, float32 (B, p) at a time, on the device."""
        for part_Bp in torch.split(self._sample_Sp, self._block):
            yield part_Bp.to(self._device)


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
