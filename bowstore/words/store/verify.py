"""Check a word store from end to end, take damaged chunks back, and compare stores.

Legend: N images, h w word grid, K words.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from bowstore.config import SomePaths, StorageConfig
from bowstore.data.index import Index, open_index
from bowstore.errors import BowstoreError, CorruptError
from bowstore.progress import Progress
from bowstore.runs import descent_of_words
from bowstore.words.store.arrays import as_stored, sweep_leftovers
from bowstore.words.store.join import join_problems, listed, rows_of
from bowstore.words.store.layer import Layer
from bowstore.words.store.schema import Writer
from bowstore.words.store.store import REMEDY, Store, open_store
from bowstore.words.store.writer import StoreWriter, store_lock


@dataclass
class VerifyReport:
    """What `verify` found.

    Attributes:
        images: N.
        chunks: words chunks that were read.
        problems: one line each; empty means sound.
        damaged: the committed chunks to encode again, by layer; none for a layer that only needs counting.
        arithmetic: how each layer's words were computed.
        descent: how each layer's words came about (`bowstore.runs.descent_of_words`).
    """

    images: int = 0
    chunks: int = 0
    problems: list[str] = field(default_factory=list)
    damaged: dict[str, list[int]] = field(default_factory=dict)
    arithmetic: dict[str, dict[str, str]] = field(default_factory=dict)
    descent: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    path: Path, shards: SomePaths | None = None, storage: StorageConfig | None = None, *, reencoded: bool = False
) -> VerifyReport:
    """Read a whole store and check it: metadata, every chunk, digests, word ids, keys.

    Arguments as of `bowstore.verify.verify_path`. What is wrong with the store is reported, not raised.

    Raises:
        MissingError: no shards of that name.
    """
    index = open_index(shards, storage) if shards else None
    report = VerifyReport()
    try:
        store = Store(path)
    except BowstoreError as error:
        report.problems.append(str(error))
        return report
    report.images, layers = len(store), store.every_layer.values()
    report.arithmetic = {layer.name: layer.arithmetic for layer in layers}
    report.descent = {layer.name: descent_of_words(layer.lineage) for layer in layers}
    if not layers:
        report.problems.append(f"word store {path} has no layer; run `bowstore encode` again")
    with Progress("verify", sum(layer.chunks for layer in layers), "chunks") as progress:
        for layer in layers:
            _check_layer(layer, report, progress)
    try:
        report.problems += _key_problems(store, index, reencoded=reencoded)
    except CorruptError as error:
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
            writer.discard_chunks(layer, chunks)
    return sum(len(chunks) for chunks in report.damaged.values())


def digest(path: Path) -> str:
    """One digest over the vocabularies and words of a store's complete layers, as 32 hex digits.

    Independent of chunks and compression: equal digests mean equal words.

    Raises:
        CorruptError: a chunk or an array that cannot be trusted.
    """
    store, total = open_store(path), xxhash.xxh3_128()
    for name in sorted(store.layers):
        layer = store.layer(name)
        for array in (layer.read_array("vocabulary"), *(layer.read_projection() or ())):
            total.update(f"{name} {array.dtype.name} {array.shape};".encode())
            total.update(as_stored(array))
        total.update(f"{name} uint16 {(layer.images, *layer.grid)};".encode())
        for chunk, value in enumerate(layer.chunk_digests().tolist()):
            total.update(as_stored(layer.read_chunk(chunk, value)))
    return total.hexdigest()


def _check_layer(layer: Layer, report: VerifyReport, progress: Progress) -> None:
    committed, damaged, broken = 0, list[int](), set[Writer]()
    for chunk in range(layer.chunks):
        try:
            committed += _check_chunk(layer, chunk)
        except CorruptError as error:
            report.problems.append(str(error))
            damaged.append(chunk)
        progress.advance()
    report.chunks += layer.chunks if layer.complete else committed
    for name, spec in layer.arrays.items():
        there = spec.writer is Writer.CREATION or layer.complete or layer.attributes.get(f"{name}_digest")
        if there and spec.writer is not Writer.CHUNKS:
            try:
                layer.read_array(name)
            except CorruptError as error:
                report.problems.append(str(error))
                broken.add(spec.writer)
    if not layer.complete:
        report.problems.append(
            f"layer {layer.name!r} is not complete: {committed} of {layer.chunks} chunks are written; {REMEDY}"
        )
    else:
        with suppress(CorruptError):  # a chunk's digest cannot be read: that was found with its chunk
            if layer.content_problem:
                report.problems.append(layer.content_problem)
                broken.add(Writer.PASS)  # it cannot be told which of its files are of another state
    if Writer.PASS in broken:
        damaged = list(range(layer.chunks))
    # Words are counted again at no cost; without its vocabulary nothing can be encoded again.
    if (damaged or broken) and Writer.CREATION not in broken:
        report.damaged[layer.name] = damaged


def _check_chunk(layer: Layer, chunk: int) -> bool:
    """Whether a chunk is committed."""
    recorded = int(layer.chunk_digests(slice(chunk, chunk + 1))[0])
    if recorded == 0 and not layer.complete:
        return False
    high = int(layer.read_chunk(chunk, recorded).max())
    if high >= layer.num_words:
        raise CorruptError(f"chunk {layer.place(chunk)} holds word {high}, which is not below K = {layer.num_words}")
    return True


def _key_problems(store: Store, index: Index | None, *, reencoded: bool) -> Iterator[str]:
    """What is wrong with the store's keys, and with its rows where an index is to have the same."""
    key_hash_N, _ = store.read_array("key_hash"), store.read_array("image_digest")
    if index is None:
        values, counts = np.unique(key_hash_N, return_counts=True)
        if len(values) < len(key_hash_N):
            rows = np.flatnonzero(np.isin(key_hash_N, values[counts > 1])).tolist()
            yield (
                f"array key_hash: {int((counts > 1).sum())} keys occur more than once, for example in rows "
                f"{listed(rows)}; encode into a new store"
            )
        return
    yield from join_problems([store], index, rows_of(index.key_hash, key_hash_N), reencoded=reencoded)
    extra = np.flatnonzero(rows_of(key_hash_N, index.key_hash) < 0).tolist()
    if extra:
        yield (
            f"{len(extra)} of the store's {len(key_hash_N)} keys are not in {index.place}, for example those "
            f"of rows {listed(extra)}; encode these shards into a new store"
        )
