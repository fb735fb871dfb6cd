"""Bags of visual words: count and binary bags, those of a pyramid's cells, CutMix of bags, and the loss against them.

A bag is a pair (words_BM int64, weights_BM float32) whose rows sum to 1; a word may fill several slots.

Legend: N rows, B batch, M bag slots (locations of the word map), h w word map, P cells of a grid over it, m locations
of a cell, K words.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.special
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Form = Literal["count", "binary"]


class Bag(NamedTuple):
    """Targets of one batch.

    Attributes:
        words_BM: int64, word ids.
        weights_BM: float32, at least 0; each row sums to 1.
    """

    words_BM: Tensor
    weights_BM: Tensor


def unpacked(packed_BM: Tensor) -> Tensor:
    """Word ids, int64, of uint16 that are held bit for bit as int16."""
    return packed_BM.long() & 0xFFFF


def words_bytes(images: int, grid: tuple[int, int]) -> int:
    """Size of the words of some images, bytes."""
    return 2 * images * grid[0] * grid[1]


def bag_of(words_BM: Tensor, form: Form, shown_BM: Tensor | None = None) -> Bag:
    """Bags of words (paper, Eq. 3 or 4, then L1-normalised), or of what is seen of them.

    Args:
        words_BM: int64.
        form: count: a location weighs its share, and a word's frequency is the sum over its slots; binary: each
            distinct word of which anything is seen weighs the same, in one slot.
        shown_BM: float32, share of the view in which a location is seen; a row weighs their sum (not 1). None for the
            whole image, of which every location has the same share.
    """
    if shown_BM is None:
        shown_BM = torch.full(words_BM.shape, 1 / words_BM.shape[1], device=words_BM.device)
    if form == "count":
        return Bag(words_BM, shown_BM)
    # Of equal words those that are seen come first, so that the first of them says whether any is.
    key_BM = (2 * words_BM + (shown_BM <= 0)).sort(dim=1).values
    words_BM, seen_BM = key_BM >> 1, 1 - (key_BM & 1)
    seen_BM[:, 1:] *= words_BM[:, 1:] != words_BM[:, :-1]
    share_B1 = shown_BM.sum(dim=1, keepdim=True) / seen_BM.sum(dim=1, keepdim=True).clamp_min(1)
    return Bag(words_BM, seen_BM * share_B1)


def words_in_cells(words_Bhw: Tensor, grid: int) -> Tensor:
    """The words (B, P, m) of each of `grid` x `grid` equal cells, which divide the map; cells in reading order."""
    images, height, width = words_Bhw.shape
    cut = words_Bhw.reshape(images, grid, height // grid, grid, width // grid)
    return cut.transpose(2, 3).reshape(images, grid * grid, -1)


def mix_bags(bag: Bag, partner_B: Tensor, kept_B: Tensor) -> Bag:
    """CutMix of bags: lambda y(A) + (1 - lambda) y(B), exactly, by concatenation.

    Args:
        bag: bags of the batch.
        partner_B: int64, place of each sample's partner in the batch.
        kept_B: float32, lambda: the area share of A that is kept.
    """
    return Bag(
        torch.cat([bag.words_BM, bag.words_BM[partner_B]], dim=1),
        torch.cat([bag.weights_BM * kept_B[:, None], bag.weights_BM[partner_B] * (1 - kept_B[:, None])], dim=1),
    )


def bow_cross_entropy(logits_BK: Tensor, bag: Bag) -> Tensor:
    """Mean cross-entropy against the bags (paper, Eq. 6), in float32: logsumexp minus the weighted gather.

    Equal to the dense form to 1e-6. The gradient, (softmax - target) / B, is made in place from the probabilities,
    so that no dense target ever exists (autograd's own gather would write one of zeros).
    """
    loss: Tensor = _BowCrossEntropy.apply(logits_BK.float(), bag.words_BM, bag.weights_BM)
    return loss


class _BowCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BK: Tensor, words_BM: Tensor, weights_BM: Tensor) -> Tensor:
        log_norm_B = torch.logsumexp(logits_BK, dim=1)
        at_words_B = (logits_BK.gather(1, words_BM) * weights_BM).sum(dim=1)
        ctx.save_for_backward(logits_BK, log_norm_B, words_BM, weights_BM)
        return (log_norm_B - at_words_B).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits_BK, log_norm_B, words_BM, weights_BM = ctx.saved_tensors
        grad_BK = (logits_BK - log_norm_B[:, None]).exp_()
        grad_BK.scatter_add_(1, words_BM, -weights_BM)
        return grad_BK.mul_(grad / len(logits_BK)), None, None


def bag_entropy(bag: Bag, num_words: int) -> Tensor:
    """Mean entropy of the bags, nats: the least value the loss can take."""
    dense_BK = bag.weights_BM.new_zeros(len(bag.words_BM), num_words).scatter_add_(1, bag.words_BM, bag.weights_BM)
    entropy_B: Tensor = torch.special.entr(dense_BK).sum(dim=1)
    return entropy_B.mean()


def weight_at(bag: Bag, word_B: Tensor) -> Tensor:
    """Mean weight that the bags give to one word an image, word_B int64 (B,)."""
    hit_BM: Tensor = bag.words_BM == word_B[:, None]
    return (hit_BM * bag.weights_BM).sum(1).mean()


class MeanBag:
    """The mean bag over all rows, added up block by block.

    Its entropy is the loss of predicting the words' mean frequencies for every image: a run that stays there has
    learned nothing about the images.
    """

    def __init__(self, num_words: int) -> None:
        self._total_K = np.zeros(num_words, np.float64)

    def add(self, bag: Bag) -> None:
        """Count the bags of some rows, which lie on a CPU."""
        words, weights = (part.flatten().numpy() for part in bag)
        self._total_K += np.bincount(words, weights, len(self._total_K))

    def entropy(self) -> float:
        """Entropy of the mean bag, nats."""
        mean_K = self._total_K / self._total_K.sum()  # in float32 the bags' weights sum to 1 only so far
        return float(scipy.special.entr(mean_K).sum())
