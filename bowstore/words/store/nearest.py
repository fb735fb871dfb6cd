"""For each word, the images whose cells lie nearest to it, found while all images are encoded.

They show what a word means (`bowstore words`). An image occurs once, with its nearest cell. What is kept depends only
on the cells that were seen, not on their order: ties go to the lower row, then to the lower cell.

Legend: B batch, M cells of an image, K words, n images kept for each word.
"""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bowstore.errors import CorruptError, is_machine_error
from bowstore.files import atomic_file
from bowstore.limits import KEPT_IMAGES
from bowstore.words.store.schema import NO_ROW


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
    """Keeps the n nearest images of each of K words.

    Cells that may count wait until there are as many of them as are kept at most; then all are ranked at once. While
    few images have been seen nearly every cell counts, and to rank after each batch takes longer than a GPU does for
    the batch itself (256 images of 14 x 14 cells, K = 20000: 138 ms of a core for each of the first 25, 19 so).
    """

    def __init__(self, num_words: int, kept: int = KEPT_IMAGES) -> None:
        self._distance_Kn = np.full((num_words, kept), np.inf, np.float32)
        self._row_Kn = np.full((num_words, kept), NO_ROW, np.int64)
        self._cell_Kn = np.full((num_words, kept), NO_ROW, np.int64)
        self._farthest_K = self._distance_Kn[:, -1].copy()
        self._waiting: list[Cells] = []

    def add_batch(
        self, rows_B: NDArray[np.int64], words_BM: NDArray[np.uint16], distance_BM: NDArray[np.float32]
    ) -> "Cells":
        """Consider all cells of some images; return those that may be among the nearest.

        An image that is among the nearest of all is among those of any part of the images, too: what several searches
        return for their parts is all that a search over all of them needs.

        Args:
            rows_B: int64, rows of the store.
            words_BM: uint16, the words of their cells.
            distance_BM: float32, distances of the cells' vectors to these words.
        """
        # Most cells are farther off than what is kept already: one comparison is all that they cost.
        image, cell = np.nonzero(distance_BM <= self._farthest_K[words_BM])
        found = Cells(words_BM[image, cell].astype(np.int64), rows_B[image], cell, distance_BM[image, cell])
        return self._wait(found.nearest_of_images())

    def add(self, cells: "Cells") -> None:
        """Consider what another search returned."""
        self._wait(cells.at(np.flatnonzero(cells.distance <= self._farthest_K[cells.word])))

    def merge(self, other: NearestImages) -> None:
        """Consider what another search kept."""
        word, place = np.nonzero(other.row_Kn >= 0)
        self.add(Cells(word, other.row_Kn[word, place], other.cell_Kn[word, place], other.distance_Kn[word, place]))

    def result(self) -> NearestImages:
        """What was kept, as a copy."""
        self._rank()
        none = self._row_Kn < 0
        distance_Kn = np.where(none, np.float32(np.nan), self._distance_Kn)
        return NearestImages(self._row_Kn.copy(), self._cell_Kn.copy(), distance_Kn)

    def _wait(self, cells: "Cells") -> "Cells":
        self._waiting.append(cells)
        if sum(len(each.word) for each in self._waiting) >= self._row_Kn.size:
            self._rank()
        return cells

    def _rank(self) -> None:
        """Keep the nearest of what is kept and what waits."""
        if not self._waiting:
            return
        come = joined(self._waiting)
        self._waiting = []
        # Only words of which cells have come are looked at: late in a pass these are few of the K.
        touched = np.flatnonzero(np.bincount(come.word, minlength=len(self._row_Kn)))
        place, rank = np.nonzero(self._row_Kn[touched] >= 0)
        word = touched[place]
        have = Cells(word, self._row_Kn[word, rank], self._cell_Kn[word, rank], self._distance_Kn[word, rank])
        cells = joined([have, come])
        self._keep(touched, cells.nearest_first())
        # An image that is there already with another cell may take two of the n places. That is rare (a unit that was
        # made twice), and to look for it before would be a second sort of everything each time.
        ordered_Tn = np.sort(self._row_Kn[touched], axis=1)
        if ((ordered_Tn[:, 1:] == ordered_Tn[:, :-1]) & (ordered_Tn[:, 1:] >= 0)).any():
            self._keep(touched, cells.nearest_of_images().nearest_first())  # images that came twice

    def _keep(self, touched: NDArray[np.intp], cells: "Cells") -> None:
        """Take the first n of each of these words."""
        # The cells are sorted: a cell's rank among those of its word is its distance from where their run starts.
        starts = np.flatnonzero(_first_of_runs(cells.word))
        place = np.arange(len(cells.word)) - np.repeat(starts, np.diff(starts, append=len(cells.word)))
        kept = place < self._row_Kn.shape[1]
        target = cells.word[kept], place[kept]
        for into, none, values in (
            (self._row_Kn, NO_ROW, cells.row),
            (self._cell_Kn, NO_ROW, cells.cell),
            (self._distance_Kn, np.inf, cells.distance),
        ):
            into[touched] = none
            into[target] = values[kept]
        self._farthest_K[touched] = self._distance_Kn[touched, -1]


class Cells(NamedTuple):
    """Cells of images: int64 word, row of the store and place in the grid, float32 distance to the word, at least 0."""

    word: NDArray[np.int64]
    row: NDArray[np.int64]
    cell: NDArray[np.int64]
    distance: NDArray[np.float32]

    def nearest_of_images(self) -> "Cells":
        """Of each word and image the nearest cell, of equally near ones the lowest."""
        order = np.lexsort((self.cell, self._word_and_distance(), self.row))
        return self.at(order[_first_of_runs(self.word[order], self.row[order])])

    def nearest_first(self) -> "Cells":
        """By word, then by distance, then by row."""
        return self.at(np.lexsort((self.row, self._word_and_distance())))

    def _word_and_distance(self) -> NDArray[np.int64]:
        """One number to sort by: floats of one sign are ordered as their bits are."""
        ordered: NDArray[np.int64] = (self.word << 32) | np.abs(self.distance).view(np.uint32).astype(np.int64)
        return ordered

    def at(self, order: NDArray[np.intp]) -> "Cells":
        """Those at these places."""
        return Cells(self.word[order], self.row[order], self.cell[order], self.distance[order])


def joined(parts: Sequence[Cells]) -> Cells:
    """The cells of all parts, of which there is at least one."""
    word, row, cell, distance = zip(*parts, strict=True)
    return Cells(np.concatenate(word), np.concatenate(row), np.concatenate(cell), np.concatenate(distance))


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


def load_nearest(path: Path) -> NearestImages:
    """What `save_nearest` wrote.

    Raises:
        CorruptError: it is no such file.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes())) as values:  # of a damaged file NumPy forgets to close
            return NearestImages(**values)
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        if is_machine_error(error):
            raise
        raise CorruptError(f"{path} is damaged ({error}); remove it and run the same command again") from error
