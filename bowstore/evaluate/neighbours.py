"""Votes of the nearest train images, in bounded memory.

Legend: N train images, M test images, d feature width, K classes, k neighbours; n and m images at a time.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bowstore.evaluate.blocks import slices
from bowstore.evaluate.fitting import TOP, shares
from bowstore.evaluate.protocol import Features, Scores, num_classes
from bowstore.evaluate.protocols.knn import KnnSettings
from bowstore.exact import exact_float32
from bowstore.progress import Progress

TRAIN_BLOCK = 16_384  # from 64 k on, topk keeps a heap and takes two thirds of the time
_TEST_BLOCK = 1024


def score(features: Features, settings: KnnSettings) -> Scores:
    """The votes of the split "train" on the split "test"."""
    train, test = features["train"], features["test"]
    metrics = knn_accuracy(
        train.taps["pooled"],
        train.labels,
        test.taps["pooled"],
        test.labels,
        k=settings.k,
        temperature=settings.temperature,
        classes=num_classes(train),
        device=torch.device(features.device),
    )
    return Scores(metrics=metrics, settings={"classes": num_classes(train)})


def knn_accuracy(
    train_Nd: NDArray[np.floating],
    train_labels_N: NDArray[np.integer],
    test_Md: NDArray[np.floating],
    test_labels_M: NDArray[np.integer],
    *,
    k: int,
    temperature: float,
    classes: int,
    device: torch.device,
) -> dict[str, float]:
    """Shares of test images whose class has the most votes (top1) and, of more than five classes, is in the first five.

    Each of the k train images of the largest cosine with a test image gives its class exp(cosine / temperature) votes.
    Of equal cosines the lower rows count, of equal votes the lower classes; a class without a neighbour is no answer.

    Memory: blocks of 16,384 train images and 12 bytes for each of M * k neighbours. Features are read block by block,
    train features once: they may be memory-mapped. Features are finite, k at most N, labels 0 to K - 1; cosines are
    computed on `device` in full float32.
    """
    cosine_Mk, rows_Mk = nearest(train_Nd, test_Md, k, device)
    ranks_M = np.concatenate(
        [
            _ranks(cosine_Mk[at], train_labels_N[rows_Mk[at]], test_labels_M[at], classes, temperature)
            for at in slices(len(test_Md), _TEST_BLOCK)
        ]
    )
    hits_T = (ranks_M[:, None] <= np.arange(TOP)).sum(axis=0)
    return shares(hits_T, len(ranks_M), classes)


def nearest(
    train_Nd: NDArray[np.floating], test_Md: NDArray[np.floating], k: int, device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cosines and train rows of the k train images of the largest cosine, both (M, k), by ascending row."""
    cosine_Mk = torch.empty(len(test_Md), 0)
    rows_Mk = torch.empty(len(test_Md), 0, dtype=torch.int64)
    with exact_float32(), torch.no_grad(), Progress("neighbours", len(train_Nd)) as progress:
        for part in slices(len(train_Nd), TRAIN_BLOCK):
            train_nd = unit(train_Nd[part], device)
            best = [
                _better(cosine_Mk[at], rows_Mk[at], unit(test_Md[at], device) @ train_nd.T, part.start, k)
                for at in slices(len(test_Md), _TEST_BLOCK)
            ]
            cosine_Mk, rows_Mk = (torch.cat(values) for values in zip(*best, strict=True))
            progress.advance(len(train_nd))
    return cosine_Mk.numpy(), rows_Mk.numpy()


def _better(cosine_mk: Tensor, rows_mk: Tensor, cosine_mn: Tensor, first: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best of those so far and those of another block, whose rows begin at `first`."""
    values, columns = _largest(cosine_mn, k)
    cosine = torch.cat([cosine_mk, values.cpu()], dim=1)
    rows = torch.cat([rows_mk, columns.cpu() + first], dim=1)
    values, columns = _largest(cosine, k)
    return values, rows.gather(1, columns)


def _largest(values_mn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each line (all, where there are fewer), the first of equals, and their columns, ascending."""
    if values_mn.shape[1] <= k:
        return values_mn, torch.arange(values_mn.shape[1], device=values_mn.device).expand(values_mn.shape)
    values, columns = values_mn.topk(k + 1, dim=1)
    least_m, columns_mk = values[:, k - 1], columns[:, :k]
    # topk takes any of equal values. Where the least one it took is also outside, the first ones are taken instead.
    for line in (values[:, k] == least_m).nonzero()[:, 0].tolist():
        above = (values_mn[line] > least_m[line]).nonzero()[:, 0]
        equal = (values_mn[line] == least_m[line]).nonzero()[:, 0]
        columns_mk[line] = torch.cat([above, equal[: k - len(above)]])
    columns_mk = columns_mk.sort(dim=1).values
    return values_mn.gather(1, columns_mk), columns_mk


def _ranks(
    cosine_mk: NDArray[np.float32],
    label_mk: NDArray[np.integer],
    label_m: NDArray[np.integer],
    classes: int,
    temperature: float,
) -> NDArray[np.int64]:
    """How many classes are ahead of the right one, (m,); all of them where it has no neighbour."""
    # Over the largest, so that no temperature overflows: a factor of a line changes no order in it.
    cosine_mk = cosine_mk.astype(np.float64)
    vote_mk = np.exp((cosine_mk - cosine_mk.max(axis=1, keepdims=True)) / temperature)
    line_m = np.arange(len(label_m))
    cell_mk = line_m[:, None] * classes + label_mk
    votes_mK = np.bincount(cell_mk.ravel(), vote_mk.ravel(), minlength=len(label_m) * classes).reshape(-1, classes)
    right_m1 = votes_mK[line_m, label_m][:, None]
    ahead_mK = (votes_mK > right_m1) | ((votes_mK == right_m1) & (np.arange(classes) < label_m[:, None]))
    voted_m = (label_mk == label_m[:, None]).any(axis=1)
    return np.where(voted_m, ahead_mK.sum(axis=1), classes)


def unit(features_nd: NDArray[np.floating], device: torch.device) -> Tensor:
    """The features over their lengths, on the device; zeros stay."""
    features = torch.from_numpy(np.array(features_nd, np.float32)).to(device)
    features /= features.abs().amax(dim=1, keepdim=True).clamp_min(1e-38)  # squares overflow from 1e19 on
    return F.normalize(features, dim=1)
