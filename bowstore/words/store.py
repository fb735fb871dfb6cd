"""The word store: the schema of a Zarr v3 group, its writer and its reader.

    key_hash                    uint64 (N,), xxh3-64 of each row's key
    <layer>/words               uint16 (N, h, w), word ids; 65535 means "not written"
    <layer>/vocabulary          float32 (K, c), the words' centres
    <layer>/document_frequency  int64 (K,), images that hold the word
    <layer>/chunk_digest        uint64 (chunks,), xxh3-64 of each words chunk; 0 means "not committed"

A chunk of words is the unit of work and of commit: one writer writes it whole and fsynced, then records its
digest. Every fill value is illegal as data, so a chunk that is gone is never read as words. A layer is usable
only once it is marked complete.

Legend: N images, h w word grid, K words, c channels.
"""

import math
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from numpy.typing import NDArray

import bowstore
from bowstore.errors import MismatchError, MissingError, UsageError
from bowstore.files import TEMPORARY_MARK, exclusive_lock, fsync_path
from bowstore.words.arrays import (
    array,
    array_digest,
    create,
    hex_digest,
    new_group,
    open_group,
    read_checked,
    reading,
    subgroup,
    sweep,
)
from bowstore.words.layer import NOT_WRITTEN, Layer, LayerSpec, chunk_rows

FORMAT = "bowstore words"
FORMAT_VERSION = 1
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


def writing_lock(path: Path) -> AbstractContextManager[None]:
    """Hold the store's lock, a file beside it, for the length of a block; all writing happens under it.

    Raises:
        BusyError: another live process writes this store.
    """
    return exclusive_lock(path.with_name(f".{path.name}.lock"), f"word store {path}")


class StoreWriter:
    """A store opened for writing; use it under `writing_lock`.

    Attributes:
        path: the store.
        fingerprint: of the data set.
        images: N.
        layers: names of its layers, complete or not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._group, attributes = _open_root(path, writable=True)
        with reading(f"word store {path}"):
            self.fingerprint = str(attributes["dataset"]["fingerprint"])
            self.images = int(attributes["dataset"]["images"])
            self.layers = tuple(attributes["layers"])

    def layer(self, name: str) -> Layer:
        """A layer, complete or not."""
        return Layer(self.path, self._group, name, self.images)

    def add_layer(self, name: str, spec: LayerSpec, vocabulary_Kc: NDArray[np.float32]) -> Layer:
        """Create a layer with its vocabulary (K, c) and no words; it counts once its name is in the list."""
        shutil.rmtree(self.path / name, ignore_errors=True)  # what a killed writer left, not yet listed
        group = self._group.create_group(name)
        rows = chunk_rows(self.images, spec.grid)
        chunks = math.ceil(self.images / rows)
        shape = (self.images, *spec.grid)
        create(group, "words", shape, np.uint16, fill=NOT_WRITTEN, chunks=(rows, *spec.grid))
        create(group, "chunk_digest", (chunks,), np.uint64, fill=0, chunks=(1,))
        create(group, "document_frequency", (spec.words,), np.int64, fill=-1)
        create(group, "vocabulary", vocabulary_Kc.shape, np.float32, fill=math.nan)[:] = vocabulary_Kc
        digest = hex_digest(vocabulary_Kc)
        version = {"bowstore_version": bowstore.__version__}
        group.attrs.update({"complete": False, **asdict(spec), "vocabulary_digest": digest, **version})
        self.layers = (*self.layers, name)
        self._group.attrs.update({"layers": list(self.layers)})
        return self.layer(name)

    def write_chunk(self, layer: str, chunk: int, words: NDArray[np.uint16]) -> None:
        """Write all words of a chunk, uint16 (rows, h, w), durably; then commit it by recording its digest.

        Raises:
            UsageError: another shape, or ids that are not below K.
        """
        what = self.layer(layer)
        rows = what.rows(chunk)
        shape = (rows.stop - rows.start, *what.grid)
        if words.shape != shape or words.dtype != np.uint16:
            raise UsageError(f"chunk {what.place(chunk)} takes uint16 {shape}, not {words.dtype} {words.shape}")
        if int(words.max()) >= what.words:
            raise UsageError(f"chunk {what.place(chunk)}: word {int(words.max())} is not below K = {what.words}")
        array(self._group, f"{layer}/words")[rows] = words
        array(self._group, f"{layer}/chunk_digest")[chunk] = np.uint64(array_digest(words))

    def committed_chunks(self, layer: str) -> NDArray[np.bool_]:
        """Which chunks are committed, bool (chunks,)."""
        return np.not_equal(self.layer(layer).chunk_digests(), 0)

    def mark_complete(self, layer: str, document_frequency_K: NDArray[np.int64], statistics: dict[str, Any]) -> None:
        """Record document frequencies and statistics and make the layer usable: the last step of encoding.

        Raises:
            UsageError: a chunk is not committed yet.
        """
        done = self.committed_chunks(layer)
        if not done.all():
            raise UsageError(f"layer {layer!r} has {int(done.sum())} of {len(done)} chunks; write the others first")
        array(self._group, f"{layer}/document_frequency")[:] = document_frequency_K
        digest = hex_digest(document_frequency_K)
        subgroup(self._group, layer).attrs.update(
            {"document_frequency_digest": digest, "statistics": statistics, "complete": True}
        )

    def discard_chunks(self, layer: str, chunks: Sequence[int]) -> None:
        """Take chunks back: the layer is incomplete again, and encoding writes just these anew."""
        subgroup(self._group, layer).attrs.update({"complete": False})
        for chunk in chunks:
            array(self._group, f"{layer}/chunk_digest")[chunk] = np.uint64(0)


class Store:
    """A store opened for reading.

    Attributes:
        path: the store.
        fingerprint: of the data set.
        layers: names of its complete layers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._group, self._attributes = _open_root(path, writable=False)
        with reading(f"word store {path}"):
            self.fingerprint = str(self._attributes["dataset"]["fingerprint"])
            self._images = int(self._attributes["dataset"]["images"])
            self._all = {name: Layer(path, self._group, name, self._images) for name in self._attributes["layers"]}
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
                f"are written; run `bowstore encode` again with the same settings"
            )
        return layer

    def every_layer(self) -> tuple[Layer, ...]:
        """All layers, those that are not complete too."""
        return tuple(self._all.values())

    def load_words(self, layer: str | None = None) -> NDArray[np.uint16]:
        """All words of a layer, uint16 (N, h, w), every chunk checked against its digest."""
        return self.layer(layer).read_words()

    def vocabulary(self, layer: str | None = None) -> NDArray[np.float32]:
        """The words' centres, float32 (K, c)."""
        return self.layer(layer).read_array("vocabulary")

    def document_frequency(self, layer: str | None = None) -> NDArray[np.int64]:
        """Images that hold each word, int64 (K,)."""
        return self.layer(layer).read_array("document_frequency")

    def key_hash(self) -> NDArray[np.uint64]:
        """Hashes of the rows' keys, uint64 (N,), checked against the recorded digest."""
        digest = self._attributes.get("key_hash_digest")
        return read_checked(self.path, self._group, "key_hash", digest)


def create_store(path: Path, *, fingerprint: str, key_hash_N: NDArray[np.uint64]) -> StoreWriter:
    """Make a store without layers, whole or not at all; call it under `writing_lock`.

    Raises:
        UsageError: something of that name is there already.
    """
    if path.exists():
        raise UsageError(f"{path} exists already; remove it, or take another name")
    for old in path.parent.glob(f".{path.name}{TEMPORARY_MARK}*"):
        shutil.rmtree(old, ignore_errors=True)
    temporary = path.with_name(f".{path.name}{TEMPORARY_MARK}new")
    try:
        group = new_group(temporary, {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "bowstore_version": bowstore.__version__,
            "dataset": {"fingerprint": fingerprint, "images": len(key_hash_N)},
            "key_hash_digest": hex_digest(key_hash_N),
            "layers": [],
        })  # fmt: skip
        create(group, "key_hash", key_hash_N.shape, np.uint64, fill=0)[:] = key_hash_N
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(path.parent)
    return StoreWriter(path)


def open_for_writing(path: Path) -> StoreWriter:
    """Open a store to go on writing, after sweeping what a killed writer left; call it under `writing_lock`.

    Raises:
        MissingError: no store there.
        MismatchError: not a word store, or another format version.
    """
    writer = StoreWriter(path)
    sweep(path)
    return writer


def open_store(path: Path, layer: str | None = None) -> Store:
    """Open a store for reading.

    Args:
        path: the store's folder.
        layer: a layer that has to be there and complete; None asks for any one complete layer.

    Raises:
        MissingError: no store there, or no such layer (lists those there are).
        MismatchError: not a word store, another format version, or not complete.
        CorruptError: metadata that cannot be read.
    """
    store = Store(path)
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


def _open_root(path: Path, *, writable: bool) -> tuple[zarr.Group, dict[str, Any]]:
    if not path.exists():
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
