"""The effective rank against NumPy's singular values, and where its value is known."""

import numpy as np
import pytest
import torch

from bowstore.models.spectrum import effective_rank


def by_definition(features_NC: np.ndarray) -> float:
    values = np.linalg.svd(features_NC, compute_uv=False)
    share = values / values.sum() + 1e-7
    return float(np.exp(-(share * np.log(share)).sum()))


def made(rows: int, channels: int, smallest: float = 1e-6) -> torch.Tensor:
    """Features whose singular values fall to `smallest` of the largest."""
    generator = torch.Generator().manual_seed(rows)
    spread = torch.logspace(0, np.log10(smallest), channels, dtype=torch.float64)
    return torch.randn(rows, channels, generator=generator, dtype=torch.float64) * spread


@pytest.mark.parametrize("shape", [(200, 64), (40, 64), (64, 64), (5, 1), (1, 5)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e200])
def test_it_is_that_of_the_singular_values(shape: tuple[int, int], scale: float) -> None:
    features = made(*shape)
    assert effective_rank(features * scale) == pytest.approx(by_definition(features.numpy()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_of_any_precision_are_taken_as_they_are(dtype: torch.dtype) -> None:
    features = made(100, 16, 1e-2).to(dtype)
    assert effective_rank(features) == pytest.approx(by_definition(features.double().numpy()), rel=1e-9)


def test_features_in_every_direction_fill_all_and_those_on_one_line_fill_one() -> None:
    orthonormal = torch.linalg.qr(made(300, 64, 1.0)).Q
    assert effective_rank(orthonormal) == pytest.approx(64, rel=1e-4)
    assert effective_rank(orthonormal[:, :10]) == pytest.approx(10, rel=1e-4)
    assert effective_rank(made(300, 1) @ made(1, 64)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(300, 64)) == pytest.approx(1, abs=1e-3), "nothing is centred"
    assert effective_rank(torch.zeros(300, 64)) == pytest.approx(1, abs=1e-3)


def test_gradients_are_left_alone_and_features_unchanged() -> None:
    features = made(20, 4).requires_grad_()
    before = features.detach().clone()
    effective_rank(features)
    assert torch.equal(features.detach(), before)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 3), (3, 0)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"are no matrix \(N, C\) with N, C >= 1"):
        effective_rank(torch.zeros(shape))
