"""Few-shot episodes: drawn from a seed before any network is looked at, and how well features do in them.

Legend: E episodes, W ways (classes of an episode), I images of a class in an episode, Q those of them that are queries,
N images, C classes to draw from, d feature width, b episodes at a time.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_BLOCK_BYTES = 32 << 20  # of features gathered at a time
_Z95 = 1.96  # of a normal distribution, both tails


def draw_episodes(
    images_C: NDArray[np.integer], *, ways: int, images: int, episodes: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Classes (E, W) of each episode and the places (E, W, I) of their images in the class, all distinct.

    A function of its arguments alone. The first images of a class are the same however many are asked for: with
    queries first and exemplars behind them, fewer shots are the same episodes with exemplars left out.

    Args:
        images_C: how many images each class has, at least `images`.
        ways: W, at most C.
        images: I, queries and exemplars of a class.
        episodes: E.
        seed: at least 0.
    """
    draws = np.random.Generator(np.random.Philox(key=seed))
    classes_EW = _distinct(np.full(episodes, len(images_C)), ways, draws)
    return classes_EW, _distinct(images_C[classes_EW], images, draws)


def _distinct(pools: NDArray[np.integer], count: int, draws: np.random.Generator) -> NDArray[np.int64]:
    """`count` distinct whole numbers (..., count) below each of `pools` (...), every ordered choice equally likely.

    The nth number is a place among those not taken yet. Counting past the taken ones in ascending order turns it into
    a number, without a list of the whole pool (a class may have any number of images, and there are 10,000 pools).
    """
    chosen = np.empty((*pools.shape, 0), np.int64)
    for taken in range(count):
        number = (draws.random(pools.shape) * (pools - taken)).astype(np.int64)
        for one in np.moveaxis(np.sort(chosen, axis=-1), -1, 0):
            number += number >= one
        chosen = np.concatenate([chosen, number[..., None]], axis=-1)
    return chosen


def episode_accuracy(
    features_Nd: NDArray[np.floating], rows_EWI: NDArray[np.integer], *, queries: int, shots: Sequence[int]
) -> NDArray[np.float64]:
    """Share of each episode's queries whose class has the nearest prototype, float64 (len(shots), E).

    A prototype is the mean of its class's exemplars, each divided by its length; the nearest is the one of the largest
    cosine with the query, the first of equals. A feature of zeros has cosine 0 with all. In float64, so that rounding
    decides nothing but exact ties. Memory: a few blocks of 32 MB, whatever N is; `features_Nd` may be memory-mapped.

    Args:
        features_Nd: finite features.
        rows_EWI: images of each class of each episode: Q queries, then exemplars.
        queries: Q.
        shots: numbers of exemplars, ascending, the last at most I - Q.
    """
    # Features are gathered anew for each episode: 2,000 episodes of 2,000 images take 1.6 s at 640 dimensions. The Gram
    # matrix of all images would take two thirds of that, and 20 GB for 50,000 images.
    scale_N = _inverse_lengths(features_Nd)
    truth_P = np.repeat(np.arange(rows_EWI.shape[1]), queries)
    accuracy = np.empty((len(shots), len(rows_EWI)))
    block = max(1, _BLOCK_BYTES // (8 * rows_EWI[0].size * features_Nd.shape[1]))
    for start in range(0, len(rows_EWI), block):
        rows_bWI = rows_EWI[start : start + block]
        unit_bWId = features_Nd[rows_bWI] * scale_N[rows_bWI][..., None]
        queries_bPd = unit_bWId[:, :, :queries].reshape(len(rows_bWI), len(truth_P), -1)
        total_bWd = np.zeros_like(unit_bWId[:, :, 0])
        for n, (fewer, more) in enumerate(pairwise((0, *shots))):
            total_bWd += unit_bWId[:, :, queries + fewer : queries + more].sum(axis=2)
            # The length of the query changes no argmax, and the number of exemplars goes with the prototype's length.
            cosine_bPW = queries_bPd @ _unit(total_bWd).swapaxes(1, 2)
            accuracy[n, start : start + block] = (cosine_bPW.argmax(axis=2) == truth_P).mean(axis=1)
    return accuracy


def mean_and_interval(accuracy_E: NDArray[np.float64]) -> tuple[float, float]:
    """The mean over episodes, and half the width of its 95 % interval: 1.96 s / sqrt(E), s the sample deviation."""
    return float(accuracy_E.mean()), float(_Z95 * accuracy_E.std(ddof=1) / np.sqrt(len(accuracy_E)))


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)


def _inverse_lengths(features_Nd: NDArray[np.floating]) -> NDArray[np.float64]:
    """1 / |x|, (N,); 0 where x is 0."""
    scale_N = np.zeros(len(features_Nd))
    step = max(1, _BLOCK_BYTES // (8 * features_Nd.shape[1]))
    for start in range(0, len(features_Nd), step):
        length_n = np.linalg.norm(features_Nd[start : start + step].astype(np.float64), axis=1)
        np.divide(1, length_n, out=scale_N[start : start + step], where=length_n > 0)
    return scale_N
