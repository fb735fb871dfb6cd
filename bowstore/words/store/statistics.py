"""How the words of a data set are used.

Legend: N images, M locations of an image, K words.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_COLLAPSED_SHARE = 0.5


class WordStatistics(NamedTuple):
    """Use of the words over all images.

    Attributes:
        document_frequency_K: int64, images that hold the word.
        count_K: int64, locations that hold the word.
        image_perplexity: mean over images of exp(entropy of the image's words): distinct words, evenly used.
    """

    document_frequency_K: NDArray[np.int64]
    count_K: NDArray[np.int64]
    image_perplexity: float

    def summary(self) -> dict[str, Any]:
        """Plain values for attributes and reports."""
        return {
            "unused_words": int((self.count_K == 0).sum()),
            "perplexity": perplexity(self.count_K),
            "image_perplexity": self.image_perplexity,
            "largest_share": float(self.count_K.max() / self.count_K.sum()),
            "largest_word": int(self.count_K.argmax()),
        }


def word_statistics(parts: Iterable[NDArray[np.uint16]], num_words: int) -> WordStatistics:
    """Statistics of words given in parts (n, h, w), all below K."""
    document_frequency_K, count_K = np.zeros(num_words, dtype=np.int64), np.zeros(num_words, dtype=np.int64)
    images, total = 0, 0.0
    for words in parts:
        ordered_NM = np.sort(words.reshape(len(words), -1), axis=1)
        first_NM = np.ones(ordered_NM.shape, dtype=bool)
        first_NM[:, 1:] = ordered_NM[:, 1:] != ordered_NM[:, :-1]
        starts = np.flatnonzero(first_NM)  # of runs of equal words; each image starts a run
        lengths = np.diff(starts, append=ordered_NM.size)
        document_frequency_K += np.bincount(ordered_NM[first_NM], minlength=num_words)
        count_K += np.bincount(ordered_NM[first_NM], weights=lengths, minlength=num_words).astype(np.int64)
        locations = ordered_NM.shape[1]
        spread_N = np.bincount(starts // locations, weights=lengths * np.log(lengths), minlength=len(words))
        images, total = images + len(words), total + float((locations * np.exp(-spread_N / locations)).sum())
    return WordStatistics(document_frequency_K, count_K, total / images)


def perplexity(count_K: NDArray[np.int64]) -> float:
    """Exp of the entropy of a distribution of words: how many words, evenly used, it would take."""
    share = count_K[count_K > 0] / count_K.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def health_warnings(summary: dict[str, Any], num_words: int) -> tuple[str, ...]:
    """One line for each sign that a vocabulary says little about the images."""
    lines = []
    if num_words > 1 and summary["largest_share"] > _COLLAPSED_SHARE:
        lines.append(
            f"the vocabulary has collapsed: word {summary['largest_word']} fills "
            f"{100 * summary['largest_share']:.0f} % of all locations; is the teacher trained? Try another layer or K"
        )
    if summary["unused_words"] > num_words // 2:
        lines.append(f"{summary['unused_words']} of {num_words} words occur in no image; a smaller --K would do")
    return tuple(lines)
