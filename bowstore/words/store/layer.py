"""One layer of a word store: what its words are, its chunks, and reading them with every check.

Legend: N images, h w word grid, K words, c channels.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zarr
from numpy.typing import NDArray

from bowstore.errors import CorruptError
from bowstore.words.store.arrays import Arrays, array_digest, as_stored, member, reading, repair_of
from bowstore.words.store.nearest import NearestImages
from bowstore.words.store.schema import NOT_WRITTEN, layer_arrays, layer_sizes

_ABOUT_ROWS = ("dataset", "key_hash_digest", "image_digest_digest")  # attributes of the group that give rows a meaning
MIN_CHUNK_BYTES = 1 << 20
CHUNK_STEP_ROWS = 768
# How words were computed, of layers that were written before it was recorded.
_EARLIER_ARITHMETIC = {"trunk": "eager", "decoder": "CPU", "resize": "DALI"}
VOCABULARY_SETTINGS = ("seed", "sample_per_word", "iterations", "pca", "whiten")  # of `EncodeConfig`, as recorded


@dataclass(frozen=True)
class LayerSpec:
    """What a layer's words are, kept as its attributes.

    Attributes:
        teacher: arch, layer, weights_sha256, precision, name.
        view: the clean view: size, resize, squash, mean, std.
        vocabulary: how the vocabulary was made (seed, sample, iterations) and its health.
        num_words: K.
        grid: (h, w), without the border.
        channels: c of the teacher's map.
        border: cells left out at each side of the map.
        projection: its kind, dimensions and whiten; None if there is none.
        receptive_field: pixels of the clean view that a cell sees (`bowstore.words.encode.receptive`).
        arithmetic: how the words were computed (`bowstore.words.encode.job`).
    """

    teacher: dict[str, Any]
    view: dict[str, Any]
    vocabulary: dict[str, Any]
    num_words: int
    grid: tuple[int, int]
    channels: int
    border: int = 0
    projection: dict[str, Any] | None = None
    receptive_field: dict[str, Any] | None = None
    arithmetic: dict[str, str] | None = None

    @property
    def attributes(self) -> dict[str, Any]:
        """By the names that the store has for them."""
        return {"words" if name == "num_words" else name: value for name, value in asdict(self).items()}


def chunk_rows(images: int, grid: tuple[int, int]) -> int:
    """Rows of a words chunk: 768 times a power of two with at least 1 MiB of words, or all rows of a small set.

    Powers of two, so that the chunks of one layer end where those of another do, and one pass can fill both.
    """
    rows = CHUNK_STEP_ROWS
    while rows < images and 2 * rows * grid[0] * grid[1] < MIN_CHUNK_BYTES:
        rows *= 2
    return max(1, min(rows, images))


def made_with(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same to continue a layer of such attributes, by the names that messages use."""
    teacher, vocabulary, (h, w) = attributes["teacher"], attributes["vocabulary"], attributes["grid"]
    return {
        "teacher architecture": teacher["arch"],
        "teacher weights": teacher["weights_sha256"],
        "precision": teacher["precision"],
        "clean view": attributes["view"],
        "border": attributes["border"],
        "map": f"{attributes['channels']} x {h} x {w}",
        "K": attributes["words"],
        "vocabulary": attributes.get("vocabulary_digest"),
        "projection": [attributes.get(f"{part}_digest") for part in ("projection", "projection_offset")],
        "vocabulary taken from": vocabulary.get("taken_from"),
        **{name: vocabulary.get(name) for name in VOCABULARY_SETTINGS},
    }


def in_words(arithmetic: Mapping[str, str]) -> str:
    """How words are computed, for messages."""
    return ", ".join(f"{what} {way}" for what, way in arithmetic.items())


class Layer(Arrays):
    """One layer of an opened store: its attributes and arrays.

    Attributes:
        name: the layer.
        attributes: plain values: those of `LayerSpec`, digests, statistics once complete.
        complete: whether all its words are written.
        grid: (h, w).
        num_words: K.
        images: N.
        channels: c of the teacher's map.
        border: cells left out at each side of the map.
        chunk_rows: rows of a chunk; the last may have fewer.
        chunks: number of chunks.
    """

    def __init__(self, path: Path, group: zarr.Group, name: str, images: int) -> None:
        self.name, self.images = name, images
        with reading(f"layer {name!r} of word store {path}"):
            attributes: dict[str, Any] = member(group, name, zarr.Group).attrs.asdict()
            self.grid = (int(attributes["grid"][0]), int(attributes["grid"][1]))
            self.num_words = int(attributes["words"])
            self.complete = bool(attributes["complete"])
            self.channels = int(attributes["channels"])
            self.border = int(attributes["border"])
            projection = attributes["projection"]
            dimensions = int(projection["dimensions"]) if projection else self.channels
            self.chunk_rows = int(member(group, f"{name}/words", zarr.Array).chunks[0])
            sizes = layer_sizes(images, self.grid, (self.num_words, dimensions), self.channels, self.chunk_rows)
            self.chunks = sizes["chunks"]
            arrays = layer_arrays(projected=projection is not None)
            super().__init__(path, group, f"{name}/", attributes, arrays, sizes)
            self._words, self._digests = self.array("words"), self.array("chunk_digest")

    def content_digest(self, **recorded: Any) -> str:
        """xxh3-128 over all that makes up the layer, 32 hex digits.

        That is its name and attributes, in which the digests of vocabulary and projection stand, the digests of its
        chunks, and what the group says of the rows; `recorded` are attributes that are about to be written.

        A chunk that was replaced together with its own digest, by an interrupted copy or a roll-back, is consistent in
        itself; only a digest over everything can tell.
        """
        own = {**self.attributes, **recorded, "complete": True}
        own.pop("content_digest", None)
        root = self.root.attrs.asdict()
        text = json.dumps([[root.get(name) for name in _ABOUT_ROWS], self.name, own], sort_keys=True)
        digest = xxhash.xxh3_128(text.encode())
        digest.update(as_stored(self.chunk_digests()))
        return digest.hexdigest()

    @cached_property
    def content_problem(self) -> str | None:
        """What is wrong with a complete layer's digest; None if nothing is.

        Raises:
            CorruptError: the chunks' digests cannot be read.
        """
        if self.attributes.get("content_digest") == self.content_digest():
            return None
        return (
            f"layer {self.name!r} of word store {self.path} is not as it was when it was completed: some of its files "
            f"are from another state of the store (a copy that was cut short, a roll-back) or were changed; copy the "
            f"whole store again, or {repair_of(self.path)}"
        )

    @property
    def arithmetic(self) -> dict[str, str]:
        """How its words are computed: how the teacher is run, what decodes, and what resizes."""
        return {**_EARLIER_ARITHMETIC, **(self.attributes.get("arithmetic") or {})}

    @property
    def lineage(self) -> dict[str, Any]:
        """What its words are and whose, as runs that learn them record it."""
        made = {name: self.attributes.get(name) for name in ("vocabulary_digest", "teacher")}
        return {"layer": self.name, "num_words": self.num_words, **made}

    def rows(self, chunk: int) -> slice:
        """The rows of a chunk."""
        return slice(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.images))

    def place(self, chunk: int) -> str:
        """A chunk's name for messages: its path in the store and its rows."""
        rows = self.rows(chunk)
        return f"{self.name}/words/c/{chunk}/0/0 (rows {rows.start}-{rows.stop - 1})"

    def chunk_digests(self, chunks: slice = slice(None)) -> NDArray[np.uint64]:
        """Recorded digests of some chunks, or of all, uint64 (chunks,); 0 where a chunk is not committed."""
        with reading(f"array {self.name}/chunk_digest of word store {self.path}", repair_of(self.path)):
            return np.asarray(self._digests[chunks])

    def chunks_of(self, rows: slice) -> range:
        """The chunks that hold any of the rows."""
        return range(rows.start // self.chunk_rows, math.ceil(rows.stop / self.chunk_rows))

    def read_chunk(self, chunk: int, digest: int) -> NDArray[np.uint16]:
        """Words of one chunk, uint16 (rows, h, w), checked against its recorded digest.

        Raises:
            CorruptError: missing, undecodable, or not what was committed; names the chunk and its rows.
        """
        what = f"chunk {self.place(chunk)} of word store {self.path}"
        with reading(what, repair_of(self.path)):
            words = np.asarray(self._words[self.rows(chunk)])
            if digest == 0:
                raise CorruptError(f"{what} was never committed")
            if array_digest(words) != digest:
                missing = int((words == NOT_WRITTEN).sum())
                half = f"is missing or half written ({missing} words hold the fill value)"
                raise CorruptError(f"{what} {half if missing else 'differs from its recorded digest'}")
        return words

    def read_words(self) -> NDArray[np.uint16]:
        """All words, uint16 (N, h, w), every chunk checked against its recorded digest; errors as of `read_chunk`."""
        words = np.empty((self.images, *self.grid), np.uint16)
        for chunk, digest in enumerate(self.chunk_digests().tolist()):
            words[self.rows(chunk)] = self.read_chunk(chunk, digest)
        return words

    def read_nearest(self) -> NearestImages:
        """The images nearest to each word."""
        place = self.read_array("nearest")
        return NearestImages(place[..., 0], place[..., 1], self.read_array("nearest_distance"))

    def read_projection(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """A (p, c) and b (p,) of the projection before the words, y = A x + b; None where there is none."""
        if "projection" not in self.arrays:
            return None
        return self.read_array("projection"), self.read_array("projection_offset")
