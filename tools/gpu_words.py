"""Vectors and words that are hard to tell apart, and whether a search finds the nearest ones (gpu_sections.py, tests).

Legend: N vectors, D dimensions, K words.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = ((5000, 1024, 20000), (257, 3, 65535), (1, 1, 1), (300, 200, 4100), (1, 1000, 129), (513, 70, 1))
TOY_SHAPES = ((300, 64, 500), (57, 3, 700), (1, 1, 1), (13, 70, 1))


class Excess(NamedTuple):
    """How far a search is from the nearest words.

    Attributes:
        wrong: settled vectors whose word is farther off than the nearest one, by more than float64's rounding.
        open: vectors that were left open.
    """

    wrong: int
    open: int


def rectified(n: int, d: int, k: int, device: torch.device, factors: int = 16) -> tuple[Tensor, Tensor]:
    """Features (n, d) and words (k, d) of few factors, as real ones are: near ties among the nearest words."""
    generator = torch.Generator(device).manual_seed(n)
    mixture = torch.randn(factors, d, generator=generator, device=device)
    features, words = (torch.randn(count, factors, generator=generator, device=device) @ mixture for count in (n, k))
    return features.relu(), words.relu()


def exact_scores(features_ND: Tensor, words_KD: Tensor) -> Tensor:
    """Half the squared distances less what is the same for a row, in float64 (N, K)."""
    middle_D = words_KD.median(dim=0).values
    features_ND, words_KD = features_ND.double() - middle_D, words_KD.double() - middle_D
    return words_KD.square().sum(dim=1) / 2 - features_ND @ words_KD.T


def excess(
    features_ND: Tensor, words_KD: Tensor, ids_N: Tensor, open_U: Tensor | None = None, *, share: float = 1e-13
) -> Excess:
    """Compare found words with the nearest in float64.

    Args:
        features_ND: float32.
        words_KD: float32.
        ids_N: found words.
        open_U: vectors that the search left open.
        share: of the squared sizes that a score may exceed the least one by; float64's rounding by default.
    """
    settled_N = torch.ones(len(features_ND), dtype=torch.bool, device=features_ND.device)
    if open_U is not None:
        settled_N[open_U] = False
    scores_NK = exact_scores(features_ND, words_KD)
    chosen_N = scores_NK.gather(1, ids_N.long()[:, None])[:, 0]
    sizes_N = features_ND.double().norm(dim=1) + words_KD.double().norm(dim=1).max()
    wrong_N = chosen_N > scores_NK.amin(dim=1) + share * sizes_N.square()
    return Excess(int((wrong_N & settled_N).sum()), int((~settled_N).sum()))
