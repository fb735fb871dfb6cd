"""For each word, the images whose cells lie nearest to it, found while all images are encoded.

They show what a word means (`bowstore words`). An image occurs once, with its nearest cell. What is kept depends only
on the cells that were seen, not on their order: ties go to the lower row, then to the lower cell.

Legend: B batch, M cells of an image, K words, n images kept for each word.
"""

import io
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bowstore.errors import CorruptError, is_machine_error
from bowstore.files import atomic_file
from bowstore.limits import KEPT_IMAGES

NO_ROW = -1


class NearestImages(NamedTuple):
    """The images nearest to each word, in order of distance.

    Attributes:
        row_Kn: int64, rows of the store; -1 where fewer than n images hold the word.
        cell_Kn: int64, the cell of the word grid, counted row by row; -1 likewise.
        distance_Kn: float32, Euclidean distance of the cell's vector to the word; NaN likewise.
    """

    row_Kn: NDArray[np.int64]
    cell_Kn: NDArray[np.int64]
    distance_Kn: NDArray[np.float32]


class NearestSearch:
    """Keeps the n nearest images of each of K words."""

    def __init__(self, num_words: int, kept: int = KEPT_IMAGES) -> None:
        self._distance_Kn = np.full((num_words, kept), np.inf, np.float32)
        self._row_Kn = np.full((num_words, kept), NO_ROW, np.int64)
        self._cell_Kn = np.full((num_words, kept), NO_ROW, np.int64)

    def add_batch(
        self, rows_B: NDArray[np.int64], words_BM: NDArray[np.uint16], distance_BM: NDArray[np.float32]
    ) -> None:
        """Consider all cells of some images.

        Args:
            rows_B: int64, rows of the store.
            words_BM: uint16, the words of their cells.
            distance_BM: float32, distances of the cells' vectors to these words.
        """
        # Most cells are farther off than what is kept already: one comparison is all that they cost.
        image, cell = np.nonzero(distance_BM <= self._distance_Kn[words_BM, -1])
        self._add(words_BM[image, cell].astype(np.int64), rows_B[image], cell, distance_BM[image, cell])

    def merge(self, other: NearestImages) -> None:
        """Consider what another search kept."""
        word, place = np.nonzero(other.row_Kn >= 0)
        self._add(word, other.row_Kn[word, place], other.cell_Kn[word, place], other.distance_Kn[word, place])

    def result(self) -> NearestImages:
        """What was kept, as a copy."""
        none = self._row_Kn < 0
        distance_Kn = np.where(none, np.float32(np.nan), self._distance_Kn)
        return NearestImages(self._row_Kn.copy(), self._cell_Kn.copy(), distance_Kn)

    def _add(
        self, word: NDArray[np.int64], row: NDArray[np.int64], cell: NDArray[np.int64], distance: NDArray[np.float32]
    ) -> None:
        if not len(word):
            return
        touched = np.unique(word)
        have = self._row_Kn[touched] >= 0
        word = np.concatenate([np.repeat(touched, have.sum(axis=1)), word])
        row = np.concatenate([self._row_Kn[touched][have], row])
        cell = np.concatenate([self._cell_Kn[touched][have], cell])
        distance = np.concatenate([self._distance_Kn[touched][have], distance])
        order = np.lexsort((cell, distance, row, word))  # the nearest cell of each image first
        order = order[_first_of_runs(word[order], row[order])]
        order = order[np.lexsort((row[order], distance[order], word[order]))]
        starts = np.flatnonzero(_first_of_runs(word[order]))
        place = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        kept = place < self._row_Kn.shape[1]
        target = word[order][kept], place[kept]
        for into, values in ((self._row_Kn, row), (self._cell_Kn, cell), (self._distance_Kn, distance)):
            into[target] = values[order][kept]


def _first_of_runs(*columns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Places of the first of each run of equal values."""
    first = np.ones(len(columns[0]), dtype=bool)
    first[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return first


def save_nearest(path: Path, nearest: NearestImages) -> None:
    """Write a search's result to a file, atomically: what a process saw of the images outlives it."""
    buffer = io.BytesIO()
    np.savez(buffer, **nearest._asdict())
    with atomic_file(path) as file:
        file.write(buffer.getbuffer())


def load_nearest(paths: Iterable[Path]) -> Iterator[NearestImages]:
    """The results that `save_nearest` wrote.

    Raises:
        CorruptError: a file that is not one.
    """
    for path in paths:
        try:
            with np.load(io.BytesIO(path.read_bytes())) as values:  # of a damaged file NumPy forgets to close
                yield NearestImages(**values)
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            if is_machine_error(error):
                raise
            raise CorruptError(f"{path} is damaged ({error}); remove it and run the same command again") from error
