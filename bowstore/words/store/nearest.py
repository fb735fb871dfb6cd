"""For each word, the images whose cells lie nearest to it, found while all images are encoded.

They show what a word means (`bowstore words`). An image occurs once, with its nearest cell. What is kept depends only
on the cells that were seen, not on their order: ties go to the lower row, then to the lower cell.

Legend: B batch, M cells of an image, K words, n images kept for each word.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bowstore.files import atomic_file
from bowstore.limits import KEPT_IMAGES
from bowstore.words.store.arrays import reading
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
        self._kept, self._farthest_K = kept, np.full(num_words, np.inf, np.float32)
        self._cells: list[Cells] = [_NO_CELLS]  # what is kept, in order, then what waits

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
        return self._wait(found.nearest(self._kept))

    def add(self, cells: "Cells") -> None:
        """Consider what another search returned."""
        self._wait(cells.at(cells.distance <= self._farthest_K[cells.word]))

    def merge(self, other: NearestImages) -> None:
        """Consider what another search kept."""
        word, place = np.nonzero(other.row_Kn >= 0)
        self.add(Cells(word, other.row_Kn[word, place], other.cell_Kn[word, place], other.distance_Kn[word, place]))

    def result(self) -> NearestImages:
        """What was kept."""
        cells, shape = self._rank(), (len(self._farthest_K), self._kept)
        row_Kn, cell_Kn = np.full((2, *shape), NO_ROW, np.int64)
        distance_Kn = np.full(shape, np.nan, np.float32)
        at = cells.word, cells.places()
        row_Kn[at], cell_Kn[at], distance_Kn[at] = cells.row, cells.cell, cells.distance
        return NearestImages(row_Kn, cell_Kn, distance_Kn)

    def _wait(self, cells: "Cells") -> "Cells":
        self._cells.append(cells)
        if sum(len(each.word) for each in self._cells[1:]) >= len(self._farthest_K) * self._kept:
            self._rank()
        return cells

    def _rank(self) -> "Cells":
        """Keep the nearest of what is kept and what waits."""
        kept, *waiting = self._cells
        if waiting:
            come = joined(waiting)
            # Only words of which cells have come are ranked anew: late in a pass these are few of the K.
            again = np.isin(kept.word, come.word)
            cells = joined([kept.at(~again), joined([kept.at(again), come]).nearest(self._kept)])
            self._cells = [kept := cells.at(np.argsort(cells.word, kind="stable"))]
            last = kept.places() == self._kept - 1
            self._farthest_K[kept.word[last]] = kept.distance[last]
        return kept


class Cells(NamedTuple):
    """Cells of images: int64 word, row of the store and place in the grid, float32 distance to the word, at least 0."""

    word: NDArray[np.int64]
    row: NDArray[np.int64]
    cell: NDArray[np.int64]
    distance: NDArray[np.float32]

    def nearest(self, kept: int) -> "Cells":
        """Of each word the first images by distance, then by row, each with its nearest cell, then the lowest."""
        # Pairs in one number, which sorts faster: words have 16 bits, cells of an image at most 20, and floats of one
        # sign are ordered as their bits are.
        near = (self.word << 32) | np.abs(self.distance).view(np.uint32).astype(np.int64)
        cells = self.at(np.lexsort((self.row << 20 | self.cell, near)))
        _, first = np.unique(cells.word << 47 | cells.row, return_index=True)  # of each image of each word
        cells = cells.at(np.sort(first))
        return cells.at(cells.places() < kept)

    def places(self) -> NDArray[np.int64]:
        """Of each cell how many of its word are before it, where words are in order."""
        return np.arange(len(self.word)) - np.searchsorted(self.word, self.word)

    def at(self, order: NDArray[Any]) -> "Cells":
        """Those at these places."""
        return Cells(self.word[order], self.row[order], self.cell[order], self.distance[order])


_NONE = np.empty(0, np.int64)
_NO_CELLS = Cells(_NONE, _NONE, _NONE, _NONE.astype(np.float32))


def joined(parts: Sequence[Cells]) -> Cells:
    """The cells of all parts, of which there is at least one."""
    word, row, cell, distance = zip(*parts, strict=True)
    return Cells(np.concatenate(word), np.concatenate(row), np.concatenate(cell), np.concatenate(distance))


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
    with reading(str(path), "remove it and run the same command again"):
        with np.load(io.BytesIO(path.read_bytes())) as values:  # of a damaged file NumPy forgets to close
            return NearestImages(**values)
