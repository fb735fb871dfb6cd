"""Principal components between the teacher's map and the words (the paper's Random teacher needs them, Table 3).

Legend: N vectors, S sampled vectors, c channels of the map, p components.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.errors import DataError, UsageError

_FLAT = 1e-7  # of the largest variance: below it a direction is rounding


class Projection(NamedTuple):
    """y = A x + b.

    Attributes:
        matrix_pc: float32, A.
        offset_p: float32, b.
    """

    matrix_pc: NDArray[np.float32]
    offset_p: NDArray[np.float32]


class PreparedProjection(NamedTuple):
    """A projection on a device.

    Attributes:
        matrix_cp: float32, A transposed.
        offset_p: float32, b.
    """

    matrix_cp: Tensor
    offset_p: Tensor


def _faiss() -> Any:
    import faiss  # words without a projection need none

    return faiss


def fit_projection(sample_Sc: NDArray[np.float32], dimensions: int, *, whiten: bool) -> tuple[Projection, float]:
    """The first principal components of a sample, and the share of its variance that they hold.

    Args:
        sample_Sc: float32 (S, c), finite; FAISS uses no more than 1000 c of them.
        dimensions: p, at most c.
        whiten: scale each component to unit variance.

    Raises:
        UsageError: more components than channels.
        DataError: fewer directions that vary than components.
    """
    channels = sample_Sc.shape[1]
    if dimensions > channels:
        raise UsageError(f"--pca {dimensions} is more than the layer's {channels} channels; choose at most {channels}")
    if dimensions > len(sample_Sc):
        raise UsageError(
            f"--pca {dimensions} needs as many vectors, the sample has {len(sample_Sc)}; choose at most that, or raise "
            "--sample-per-word"
        )
    faiss = _faiss()
    fitted: Any = faiss.PCAMatrix(channels, dimensions, -0.5 if whiten else 0.0)
    fitted.train(sample_Sc)
    variance_c = faiss.vector_to_array(fitted.eigenvalues)
    vary = int((variance_c > _FLAT * variance_c[0]).sum()) if variance_c[0] > 0 else 0
    if vary < dimensions:
        raise DataError(
            f"the sample's {len(sample_Sc)} feature vectors vary in only {vary} of {channels} directions, too few for "
            f"--pca {dimensions}; choose at most {vary}"
        )
    # FAISS's variances are sums over the vectors that it uses, not means.
    scale = np.float32(min(len(sample_Sc), fitted.max_points_per_d * channels) ** 0.5 if whiten else 1)
    matrix_pc = scale * faiss.vector_to_array(fitted.A).reshape(dimensions, channels)
    share = float(variance_c[:dimensions].sum(dtype=np.float64) / variance_c.sum(dtype=np.float64))
    return Projection(matrix_pc, scale * faiss.vector_to_array(fitted.b)), share


def project_sample(projection: Projection, sample_Sc: NDArray[np.float32]) -> NDArray[np.float32]:
    """The components of a sample, float32 (S, p)."""
    dimensions, channels = projection.matrix_pc.shape
    faiss = _faiss()
    linear: Any = faiss.LinearTransform(channels, dimensions, True)
    faiss.copy_array_to_vector(projection.matrix_pc.ravel(), linear.A)
    faiss.copy_array_to_vector(projection.offset_p, linear.b)
    linear.is_trained = True
    projected: NDArray[np.float32] = linear.apply(sample_Sc)
    return projected


def prepare_projection(projection: Projection, device: torch.device) -> PreparedProjection:
    """Lay a projection out on a device."""
    matrix_pc, offset_p = (torch.from_numpy(part).to(device) for part in projection)
    return PreparedProjection(matrix_pc.T.contiguous(), offset_p)


def project(vectors_Nc: Tensor, projection: PreparedProjection) -> Tensor:
    """The components of vectors, float32 (N, p); call it inside `exact_float32`."""
    return torch.addmm(projection.offset_p, vectors_Nc, projection.matrix_cp)
