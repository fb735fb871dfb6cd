"""The word store, read (docs/store-format.md; `schema` has its arrays, `writer` writes it).

A chunk of words is the unit of work and of commit: one writer writes it whole and fsynced, then records its
digest. A layer is usable only once it is marked complete; one digest over all that makes it up is then recorded, so
that parts of two stores are never taken for one.

Legend: N images, M cells of an image, h w word grid, K words, c channels.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash
import zarr
from numpy.typing import NDArray
from zarr.errors import GroupNotFoundError

from bowstore.errors import CorruptError, MismatchError, MissingError, UsageError
from bowstore.words.store.arrays import Arrays, SafeStore, reading
from bowstore.words.store.layer import Layer
from bowstore.words.store.schema import FORMAT, FORMAT_VERSION, STORE_ARRAYS, store_sizes

REMEDY = "run `bowstore encode` again with the same settings"  # where chunks are missing


class ImageBag(NamedTuple):
    """The words of one image.

    Attributes:
        words_M: int64, distinct word ids, ascending.
        weights_M: float32, sum to 1.
    """

    words_M: NDArray[np.int64]
    weights_M: NDArray[np.float32]


class Root(Arrays):
    """A store's group, whose format is known to be this one.

    Attributes:
        fingerprint: of the data set.
        images: N.
        names: of all its layers, complete or not.
    """

    _writable = False

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise MissingError(f"no word store {path}; `bowstore encode --layer LAYER --K WORDS` makes one")
        with reading(f"word store {path}"):
            try:
                store = SafeStore(path, read_only=not self._writable)
                group = zarr.open_group(store, mode="r+" if self._writable else "r", zarr_format=3)
            except GroupNotFoundError as error:
                raise MismatchError(f"{path} is not a word store: it is no Zarr group; name another path") from error
        attributes: dict[str, Any] = group.attrs.asdict()
        if attributes.get("format") != FORMAT:
            raise MismatchError(f"{path} is a Zarr group but not a bowstore word store; name another path")
        version, made_by = attributes.get("format_version"), f"written by bowstore {attributes.get('bowstore_version')}"
        if type(version) is not int or version != FORMAT_VERSION:
            raise MismatchError(
                f"word store {path} has format version {version!r} ({made_by}), this one reads {FORMAT_VERSION}; make "
                "its words anew: `bowstore encode --store` with another path"
            )
        if "parts" in (attributes.get("dataset") or ()):
            raise MismatchError(
                f"word store {path} has grown by --append ({made_by}), which is gone; make its words anew: `bowstore "
                "encode --store` with another path, and one store for each folder of shards"
            )
        with reading(f"word store {path}"):
            self.names, about = tuple(attributes["layers"]), attributes["dataset"]
            self.fingerprint, self.images = str(about["fingerprint"]), int(about["images"])
        super().__init__(path, group, "", attributes, STORE_ARRAYS, store_sizes(self.images))


class Store(Root):
    """A store opened for reading.

    Keys themselves are not kept, only their hashes; the shards' index has the keys.

    Attributes:
        every_layer: its layers by name, those that are not complete too.
        layers: names of its complete layers.
    """

    def __init__(self, path: Path) -> None:
        self._last: tuple[str, int, NDArray[np.uint16]] | None = None  # layer, chunk and words of the last look-up
        super().__init__(path)
        self.every_layer = {name: Layer(path, self.root, name, self.images) for name in self.names}
        self.layers = tuple(name for name, layer in self.every_layer.items() if layer.complete)

    def __len__(self) -> int:
        return self.images

    def layer(self, name: str | None = None) -> Layer:
        """A complete layer by name, or the only one.

        Raises:
            MissingError: no such layer; lists those there are.
            MismatchError: it is not complete yet.
            UsageError: no name, and more than one layer.
            CorruptError: its files are not all of the state in which it was completed.
        """
        known = f"its layers: {', '.join(self.layers) or 'none'}"
        if name is None and len(self.layers) > 1:
            raise UsageError(f"word store {self.path} has {len(self.layers)} layers, name one; {known}")
        name = name or next(iter(self.layers or self.every_layer), "")
        if name not in self.every_layer:
            raise MissingError(f"word store {self.path} has no layer {name!r}; {known}")
        layer = self.every_layer[name]
        if not layer.complete:
            done = np.count_nonzero(layer.chunk_digests())
            raise MismatchError(
                f"layer {name!r} of word store {self.path} is not complete: {done} of {layer.chunks} chunks "
                f"are written; {REMEDY}"
            )
        if problem := layer.content_problem:
            raise CorruptError(problem)
        return layer

    def vocabulary_layer(self, name: str) -> Layer:
        """A layer by name, for its vocabulary: it need not be complete; otherwise as `layer`."""
        layer = self.every_layer.get(name)
        return layer if layer and not layer.complete else self.layer(name)

    def load_words(self, layer: str | None = None) -> NDArray[np.uint16]:
        """All words of a layer, uint16 (N, h, w), every chunk checked against its digest."""
        return self.layer(layer).read_words()

    @cached_property
    def _key_hash(self) -> NDArray[np.uint64]:
        return self.read_array("key_hash")

    def row(self, key: str) -> int:
        """The row of a key.

        Raises:
            MissingError: no such key.
        """
        rows = np.flatnonzero(self._key_hash == np.uint64(key_hash(key)))
        if not len(rows):
            raise MissingError(
                f"word store {self.path} has no key {key!r}; a key is the image's path in its shard without the "
                "extension"
            )
        return int(rows[0])

    def words(self, key: str, layer: str | None = None) -> NDArray[np.uint16]:
        """Words of one image, uint16 (h, w); reads its chunk and checks it against its digest.

        Raises:
            MissingError: no such key or layer.
            CorruptError: its chunk is damaged.
        """
        what, row = self.layer(layer), self.row(key)
        chunk = row // what.chunk_rows
        if self._last is None or self._last[:2] != (what.name, chunk):
            self._last = what.name, chunk, what.read_chunk(chunk, *what.chunk_digests(slice(chunk, chunk + 1)).tolist())
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
        what, hashes = self.layer(layer), self._key_hash
        for chunk, digest in enumerate(what.chunk_digests().tolist()):
            rows = what.rows(chunk)
            yield from zip(hashes[rows].tolist(), what.read_chunk(chunk, digest), strict=True)

    def vocabulary(self, layer: str | None = None) -> NDArray[np.float32]:
        """The centroids, float32 (K, p); p = c, the channels of the map, where there is no projection."""
        return self.layer(layer).read_array("vocabulary")


def key_hash(key: str) -> int:
    """What a store keeps of a key: the xxh3-64 of its ASCII bytes."""
    return xxhash.xxh3_64_intdigest(key.encode())


def open_store(path: str | Path, layer: str | None = None) -> Store:
    """Open a store of this machine for reading; arguments and errors as of `bowstore.open_store`."""
    store = Store(Path(path))
    if layer is not None or not store.layers:
        store.layer(layer)
    return store
