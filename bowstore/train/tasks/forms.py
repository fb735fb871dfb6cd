"""What bags are made of a layer's words: the whole image's, one for each cell of a pyramid, or that of what is seen.

Legend: B batch, M bag slots (locations of the word map), h w word map, P cells of all grids, K words.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.config import ViewConfig
from bowstore.data.index import Index
from bowstore.data.plan import Origin, Plan, plan_of
from bowstore.data.shown import CleanGrid, shown
from bowstore.words.targets.bags import Bag, Form, MeanBag, bag_of, mix_bags, unpacked, words_in_cells


class BagForm(ABC):
    """Bags of the images of a batch.

    Attributes:
        bags: how many of them an image has, each with a head of its own.
    """

    bags: int = 1

    @abstractmethod
    def numbers(self, plan: Plan) -> tuple[NDArray[Any], ...]:
        """What `make` takes of a plan, besides the words."""

    @abstractmethod
    def make(self, packed_BM: Tensor, *numbers: Tensor) -> list[Bag]:
        """The bags of words (B, M), uint16 bit for bit as int16, and of the plan's numbers."""

    @abstractmethod
    def add(self, words_BM: NDArray[np.uint16]) -> None:
        """Count the words of some rows in the mean bags."""

    @abstractmethod
    def marginal_loss(self) -> float:
        """The loss, nats, of predicting the mean bags of all rows that were added, whatever the image."""


class WholeBag(BagForm):
    """The bag of the whole image, whatever the crop and the flip (paper, Eq. 3 and 4)."""

    def __init__(self, form: Form, num_words: int) -> None:
        self._form, self._mean = form, MeanBag(num_words)

    def numbers(self, plan: Plan) -> tuple[NDArray[Any], ...]:
        """As `mix_bags` takes them."""
        return plan.mixing(plan.kept)

    def make(self, packed_BM: Tensor, *mixed: Tensor) -> list[Bag]:
        """One bag."""
        bag = bag_of(unpacked(packed_BM), self._form)
        return [mix_bags(bag, *mixed) if mixed else bag]

    def add(self, words_BM: NDArray[np.uint16]) -> None:
        """As in the base class; mixing leaves the mean bag as it is."""
        self._mean.add(*self.make(torch.from_numpy(words_BM.view(np.int16))))

    def marginal_loss(self) -> float:
        """The entropy of the mean bag."""
        return self._mean.entropy()


class PyramidBags(BagForm):
    """Count bags of the cells of a spatial pyramid (Sp-BoWNet, paper, Table 1), grid after grid, in reading order.

    Cells are those of the whole clean image, mirrored where the image is, whatever the crop. Of a mixed image, the
    target of a cell of the output is y(A) in the share of that cell's area that is not pasted over, else y(B), of the
    same cell of each image as it lies in the output.

    Args:
        num_words: K.
        grid: (h, w) of the word map.
        grids: cells along each axis, of each grid; all divide h and w.
        flip: whether half of the images are mirrored.
    """

    def __init__(self, num_words: int, grid: tuple[int, int], grids: tuple[int, ...], *, flip: bool) -> None:
        self._grid, self._grids, self._flip = grid, grids, flip
        self.bags = sum(cells**2 for cells in grids)
        self._means = [MeanBag(num_words) for _ in range(self.bags)]

    def numbers(self, plan: Plan) -> tuple[NDArray[Any], ...]:
        """Who is mirrored, and as `mix_bags` takes them, with the share of each cell that is kept."""
        kept_BP = np.concatenate([plan.kept_in((cells, cells)) for cells in self._grids], axis=1)
        return plan.mirror.astype(np.bool_), *plan.mixing(kept_BP)

    def make(self, packed_BM: Tensor, *numbers: Tensor) -> list[Bag]:
        """A bag for each cell."""
        mirror_B, *mixed = numbers
        words_Bhw = unpacked(packed_BM).view(-1, *self._grid)
        # A partner is mirrored by its own flip: the one that its words are given here, before they are mixed.
        words_Bhw = torch.where(mirror_B[:, None, None], words_Bhw.flip(2), words_Bhw)
        bags = [bag_of(words_Bm, "count") for words_Bm in self._cells(words_Bhw)]
        if not mixed:
            return bags
        partner_B, kept_BP = mixed
        return [mix_bags(bag, partner_B, kept_B) for bag, kept_B in zip(bags, kept_BP.unbind(1), strict=True)]

    def add(self, words_BM: NDArray[np.uint16]) -> None:
        """As in the base class: with flips, a cell of the output has half of its images' words from the other side."""
        words_Bhw = unpacked(torch.from_numpy(words_BM.view(np.int16))).view(-1, *self._grid)
        for seen_Bhw in (words_Bhw, words_Bhw.flip(2))[: 1 + self._flip]:
            for mean, words_Bm in zip(self._means, self._cells(seen_Bhw), strict=True):
                mean.add(bag_of(words_Bm, "count"))

    def marginal_loss(self) -> float:
        """The mean of the entropies of the cells' mean bags."""
        return sum(mean.entropy() for mean in self._means) / self.bags

    def _cells(self, words_Bhw: Tensor) -> list[Tensor]:
        """The words (B, m) of each cell."""
        return [words_Bm for cells in self._grids for words_Bm in words_in_cells(words_Bhw, cells).unbind(1)]


class ShownBag(BagForm):
    """The bag of the cells that the crop window shows, each by the area that is seen of it (beyond the paper).

    `bowstore.data.shown` says how much of each cell is seen. In a mixed image these are the cells of A outside the box
    and those of B inside it; each image's part of the bag weighs its share of the area.

    Args:
        form: count: a word weighs the area in which it is seen; binary: all words that are seen weigh the same.
        num_words: K.
        grid: of the words, over the clean view.
        index: of the images, for their sides.
        view: the train view.
        seed: of the run.
    """

    def __init__(self, form: Form, num_words: int, grid: CleanGrid, index: Index, view: ViewConfig, seed: int) -> None:
        self._form, self._grid, self._index, self._view, self._seed = form, grid, index, view, seed
        self._mean, self._rows = MeanBag(num_words), 0

    def numbers(self, plan: Plan) -> tuple[NDArray[Any], ...]:
        """What is seen of each cell; where images are mixed, also their partners, and what is seen of theirs."""
        index, rows = self._index, plan.rows
        own_BM, pasted_BM = shown(plan, index.height[rows], index.width[rows], self._grid)
        return own_BM, *plan.mixing(pasted_BM)

    def make(self, packed_BM: Tensor, *numbers: Tensor) -> list[Bag]:
        """One bag."""
        words_BM, (own_BM, *mixed) = unpacked(packed_BM), numbers
        own = bag_of(words_BM, self._form, own_BM)
        if not mixed:
            return [own]
        partner_B, pasted_BM = mixed
        pasted = bag_of(words_BM[partner_B], self._form, pasted_BM)
        return [Bag(*(torch.cat(parts, dim=1) for parts in zip(own, pasted, strict=True)))]

    def add(self, words_BM: NDArray[np.uint16]) -> None:
        """As in the base class, for one perturbation of each image.

        Where images are mixed, each is its own partner: what is pasted into others is, in the mean, what it would paste
        into itself.
        """
        rows = np.arange(self._rows, self._rows + len(words_BM))
        plan = plan_of(rows, self._index, self._view, Origin(self._seed, 0, self._rows))
        plan = replace(plan, partner=np.arange(len(rows), dtype=np.int32))
        numbers = map(torch.from_numpy, self.numbers(plan))
        self._mean.add(*self.make(torch.from_numpy(words_BM.view(np.int16)), *numbers))
        self._rows += len(rows)

    def marginal_loss(self) -> float:
        """The entropy of the mean bag."""
        return self._mean.entropy()
