"""How well test images find the train images of their class, over the full ranking, in bounded memory.

Legend: N train images, M test images, d feature width; n and m images at a time.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.evaluate.blocks import blocks, slices
from bowstore.evaluate.neighbours import TRAIN_BLOCK, unit
from bowstore.evaluate.protocol import Features, Scores, num_classes
from bowstore.evaluate.protocols.retrieval import RECALLS
from bowstore.evaluate.train_test import SampleSettings
from bowstore.exact import exact_float32
from bowstore.progress import Progress

_CELLS = 1 << 24  # of the table of cosines at a time, and of those made of it: 29 bytes a cell


def score(features: Features, _settings: SampleSettings) -> Scores:
    """The split "test" queries the split "train"."""
    train, test = features["train"], features["test"]
    first_M, precision_M = rankings(
        train.taps["pooled"], train.labels, test.taps["pooled"], test.labels, device=torch.device(features.device)
    )
    metrics = {f"recall@{k}": float((first_M < k).mean()) for k in RECALLS}
    return Scores(metrics={**metrics, "map": float(precision_M.mean())}, settings={"classes": num_classes(train)})


def rankings(
    train_Nd: NDArray[np.floating],
    train_labels_N: NDArray[np.integer],
    test_Md: NDArray[np.floating],
    test_labels_M: NDArray[np.integer],
    *,
    device: torch.device,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each test image how many train images are ahead of the first of its class, and its average precision.

    Train images are ranked by falling cosine, of equal cosines the lower rows first. Average precision is the mean,
    over the train images of the class, of the share of that class among the images up to and with this one.

    Memory: some 0.5 GB for the rankings of as many test images as that allows; beside them blocks of 16,384 train
    images, or all of them where that takes a gigabyte at most (of a GPU: what it holds). Else train features are read
    anew for each such group: they may be memory-mapped. Cosines are computed on `device` in full float32.
    """
    train_N = torch.from_numpy(train_labels_N.astype(np.int64)).to(device)
    test_M = torch.from_numpy(test_labels_M.astype(np.int64)).to(device)
    train = blocks(
        lambda part: unit(train_Nd[part], device),
        *(len(train_Nd), TRAIN_BLOCK),
        size_bytes=4 * train_Nd.size,
        device=device,
    )
    first, precision = [], []
    with exact_float32(), torch.no_grad(), Progress("retrieval", len(test_Md)) as progress:
        for at in slices(len(test_Md), max(1, _CELLS // len(train_Nd))):
            test_md = unit(test_Md[at], device)
            cosine_mN = torch.cat([test_md @ train_nd.T for train_nd in train()], dim=1)
            order_mN = cosine_mN.sort(dim=1, descending=True, stable=True).indices
            first_m, precision_m = _of_ranking(train_N[order_mN] == test_M[at, None])
            first.append(first_m.cpu())
            precision.append(precision_m.cpu())
            progress.advance(len(test_md))
    return torch.cat(first).numpy(), torch.cat(precision).numpy()


def _of_ranking(right_mN: Tensor) -> tuple[Tensor, Tensor]:
    """Places ahead of the first right one, int64 (m,), and average precision, float64 (m,), of each line."""
    found_mN = right_mN.cumsum(dim=1)
    total_m, first_m = found_mN[:, -1], (found_mN == 0).sum(dim=1)
    rank_N = torch.arange(1, right_mN.shape[1] + 1, dtype=torch.float64, device=right_mN.device)
    return first_m, (found_mN / rank_N).mul_(right_mN).sum(dim=1) / total_m
