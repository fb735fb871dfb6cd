"""Principal components between the teacher's map and the words (the paper's Random teacher needs them, Table 3).

Legend: N vectors, S sampled vectors, R of a block, c channels of the map, p components.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.errors import DataError, UsageError

_FLAT = 1e-10  # of the largest variance: below it a direction is rounding of the features
_VECTORS_PER_CHANNEL = 1000
_BLOCK = 1 << 12  # vectors


class Projection(NamedTuple):
    """y = A x + b.

    Attributes:
        matrix_pc: float32, A.
        offset_p: float32, b.
    """

    matrix_pc: NDArray[np.float32]
    offset_p: NDArray[np.float32]


def fit_projection(sample_Sc: NDArray[np.float32], dimensions: int, *, whiten: bool) -> tuple[Projection, float]:
    """The first principal components of a sample, and the share of its variance that they hold.

    In float64: with all components whitened the least of them is scaled up a thousandfold, and what a float32
    covariance (that of FAISS's PCA) loses with it.

    Args:
        sample_Sc: float32 (S, c), finite; evenly spread over S, no more than 1000 c of them are used.
        dimensions: p, at most c.
        whiten: scale each component to unit variance.

    Raises:
        UsageError: more components than vectors.
        DataError: fewer directions that vary than components.
    """
    vectors, channels = sample_Sc.shape
    if dimensions > vectors:
        raise UsageError(
            f"--pca {dimensions} needs as many vectors, the sample has {vectors}; choose at most that, or raise "
            "--sample-per-word"
        )
    mean_c, covariance_cc = _moments(sample_Sc)
    variance_c, axis_cc = (values[..., ::-1] for values in np.linalg.eigh(covariance_cc))  # largest first
    vary = int((variance_c > _FLAT * variance_c[0]).sum()) if variance_c[0] > 0 else 0
    if vary < dimensions:
        raise DataError(
            f"the sample's {vectors} feature vectors vary in only {vary} of {channels} directions, too few for "
            f"--pca {dimensions}; choose at most {vary}"
        )
    matrix_pc = axis_cc.T[:dimensions]
    if whiten:
        matrix_pc = matrix_pc / np.sqrt(variance_c[:dimensions, None])
    share = float(variance_c[:dimensions].sum() / variance_c.sum())
    return Projection(matrix_pc.astype(np.float32), (-matrix_pc @ mean_c).astype(np.float32)), share


def _moments(sample_Sc: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (c,) and covariance (c, c), in blocks: a sample may fill half of the memory."""
    vectors, channels = sample_Sc.shape
    used = np.linspace(0, vectors - 1, min(vectors, _VECTORS_PER_CHANNEL * channels)).astype(np.int64)
    blocks = [used[start : start + _BLOCK] for start in range(0, len(used), _BLOCK)]
    mean_c = sum(sample_Sc[rows].sum(0, dtype=np.float64) for rows in blocks) / len(used)
    covariance_cc = np.zeros((channels, channels))
    for rows in blocks:
        centred_Rc = sample_Sc[rows] - mean_c
        covariance_cc += centred_Rc.T @ centred_Rc
    return mean_c, covariance_cc / max(1, len(used) - 1)


def project_sample(projection: Projection, sample_Sc: NDArray[np.float32]) -> NDArray[np.float32]:
    """The components of a sample, float32 (S, p)."""
    projected_Sp = sample_Sc @ projection.matrix_pc.T
    projected_Sp += projection.offset_p
    return projected_Sp


def prepare_projection(projection: Projection, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What gives the components, float32 (N, p), of vectors (N, c) on a device; call it inside `exact_float32`."""
    matrix_pc, offset_p = (torch.from_numpy(part).to(device) for part in projection)
    matrix_cp = matrix_pc.T.contiguous()
    return lambda vectors_Nc: torch.addmm(offset_p, vectors_Nc, matrix_cp)
