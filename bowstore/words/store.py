"""The word store: the schema of a Zarr v3 group, and reading it (docs/store-format.md; store_writer.py writes).

    key_hash                    uint64 (N,), xxh3-64 of each row's key
    <layer>/words               uint16 (N, h, w), word ids; 65535 means "not written"
    <layer>/vocabulary          float32 (K, p), the words' centres; p = c, the map's channels, without a projection
    <layer>/projection          float32 (p, c) and projection_offset (p,), where PCA comes between map and words
    <layer>/document_frequency  int64 (K,), images that hold the word
    <layer>/nearest             int64 (K, n, 2), row and cell of the n images nearest to each word; -1 means "none"
    <layer>/nearest_distance    float32 (K, n), their distances
    <layer>/chunk_digest        uint64 (chunks,), xxh3-64 of each words chunk; 0 means "not committed"

A chunk of words is the unit of work and of commit: one writer writes it whole and fsynced, then records its
digest. Every fill value is illegal as data, so a chunk that is gone is never read as words. A layer is usable
only once it is marked complete.

Legend: N images, M cells of an image, h w word grid, K words, c channels.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import xxhash
import zarr
from numpy.typing import NDArray

from bowstore.errors import MismatchError, MissingError, UsageError
from bowstore.words.arrays import open_group, read_checked, reading
from bowstore.words.layer import Layer
from bowstore.words.nearest import NearestImages

FORMAT = "bowstore words"
FORMAT_VERSION = 2
_EXAMPLES = 5


class KeyedRows(Protocol):
    """What `join_rows` needs of an index."""

    @property
    def fingerprint(self) -> str:
        """Identity of the samples and their order."""
        ...

    @property
    def key_hash(self) -> NDArray[np.uint64]:
        """uint64 (N,)."""
        ...

    def key(self, row: int) -> str:
        """A row's key."""
        ...


class ImageBag(NamedTuple):
    """The words of one image.

    Attributes:
        words_M: int64, distinct word ids, ascending.
        weights_M: float32, sum to 1.
    """

    words_M: NDArray[np.int64]
    weights_M: NDArray[np.float32]


class Store:
    """A store opened for reading.

    Keys themselves are not kept, only their hashes; the shards' index has the keys.

    Attributes:
        path: the store.
        fingerprint: of the data set.
        layers: names of its complete layers.
        parts: fingerprint and images of the data set it was made of, then of each that was appended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._order: tuple[NDArray[np.int64], NDArray[np.uint64]] | None = None  # rows by hash, and the sorted hashes
        self._last: tuple[str, int, NDArray[np.uint16]] | None = None  # layer, chunk and words of the last look-up
        self._group, self._attributes = open_root(path, writable=False)
        with reading(f"word store {path}"):
            self.fingerprint = str(self._attributes["dataset"]["fingerprint"])
            self._images = int(self._attributes["dataset"]["images"])
            self._all = {name: Layer(path, self._group, name, self._images) for name in self._attributes["layers"]}
            dataset = {"fingerprint": self.fingerprint, "images": self._images}
            self.parts: list[dict[str, Any]] = self._attributes["dataset"].get("parts", [dataset])
        self.layers = tuple(name for name, layer in self._all.items() if layer.complete)

    def __len__(self) -> int:
        return self._images

    def layer(self, name: str | None = None) -> Layer:
        """A complete layer by name, or the only one.

        Raises:
            MissingError: no such layer; lists those there are.
            MismatchError: it is not complete yet.
            UsageError: no name, and more than one layer.
        """
        known = f"its layers: {', '.join(self.layers) or 'none'}"
        if name is None and len(self.layers) > 1:
            raise UsageError(f"word store {self.path} has {len(self.layers)} layers, name one; {known}")
        name = name or next(iter(self.layers or self._all), "")
        if name not in self._all:
            raise MissingError(f"word store {self.path} has no layer {name!r}; {known}")
        layer = self._all[name]
        if not layer.complete:
            done = int((layer.chunk_digests() != 0).sum())
            raise MismatchError(
                f"layer {name!r} of word store {self.path} is not complete: {done} of {layer.chunks} chunks "
                f"are written; {self.way_on}"
            )
        return layer

    @property
    def way_on(self) -> str:
        """What writes chunks that are missing, for messages."""
        if len(self.parts) > 1:
            return "run `bowstore encode --append` with shards that hold their images"
        return "run `bowstore encode` again with the same settings"

    def every_layer(self) -> tuple[Layer, ...]:
        """All layers, those that are not complete too."""
        return tuple(self._all.values())

    def load_words(self, layer: str | None = None) -> NDArray[np.uint16]:
        """All words of a layer, uint16 (N, h, w), every chunk checked against its digest."""
        return self.layer(layer).read_words()

    def row(self, key: str) -> int:
        """The row of a key.

        Raises:
            MissingError: no such key.
        """
        if self._order is None:
            hashes = self.key_hash()
            order = np.argsort(hashes, kind="stable")
            self._order = order, hashes[order]
        order, ordered = self._order
        wanted = np.uint64(key_hash(key))
        place = int(np.searchsorted(ordered, wanted))
        if place == len(ordered) or ordered[place] != wanted:
            raise MissingError(
                f"word store {self.path} has no key {key!r}; a key is the image's path in its shard without the "
                "extension"
            )
        return int(order[place])

    def __contains__(self, key: str) -> bool:
        try:
            self.row(key)
        except MissingError:
            return False
        return True

    def words(self, key: str, layer: str | None = None) -> NDArray[np.uint16]:
        """Words of one image, uint16 (h, w); reads its chunk and checks it against its digest.

        Raises:
            MissingError: no such key or layer.
            CorruptError: its chunk is damaged.
        """
        what, row = self.layer(layer), self.row(key)
        chunk = row // what.chunk_rows
        if self._last is None or self._last[:2] != (what.name, chunk):
            self._last = what.name, chunk, what.read_chunk(chunk, what.chunk_digest(chunk))
        words: NDArray[np.uint16] = self._last[2][row - what.rows(chunk).start].copy()
        return words

    def bag(self, key: str, layer: str | None = None, *, form: Literal["count", "binary"] = "count") -> ImageBag:
        """Bag of words of one image (paper, Eq. 3 or 4, then L1-normalised): its distinct words and their weights."""
        if form not in ("count", "binary"):
            raise UsageError(f"form {form!r} of a bag is neither 'count' nor 'binary'")
        words, counts = np.unique(self.words(key, layer), return_counts=True)
        weights = counts if form == "count" else np.ones(len(words))
        return ImageBag(words.astype(np.int64), (weights / weights.sum()).astype(np.float32))

    def iterate(self, layer: str | None = None) -> Iterator[tuple[int, NDArray[np.uint16]]]:
        """Key hash and words (h, w) of every image, in the order of the rows; holds one chunk in memory.

        Raises:
            CorruptError: a chunk is damaged.
        """
        what, hashes = self.layer(layer), self.key_hash()
        for chunk, digest in enumerate(what.chunk_digests().tolist()):
            rows = what.rows(chunk)
            yield from zip(hashes[rows].tolist(), what.read_chunk(chunk, digest), strict=True)

    def vocabulary(self, layer: str | None = None) -> NDArray[np.float32]:
        """The words' centres, float32 (K, p); p = c, the channels of the map, where there is no projection."""
        return self.layer(layer).read_array("vocabulary")

    def projection(self, layer: str | None = None) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """A (p, c) and b (p,) of y = A x + b, which takes a vector of the map to where the words lie; None for none."""
        return self.layer(layer).read_projection()

    def nearest(self, layer: str | None = None) -> NearestImages:
        """The images nearest to each word."""
        what = self.layer(layer)
        place = what.read_array("nearest")
        return NearestImages(place[..., 0], place[..., 1], what.read_array("nearest_distance"))

    def document_frequency(self, layer: str | None = None) -> NDArray[np.int64]:
        """Images that hold each word, int64 (K,)."""
        return self.layer(layer).read_array("document_frequency")

    def key_hash(self) -> NDArray[np.uint64]:
        """Hashes of the rows' keys, uint64 (N,), checked against the recorded digest."""
        digest = self._attributes.get("key_hash_digest")
        return read_checked(self.path, self._group, "key_hash", digest)


def key_hash(key: str) -> int:
    """What a store keeps of a key: the xxh3-64 of its ASCII bytes."""
    return xxhash.xxh3_64_intdigest(key.encode())


def open_store(path: str | Path, layer: str | None = None) -> Store:
    """Open a store for reading.

    Args:
        path: the store's folder on this machine (`bowstore.open_store` takes URLs too).
        layer: a layer that has to be there and complete; None asks for any one complete layer.

    Raises:
        MissingError: no store there, or no such layer (lists those there are).
        MismatchError: not a word store, another format version, or not complete.
        CorruptError: metadata that cannot be read.
    """
    store = Store(Path(path))
    if layer is not None or not store.layers:
        store.layer(layer)
    return store


def join_rows(store: Store, index: KeyedRows) -> NDArray[np.int64]:
    """The store's row of each row of an index, int64 (N_index,).

    Equal fingerprints: the identity. Otherwise rows are joined by the hashes of their keys; the store may
    hold more than the index asks for.

    Raises:
        MismatchError: keys that the store lacks, or holds twice; with counts and five examples.
    """
    wanted, have = index.key_hash, store.key_hash()
    if index.fingerprint == store.fingerprint and len(wanted) == len(have):
        return np.arange(len(have), dtype=np.int64)
    have_order, wanted_order = np.argsort(have, kind="stable"), np.argsort(wanted, kind="stable")
    ordered, needles = have[have_order], wanted[wanted_order]
    # Sorted needles are found by walking through memory; in any other order each one is a chain of cache misses.
    first, behind = np.searchsorted(ordered, needles), np.searchsorted(ordered, needles, side="right")
    for wrong, problem in ((behind == first, "missing from"), (behind - first > 1, "more than once in")):
        rows = np.sort(wanted_order[wrong])
        if len(rows):
            names = ", ".join(index.key(row) for row in rows[:_EXAMPLES].tolist())
            raise MismatchError(
                f"{len(rows)} of {len(wanted)} keys of the shards are {problem} word store {store.path}, for "
                f"example {names}; encode these shards, or train on those that were encoded"
            )
    rows_N = np.empty(len(wanted), np.int64)
    rows_N[wanted_order] = have_order[first]
    return rows_N


def rows_of(wanted: NDArray[np.uint64], have: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each hash stands among others, int64; -1 where it does not."""
    order = np.argsort(have, kind="stable")
    ordered = have[order]
    place = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[place] == wanted, order[place], -1)


def open_root(path: Path, *, writable: bool) -> tuple[zarr.Group, dict[str, Any]]:
    """Group and attributes of a store, once its format is known to be this one."""
    if not path.exists():
        if path.with_name(f".{path.name}.old").exists():
            raise MissingError(f"no word store {path}: an --append was interrupted as it took the name; run it again")
        raise MissingError(f"no word store {path}; `bowstore encode --layer LAYER --K WORDS` makes one")
    group = open_group(path, writable=writable)
    attributes: dict[str, Any] = group.attrs.asdict()
    if attributes.get("format") != FORMAT:
        raise MismatchError(f"{path} is a Zarr group but not a bowstore word store; name another path")
    if attributes.get("format_version") != FORMAT_VERSION:
        raise MismatchError(
            f"word store {path} has format version {attributes.get('format_version')} (written by bowstore "
            f"{attributes.get('bowstore_version')}), this one reads {FORMAT_VERSION}; encode into a new store"
        )
    return group, attributes
