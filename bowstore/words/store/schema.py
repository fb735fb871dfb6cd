"""The one table of the arrays of a word store: what they are, how large, and who writes them (docs/store-format.md).

Stores are created, read, checked and copied by it; it loads neither torch nor Zarr.

Every fill value is illegal as data, so that a chunk which is gone is never read as values.

Legend: N images, h w word grid, K words, c channels of the map, p dimensions of a word, n images kept for each word.
"""

from collections.abc import Mapping
from enum import Enum
from math import ceil, nan
from typing import NamedTuple

from bowstore.limits import KEPT_IMAGES

FORMAT = "bowstore words"
FORMAT_VERSION = 3
NOT_WRITTEN = 65535  # the fill value of words; K is at most this
NO_ROW = -1  # of images near to a word: there are fewer than n
_KEY_ROWS = 1 << 20  # of a chunk of key hashes or image digests: 8 MiB


class Writer(Enum):
    """When an array is written, and so how it comes back if it is lost."""

    CREATION = "with its layer, or with the store; lost, the layer is lost"
    CHUNKS = "chunk by chunk, as images are encoded; a lost chunk is encoded again"
    COUNT = "last, from the words alone; lost, they are counted again"
    PASS = "last, from all that was seen of the images; lost, all are encoded again"


class ArraySpec(NamedTuple):
    """One array.

    Attributes:
        name: in its group.
        axes: their letters, as in the legend, or numbers; `chunks` is the number of chunks of words.
        dtype: of its values.
        fill: of what is not written.
        writer: when it is written.
        chunk_rows: rows of one of its chunks, likewise; None for one chunk.
    """

    name: str
    axes: str
    dtype: str
    fill: float
    writer: Writer
    chunk_rows: str | None = None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape, where the letters have these values."""
        return tuple(sizes[axis] if axis in sizes else int(axis) for axis in self.axes.split())

    def chunk_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of its chunks likewise: they are cut along the first axis alone."""
        if self.chunk_rows is None:
            return self.shape(sizes)
        return self._replace(axes=" ".join([self.chunk_rows, *self.axes.split()[1:]])).shape(sizes)


STORE_ARRAYS = {
    "key_hash": ArraySpec("key_hash", "N", "uint64", 0, Writer.CREATION, "key_rows"),
    "image_digest": ArraySpec("image_digest", "N", "uint64", 0, Writer.CREATION, "key_rows"),
}
_PROJECTION = (
    ArraySpec("projection", "p c", "float32", nan, Writer.CREATION),
    ArraySpec("projection_offset", "p", "float32", nan, Writer.CREATION),
)
_LAYER = (
    ArraySpec("words", "N h w", "uint16", NOT_WRITTEN, Writer.CHUNKS, "word_rows"),
    ArraySpec("chunk_digest", "chunks", "uint64", 0, Writer.CHUNKS, "1"),
    ArraySpec("vocabulary", "K p", "float32", nan, Writer.CREATION),
    *_PROJECTION,
    ArraySpec("document_frequency", "K", "int64", -1, Writer.COUNT),
    ArraySpec("nearest", "K n 2", "int64", NO_ROW, Writer.PASS),
    ArraySpec("nearest_distance", "K n", "float32", nan, Writer.PASS),
)


def layer_arrays(*, projected: bool) -> dict[str, ArraySpec]:
    """The arrays of a layer by name, with a projection before its words or without."""
    return {spec.name: spec for spec in _LAYER if projected or spec not in _PROJECTION}


def layer_sizes(
    images: int, grid: tuple[int, int], vocabulary: tuple[int, ...], channels: int, word_rows: int
) -> dict[str, int]:
    """What the letters are for a layer; `vocabulary` is (K, p), `word_rows` the rows of a chunk of words."""
    return {
        "N": images,
        "h": grid[0],
        "w": grid[1],
        "K": vocabulary[0],
        "c": channels,
        "p": vocabulary[1],
        "n": KEPT_IMAGES,
        "word_rows": word_rows,
        "chunks": ceil(images / word_rows),
    }


def store_sizes(images: int) -> dict[str, int]:
    """What they are for the arrays of the store itself."""
    return {"N": images, "key_rows": max(1, min(images, _KEY_ROWS))}
