"""The nearest word of each feature vector (paper, Eq. 1).

On an NVIDIA GPU tensor cores search, with a proof (assign_triton.py); everywhere else, and for vectors that the proof
leaves open, words are scored in float32, block by block.

Legend: N vectors, D dimensions (the layer's channels), K words.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bowstore.exact import exact_float32
from bowstore.gpu import runs_triton

if TYPE_CHECKING:
    from bowstore.words.assign.assign_triton import FastWords


# On a CPU a block of scores stays in cache between product and argmin; on a GPU it only has to fit in memory.
_CPU_BLOCK, _CPU_BLOCK_WORDS = 1 << 21, 1024
_GPU_BLOCK, _GPU_BLOCK_WORDS = 1 << 27, 1 << 15
_GROUPS = 64, 80, 48, 96  # of words, whole vectors of a processor; their least score comes first


class PreparedWords(NamedTuple):
    """A vocabulary laid out for `assign`.

    Attributes:
        words_DK: float32, the words as columns, then columns of zeros up to whole groups.
        half_norm_K: float32, half their squared norms, then infinity: those columns are never the nearest.
        group: words of a group.
        fast: what the search on tensor cores needs; None where there are none.
    """

    words_DK: Tensor
    half_norm_K: Tensor
    group: int
    fast: "FastWords | None" = None


def prepare_words(vocabulary_KD: Tensor) -> PreparedWords:
    """Lay out a float32 vocabulary (K, D), K <= 65535, for `assign`, on the device where it lies.

    On a GPU the first vocabulary of a width takes some seconds more: the search is compiled here, not in mid-run.
    """
    half_norm_K = (vocabulary_KD.double().square().sum(dim=1) / 2).float()
    fast = None
    if runs_triton(vocabulary_KD.device):
        from bowstore.words.assign.assign_triton import prepare_fast, warm_up  # Triton

        fast = prepare_fast(vocabulary_KD)
        warm_up(vocabulary_KD.device, vocabulary_KD.shape[1])
    group = min(_GROUPS, key=lambda size: -len(vocabulary_KD) % size)  # padding costs products
    padding = -len(vocabulary_KD) % group
    words_DK = torch.nn.functional.pad(vocabulary_KD.T, (0, padding)).contiguous()
    half_norm_K = torch.nn.functional.pad(half_norm_K, (0, padding), value=torch.inf)
    return PreparedWords(words_DK, half_norm_K, group, fast)


@torch.no_grad()
def assign(features_ND: Tensor, words: PreparedWords) -> Tensor:
    """Id of the word nearest in squared L2 distance, uint16 (N,), on the features' device (paper, Eq. 1).

    The same contract on every device: the squared distance to the chosen word exceeds the least one by no more than
    `assign_reference` allows, and equal distances go to the lower id. Vectors must be finite: the caller checks.

    Args:
        features_ND: float32 (N, D), in any layout.
        words: from `prepare_words`, on the same device.
    """
    assert features_ND.shape[1] == len(words.words_DK), "the kernels do not look"
    if words.fast is None:
        return assign_reference(features_ND, words)
    from bowstore.words.assign.assign_triton import nearest  # Triton

    found = nearest(features_ND, words.fast)
    if len(found.open_U):
        found.ids_N[found.open_U] = assign_reference(features_ND[found.open_U], words).int()
    return found.ids_N.to(torch.uint16)


@torch.no_grad()
def assign_reference(features_ND: Tensor, words: PreparedWords) -> Tensor:
    """What `assign` returns, by float32 products in blocks; the reference for every faster way.

    Since |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x.c), the word with the least |c|^2 / 2 - x.c is the nearest;
    equal scores go to the lower id. All in float32: the squared distance to the chosen word exceeds the least
    one by at most 4 (D + 2) 2^-24 (|x| |c| + |c|^2 / 2), with |c| the largest norm of a word; in practice by
    far less.

    Args:
        features_ND: float32 (N, D), in any layout.
        words: from `prepare_words`, on the same device.
    """
    rows, k = len(features_ND), words.words_DK.shape[1]
    gpu = features_ND.device.type == "cuda"
    step_words = min(k, _GPU_BLOCK_WORDS if gpu else _CPU_BLOCK_WORDS)
    step_words = -(-step_words // words.group) * words.group
    most = max(1, (_GPU_BLOCK if gpu else _CPU_BLOCK) // step_words)
    blocks = max(1, -(-rows // most))
    step = max(1, -(-rows // blocks))  # even blocks: a last one of a few rows would be slow for its size
    ids_N = torch.empty(rows, dtype=torch.uint16, device=features_ND.device)
    buffer = torch.empty(step * step_words, device=features_ND.device)
    with exact_float32():
        for start in range(0, rows, step):
            part = slice(start, start + step)
            ids_N[part] = _nearest(features_ND[part], words, step_words, buffer).to(torch.uint16)
    return ids_N


def _nearest(features_BD: Tensor, words: PreparedWords, step_words: int, buffer: Tensor) -> Tensor:
    """Running argmin over blocks of words for one block of vectors; int64 (B,)."""
    rows, k = len(features_BD), words.words_DK.shape[1]
    ids_B = torch.zeros(rows, dtype=torch.int64, device=features_BD.device)
    least_B = torch.full((rows,), torch.inf, device=features_BD.device)
    for first in range(0, k, step_words):
        some = slice(first, min(first + step_words, k))
        scores = buffer[: rows * (some.stop - first)].view(rows, -1)
        torch.addmm(words.half_norm_K[some], features_BD, words.words_DK[:, some], alpha=-1, out=scores)
        # On a CPU argmin takes fourteen times longer than amin, so it only sees the groups' least scores, then the
        # best group's own, and of rows that this block improves. It is documented to give the first of equal values.
        grouped_BGg = scores.view(rows, -1, words.group)
        least_BG = grouped_BGg.amin(dim=2)
        score_B = least_BG.amin(dim=1)
        better_U = (score_B < least_B).nonzero()[:, 0]
        group_U = least_BG[better_U].argmin(dim=1)
        ids_B[better_U] = first + words.group * group_U + grouped_BGg[better_U, group_U].argmin(dim=1)
        least_B = torch.minimum(least_B, score_B)
    return ids_B
