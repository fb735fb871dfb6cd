"""Check a word store from end to end, take damaged chunks back, and compare stores.

Legend: N images, h w word grid, K words.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bowstore.config import SomePaths, StorageConfig
from bowstore.data.index import Index, open_index
from bowstore.errors import BowstoreError, CorruptError, MismatchError
from bowstore.progress import Progress
from bowstore.runs import descent_of_words
from bowstore.words.store.arrays import sweep_leftovers
from bowstore.words.store.join import check_images, rows_of
from bowstore.words.store.layer import Layer
from bowstore.words.store.schema import Writer
from bowstore.words.store.store import REMEDY, Store, open_store
from bowstore.words.store.writer import StoreWriter, store_lock

_EXAMPLES = 5


@dataclass
class VerifyReport:
    """What `verify` found.

    Attributes:
        path: the store.
        images: N.
        layers: names of all its layers.
        chunks: words chunks that were read.
        problems: one line each; empty means sound.
        damaged: the committed chunks to encode again, by layer; none for a layer that only needs counting.
        lost: layers whose vocabulary or projection is damaged.
        unseen: layers whose nearest images are damaged.
        arithmetic: how each layer's words were computed.
        descent: how each layer's words came about (`bowstore.runs.descent_of_words`).
    """

    path: Path
    images: int = 0
    layers: tuple[str, ...] = ()
    chunks: int = 0
    problems: list[str] = field(default_factory=list)
    damaged: dict[str, list[int]] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    unseen: set[str] = field(default_factory=set)
    arithmetic: dict[str, dict[str, str]] = field(default_factory=dict)
    descent: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def all_again(self, layer: Layer) -> None:
        """Have all words of a layer made anew, and what was seen on the way."""
        self.damaged[layer.name] = list(range(layer.chunks))
        self.unseen.add(layer.name)


def verify(
    path: Path, shards: SomePaths | None = None, storage: StorageConfig | None = None, *, reencoded: bool = False
) -> VerifyReport:
    """Read a whole store and check it: metadata, every chunk, digests, word ids, keys.

    Args:
        path: the store.
        shards: folder of indexed shards, or several, whose keys the store must hold, each once, no others; None skips
            that.
        storage: where copies of remote shards lie.
        reencoded: the shards hold other encodings of the store's images: keys alone are compared.

    Raises:
        MissingError: no shards of that name (what is wrong with the store itself is reported, not raised).
    """
    index = open_index(shards, storage) if shards else None
    report = VerifyReport(path)
    try:
        store = Store(path)
    except BowstoreError as error:
        report.problems.append(str(error))
        return report
    layers = store.every_layer()
    report.images, report.layers = len(store), tuple(layer.name for layer in layers)
    report.arithmetic = {layer.name: layer.arithmetic for layer in layers}
    report.descent = {layer.name: descent_of_words(layer.lineage) for layer in layers}
    if not layers:
        report.problems.append(f"word store {path} has no layer; run `bowstore encode` again")
    with Progress("verify", sum(layer.chunks for layer in layers), "chunks") as progress:
        for layer in layers:
            _check_layer(layer, report, progress)
    try:
        key_hash_N, _ = store.key_hash(), store.image_digest()
    except CorruptError as error:
        report.problems.append(str(error))
        return report
    _check_keys(key_hash_N, index, report)
    if index is not None and not reencoded:
        store_row_N = rows_of(index.key_hash, key_hash_N)
        held = np.flatnonzero(store_row_N >= 0)
        try:
            check_images(store, index, held, store_row_N[held])
        except MismatchError as error:
            report.problems.append(str(error))
    return report


def discard_damaged(path: Path, report: VerifyReport) -> int:
    """Take back a report's damaged chunks, so that `bowstore encode` writes just these anew; return how many.

    Raises:
        BusyError: another process writes the store.
    """
    with store_lock(path):
        writer = StoreWriter(path)
        sweep_leftovers(path)
        for layer, chunks in report.damaged.items():
            writer.discard_chunks(layer, chunks, nearest=layer in report.unseen)
    return sum(len(chunks) for chunks in report.damaged.values())


def digest(path: Path) -> str:
    """One digest over the vocabularies and words of a store's complete layers, as 32 hex digits.

    Independent of chunks and compression: equal digests mean equal words.

    Raises:
        CorruptError: a chunk or an array that cannot be trusted.
    """
    store, total = open_store(path), xxhash.xxh3_128()

    def add(array: NDArray[Any]) -> None:
        total.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)

    for name in sorted(store.layers):
        layer = store.layer(name)
        for array in (store.vocabulary(name), *(store.projection(name) or ())):
            total.update(f"{name} {array.dtype.name} {array.shape};".encode())
            add(array)
        total.update(f"{name} uint16 {(layer.images, *layer.grid)};".encode())
        for chunk, value in enumerate(layer.chunk_digests().tolist()):
            add(layer.read_chunk(chunk, value))
    return total.hexdigest()


def _check_layer(layer: Layer, report: VerifyReport, progress: Progress) -> None:
    committed = 0
    for chunk in range(layer.chunks):
        try:
            committed += _check_chunk(layer, chunk)
        except CorruptError as error:
            report.problems.append(str(error))
            report.damaged.setdefault(layer.name, []).append(chunk)
        progress.advance()
    report.chunks += layer.chunks if layer.complete else committed
    _check_arrays(layer, report)
    if not layer.complete:
        report.problems.append(
            f"layer {layer.name!r} is not complete: {committed} of {layer.chunks} chunks are written; {REMEDY}"
        )
    elif problem := _content_problem(layer):
        report.problems.append(problem)
        report.all_again(layer)  # it cannot be told which of its files are of another state
    if layer.name in report.lost:  # without its vocabulary nothing can be encoded again
        report.damaged.pop(layer.name, None)


def _check_chunk(layer: Layer, chunk: int) -> bool:
    """Whether a chunk is committed."""
    recorded = layer.chunk_digest(chunk)
    if recorded == 0 and not layer.complete:
        return False
    high = int(layer.read_chunk(chunk, recorded).max())
    if high >= layer.num_words:
        raise CorruptError(f"chunk {layer.place(chunk)} holds word {high}, which is not below K = {layer.num_words}")
    return True


def _check_arrays(layer: Layer, report: VerifyReport) -> None:
    """Vocabulary, projection, and what is recorded over all words.

    Words are counted again at no cost; which images are nearest is only known once all are encoded again.
    """
    for name, spec in layer.arrays.items():
        recorded = layer.attributes.get(f"{name}_digest") or layer.complete
        if spec.writer is Writer.CHUNKS or not (recorded or spec.writer is Writer.CREATION):
            continue
        try:
            layer.read_array(name)
        except CorruptError as error:
            report.problems.append(str(error))
            if spec.writer is Writer.CREATION:
                report.lost.add(layer.name)
            elif spec.writer is Writer.COUNT:
                report.damaged.setdefault(layer.name, [])
            else:
                report.all_again(layer)


def _content_problem(layer: Layer) -> str | None:
    try:
        return layer.content_problem()
    except CorruptError:  # a chunk's digest cannot be read: that was found with its chunk
        return None


def _check_keys(key_hash_N: NDArray[np.uint64], index: Index | None, report: VerifyReport) -> None:
    values, counts = np.unique(key_hash_N, return_counts=True)
    if len(values) < len(key_hash_N):
        rows = np.flatnonzero(np.isin(key_hash_N, values[counts > 1]))
        report.problems.append(
            f"array key_hash: {int((counts > 1).sum())} keys occur more than once, for example in rows "
            f"{_listed(rows)}; encode into a new store"
        )
    if index is None:
        return
    missing = np.flatnonzero(~np.isin(index.key_hash, values))
    if len(missing):
        names = ", ".join(index.key(row) for row in missing[:_EXAMPLES].tolist())
        report.problems.append(
            f"{len(missing)} of {len(index)} keys of {index.place} are missing from the store, for example "
            f"{names}; encode these shards into a new store"
        )
    extra = np.flatnonzero(~np.isin(key_hash_N, index.key_hash))
    if len(extra):
        report.problems.append(
            f"{len(extra)} of the store's {len(key_hash_N)} keys are not in {index.place}, for example those "
            f"of rows {_listed(extra)}; encode these shards into a new store"
        )


def _listed(rows: NDArray[np.int64]) -> str:
    return ", ".join(str(row) for row in rows[:_EXAMPLES].tolist())
