"""What a page of words shows: which words, how they are used, their nearest images, which words go together.

Counts come from one pass over a layer's chunks, one chunk in memory at a time. Only the hashes of keys grow with
the images (8 bytes each), and only while the shards are searched for those that are shown.

Legend: N images, M cells of an image, h w word grid, K words, S words whose co-occurrence is counted, n images kept for
each word, U distinct rows that are looked up.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from bowstore.data.index import Index
from bowstore.data.views import CleanView
from bowstore.errors import MismatchError, MissingError, UsageError
from bowstore.progress import Progress, say
from bowstore.report.config import Wish
from bowstore.words.store.arrays import reading
from bowstore.words.store.join import other_images, rows_of
from bowstore.words.store.layer import Layer
from bowstore.words.store.nearest import NearestImages
from bowstore.words.store.statistics import health_warnings
from bowstore.words.store.store import Store

NEIGHBOURS = 6
MIN_COMMON_IMAGES = 3


@dataclass(frozen=True)
class Example:
    """An image of a word.

    Attributes:
        key: the image's.
        index_row: its row in the shards' index.
        cell: (i, j) on the word grid.
        distance: Euclidean, of the cell's vector to the word.
    """

    key: str
    index_row: int
    cell: tuple[int, int]
    distance: float


@dataclass(frozen=True)
class Neighbour:
    """A word that shares images with another one more often than chance.

    Attributes:
        word: its id.
        images: that hold it.
        common: images that hold both.
        lift: common images over those that chance would give.
        npmi: normalised pointwise mutual information over images, above 0, at most 1.
        example: its nearest image; None if these shards have none of its images.
    """

    word: int
    images: int
    common: int
    lift: float
    npmi: float
    example: Example | None = None


@dataclass(frozen=True)
class Word:
    """One word.

    Attributes:
        word: its id.
        images: that hold it.
        cells: that hold it, over all images.
        share: of all cells.
        examples: its nearest images among those that the shards have, nearest first.
        neighbours: the words that go with it, most strongly bound first.
    """

    word: int
    images: int
    cells: int
    share: float
    examples: tuple[Example, ...]
    neighbours: tuple[Neighbour, ...]


class Gallery(NamedTuple):
    """Some words under a heading: a name, which words these are, their ids."""

    title: str
    about: str
    words: tuple[int, ...]


class Usage(NamedTuple):
    """How a layer's words are used.

    Attributes:
        count_K: int64, cells that hold each word.
        distinct: int64 (M + 1,), images by their number of distinct words.
        common_SK: int64, images that hold each of S words and each word.
    """

    count_K: NDArray[np.int64]
    distinct: NDArray[np.int64]
    common_SK: NDArray[np.int64]


@dataclass(frozen=True)
class LayerWords:
    """The words of a layer that are shown, and what the layer is.

    Attributes:
        layer: of the store.
        view: what its teacher saw.
        usage: of all its words.
        document_frequency_K: int64, images that hold each word.
        galleries: which words.
        words: those words, by id.
        looked_up: distinct images nearest to them.
        missing: how many of those the shards lack; they are left out.
        warnings: signs that the vocabulary says little, a line each.
    """

    layer: Layer
    view: CleanView
    usage: Usage
    document_frequency_K: NDArray[np.int64]
    galleries: tuple[Gallery, ...]
    words: dict[int, Word]
    looked_up: int
    missing: int
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        layer = self.layer
        words = [asdict(word) for word in self.words.values()]
        for place in (*words, *(neighbour for word in words for neighbour in word["neighbours"])):
            for example in place.get("examples") or filter(None, [place.get("example")]):
                del example["index_row"]
        return {
            "layer": layer.name,
            "teacher": layer.attributes["teacher"],
            "K": layer.num_words,
            "images": layer.images,
            "grid": layer.grid,
            "receptive_field": layer.attributes.get("receptive_field"),
            "statistics": layer.attributes["statistics"],
            "warnings": self.warnings,
            "galleries": [gallery._asdict() for gallery in self.galleries],
            "words": words,
            "images_looked_up": self.looked_up,
            "images_missing": self.missing,
        }


def collect(store: Store, index: Index, wish: Wish) -> tuple[LayerWords, ...]:
    """Everything that a page shows except pixels, for one layer or all complete ones.

    Raises:
        MissingError: no such layer, or none of the images that would be shown is in the shards.
        MismatchError: the layer is not complete, or the shards hold other images under its keys.
        UsageError: a word that a layer does not have.
        CorruptError: a damaged chunk, or metadata that cannot be used.
    """
    if wish.layer is None:
        left_out = [layer.name for layer in store.every_layer.values() if not layer.complete]
        if left_out:
            say(f"not complete, left out: {', '.join(left_out)}")
    layers = [store.layer(name) for name in ([wish.layer] if wish.layer else store.layers)]
    for layer in layers:
        above = [word for word in wish.words if word >= layer.num_words]
        if above:
            raise UsageError(
                f"word {above[0]} is not below K = {layer.num_words} of layer {layer.name!r}; name words from 0 to "
                f"{layer.num_words - 1}" + ("" if len(layers) == 1 else ", or one layer with --layer")
            )
    return tuple(_collect_layer(store, layer, index, wish) for layer in layers)


def _collect_layer(store: Store, layer: Layer, index: Index, wish: Wish) -> LayerWords:
    with reading(f"layer {layer.name!r} of word store {store.path}"):
        values = layer.attributes["view"]
        view = CleanView(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
    document_frequency_K = layer.read_array("document_frequency")
    galleries = choose_words(document_frequency_K, wish)
    shown = tuple(dict.fromkeys(word for gallery in galleries for word in gallery.words))
    usage = count_words(layer, shown)
    company = {
        word: strongest_neighbours(common_K, document_frequency_K, word, layer.images)
        for word, common_K in zip(shown, usage.common_SK, strict=True)
    }
    looked_up = [*shown, *(found.word for some in company.values() for found in some)]
    images = _Images(store, layer, index, looked_up, reencoded=wish.reencoded)
    if images.looked_up and images.looked_up == images.missing:
        raise MissingError(
            f"none of the {images.looked_up} images nearest to the words shown is in shards {index.place} "
            f"({len(index)} images; word store {store.path} has {len(store)}); name the shards that were encoded"
        )
    words = {
        word: Word(
            word,
            int(document_frequency_K[word]),
            int(usage.count_K[word]),
            float(usage.count_K[word] / usage.count_K.sum()),
            images.nearest(word, wish.examples_shown),
            tuple(replace(n, example=next(iter(images.nearest(n.word, 1)), None)) for n in company[word]),
        )
        for word in shown
    }
    warnings = health_warnings(layer.attributes["statistics"], layer.num_words)
    return LayerWords(
        layer, view, usage, document_frequency_K, galleries, words, images.looked_up, images.missing, warnings
    )


def choose_words(document_frequency_K: NDArray[np.int64], wish: Wish) -> tuple[Gallery, ...]:
    """The galleries: words that were named; or random, most and least frequent ones among those that are used.

    Args:
        document_frequency_K: int64, images that hold each word.
        wish: how many, or which.
    """
    if wish.words:
        return (Gallery("Chosen words", "those that were named", tuple(dict.fromkeys(wish.words))),)
    used = np.flatnonzero(document_frequency_K)
    count = min(wish.per_gallery, len(used))
    by_use = used[np.argsort(document_frequency_K[used], kind="stable")]  # of equals the lower id first
    falling = used[np.argsort(-document_frequency_K[used], kind="stable")]
    drawn = np.sort(np.random.default_rng(wish.seed).permutation(used)[:count])
    return (
        Gallery("Random words", f"drawn from the {len(used):,} that are used, seed {wish.seed}", _ids(drawn)),
        Gallery("Most frequent words", "in the most images", _ids(falling[:count])),
        Gallery("Least frequent words", "in the fewest images, but in one at least", _ids(by_use[:count])),
    )


def _ids(words: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(words.tolist())


def count_words(layer: Layer, shown: Sequence[int]) -> Usage:
    """Count words, and which go with the S words `shown`, in one pass over the chunks.

    Raises:
        CorruptError: a chunk is damaged.
    """
    num_words, cells = layer.num_words, layer.grid[0] * layer.grid[1]
    count_K, distinct = np.zeros(num_words, np.int64), np.zeros(cells + 1, np.int64)
    common_SK = np.zeros((len(shown), num_words), np.int64)
    with Progress(f"count {layer.name}", layer.images) as progress:
        for chunk, digest in enumerate(layer.chunk_digests().tolist()):
            words_NM = layer.read_chunk(chunk, digest).reshape(-1, cells)
            count_K += np.bincount(words_NM.ravel(), minlength=num_words)
            held_NK = _held(words_NM, num_words)
            distinct += np.bincount(np.diff(held_NK.indptr), minlength=cells + 1)
            both_SK = (held_NK.tocsc()[:, list(shown)].T @ held_NK).tocoo()
            common_SK[both_SK.coords] += both_SK.data
            progress.advance(len(words_NM))
    return Usage(count_K, distinct, common_SK)


def _held(words_NM: NDArray[np.uint16], num_words: int) -> Any:
    """Which images hold which words: a sparse int64 (N, K) of ones."""
    ordered_NM = np.sort(words_NM, axis=1)
    first_NM = np.ones(ordered_NM.shape, dtype=bool)
    first_NM[:, 1:] = ordered_NM[:, 1:] != ordered_NM[:, :-1]
    words = ordered_NM[first_NM].astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(first_NM.sum(axis=1))])
    return csr_array((np.ones(len(words), np.int64), words, starts), shape=(len(words_NM), num_words))


def strongest_neighbours(
    common_K: NDArray[np.int64], document_frequency_K: NDArray[np.int64], word: int, images: int
) -> tuple[Neighbour, ...]:
    """The words that go with a word, by normalised pointwise mutual information (Bouma, 2009); without examples.

    npmi = log(p(a, b) / (p(a) p(b))) / -log p(a, b), p being shares of images: 0 for independent words, 1 for words
    that never come without each other. Rare words reach high values by accident, so that a few common images are asked
    for; words in all images are bound to nothing.

    Args:
        common_K: int64, images that hold the word and each other one.
        document_frequency_K: int64, images that hold each word.
        word: its id.
        images: N.
    """
    candidates = np.flatnonzero((common_K >= MIN_COMMON_IMAGES) & (common_K < images))
    candidates = candidates[candidates != word]
    common = common_K[candidates]
    lift = common * images / (document_frequency_K[word] * document_frequency_K[candidates])
    npmi = np.log(lift) / -np.log(common / images)
    order = np.lexsort((candidates, -common, -npmi))
    return tuple(
        Neighbour(
            int(candidates[at]),
            int(document_frequency_K[candidates[at]]),
            int(common[at]),
            float(lift[at]),
            float(npmi[at]),
        )
        for at in order[:NEIGHBOURS]
        if npmi[at] > 0
    )


class _Images:
    """The images nearest to some words, if the shards have them."""

    def __init__(self, store: Store, layer: Layer, index: Index, words: Sequence[int], *, reencoded: bool) -> None:
        self._index, self._columns = index, layer.grid[1]
        self._nearest: NearestImages = layer.read_nearest()
        row_Kn = self._nearest.row_Kn[list(words)]
        rows_U = np.unique(row_Kn[row_Kn >= 0])
        found_U = rows_of(store.read_array("key_hash")[rows_U], index.key_hash)
        if not reencoded and (problem := other_images([store], index, found_U, rows_U)):
            raise MismatchError(problem)
        self._found = dict(zip(rows_U.tolist(), found_U.tolist(), strict=True))
        self.looked_up, self.missing = len(rows_U), int((found_U < 0).sum())

    def nearest(self, word: int, most: int) -> tuple[Example, ...]:
        """The nearest images of a word that the shards have."""
        row_n, cell_n, distance_n = (values[word].tolist() for values in self._nearest)
        there = (
            (self._found[row], cell, distance)
            for row, cell, distance in zip(row_n, cell_n, distance_n, strict=True)
            if row >= 0 and self._found[row] >= 0
        )
        return tuple(
            Example(self._index.key(row), row, divmod(cell, self._columns), distance)
            for (row, cell, distance), _ in zip(there, range(most), strict=False)
        )
