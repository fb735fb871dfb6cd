"""The pass over all images: clean view, teacher, nearest words, chunks of the store; shared by any number of processes.

The rows are cut into units (whole chunks of every layer), and units into batches, before any process takes one, so that
the words do not depend on who encodes what. A process claims a unit, encodes it, commits its chunks and releases the
claim. Units of dead processes are claimed again; committed chunks are never redone.

Legend: B batch, M cells of an image, h w word grid, K words, c channels, p dimensions of a word.
"""

import math
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.clustering.projection import PreparedProjection, Projection, prepare_projection, project
from bowstore.exact import exact_float32
from bowstore.progress import Progress, say
from bowstore.words.assign.assign import PreparedWords, assign, prepare_words
from bowstore.words.encode.claims import POLL_SECONDS, Board
from bowstore.words.encode.forward import Clock, forward
from bowstore.words.encode.job import Job
from bowstore.words.encode.lanes import Maps, compute_workers, to_host
from bowstore.words.store.layer import Layer
from bowstore.words.store.nearest import NearestImages, NearestSearch, save_nearest
from bowstore.words.store.writer import StoreWriter

_WRITES_WAITING = 2  # chunks in memory beside those that are being filled


@dataclass(frozen=True)
class Quantizer:
    """From the map of a layer to words.

    Attributes:
        border: cells left out at each side.
        projection: applied before the search; None for none.
        words: the vocabulary, laid out for `assign`.
        centroids_Kp: float32.
    """

    border: int
    projection: PreparedProjection | None
    words: PreparedWords
    centroids_Kp: Tensor

    def quantize(self, map_Bchw: Tensor) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
        """Words (B, h, w), and the distances of the vectors to them (B, M), float32."""
        map_Bchw = without_border(map_Bchw, self.border)
        batch, channels, h, w = map_Bchw.shape
        vectors = map_Bchw.permute(0, 2, 3, 1).reshape(-1, channels)
        with exact_float32():
            if self.projection:
                vectors = project(vectors, self.projection)
            ids = assign(vectors, self.words)
            distance = torch.linalg.vector_norm(vectors - self.centroids_Kp[ids.long()], dim=1)
        words_Bhw, distance_BM = to_host(ids.view(batch, h, w), distance.view(batch, -1))
        return words_Bhw, distance_BM


def quantizer(layer: Layer, device: torch.device) -> Quantizer:
    """What a layer of a store needs to quantize maps, on a device."""
    centroids_Kp = torch.from_numpy(layer.read_array("vocabulary")).to(device)
    found = layer.read_projection()
    projection = prepare_projection(Projection(*found), device) if found else None
    return Quantizer(layer.border, projection, prepare_words(centroids_Kp), centroids_Kp)


def without_border(map_Bchw: Tensor, border: int) -> Tensor:
    """A map without this many cells at each side."""
    return map_Bchw[:, :, border : map_Bchw.shape[2] - border, border : map_Bchw.shape[3] - border]


def cut_units(images: int, chunk_rows: Sequence[int]) -> list[slice]:
    """Ranges of rows that end where chunks of every layer end."""
    rows = min(images, math.lcm(*chunk_rows))
    return [slice(start, min(start + rows, images)) for start in range(0, images, rows)]


class AssignPass:
    """One process's part in the pass."""

    def __init__(self, job: Job, writer: StoreWriter, board: Board, *, shown: bool = True) -> None:
        self._job, self._writer, self._board, self._shown = job, writer, board, shown
        self._layers = [writer.layer(name) for name in job.names]
        self._units = cut_units(writer.images, [layer.chunk_rows for layer in self._layers])
        self._open = list(range(len(self._units)))  # not known to be whole, nor taken by this process
        self._mine = uuid.uuid4().hex[:12]
        self._chunks: dict[tuple[str, int], _Chunk] = {}
        self._left: dict[int, int] = {}  # chunks of a claimed unit that are not committed yet
        self._wanted: dict[int, list[slice]] = {}  # their rows
        self._lock = threading.Lock()
        self.images = 0
        self.clock = Clock(compute_workers(job.device))

    def run(self) -> None:
        """Encode until every chunk of every layer is committed, by whichever process.

        Raises:
            DataError: images or features that cannot be used.
            OSError: the disk is full.
        """
        job = self._job
        self._quantizers = {layer.name: quantizer(layer, job.device) for layer in self._layers}
        self._nearest = {layer.name: NearestSearch(layer.num_words) for layer in self._layers}
        told = False
        with Progress("encode", self._writer.images, shown=self._shown) as self._progress:
            while True:
                first = self._next_unit()
                if first is not None:
                    self._encode(first)
                elif not self._open:
                    return
                else:
                    if self._shown and not told:
                        say(f"waiting for {len(self._open)} parts that other processes have claimed")
                        told = True
                    time.sleep(POLL_SECONDS)

    def _encode(self, first: int) -> None:
        """Encode a unit, and as many others as can be claimed on the way."""
        units = chain([first], iter(self._next_unit, None))
        batches = (rows_B for unit in units for rows_B in self._batches(unit))
        self._writes = _Writes(self.clock)
        found = forward(self._job, batches, self._quantize, clock=self.clock, stage="assign")
        with self._writes:
            for rows_B, words in found:
                self._keep(rows_B, words)
                self.images += len(rows_B)
                self._count(len(rows_B))

    def _next_unit(self) -> int | None:
        """Claim the next unfinished unit; None if none is left, or others hold the rest."""
        for unit in list(self._open):
            if not self._missing(unit):
                self._open.remove(unit)
                self._count(self._units[unit].stop - self._units[unit].start)
            elif self._board.claim(self._name(unit)):
                self._open.remove(unit)
                missing = self._missing(unit)  # again: its last owner may have ended just now
                if missing:
                    self._begin(unit, missing)
                    return unit
                self._board.release(self._name(unit))
                self._count(self._units[unit].stop - self._units[unit].start)
        return None

    def _name(self, unit: int) -> str:
        return f"{claim_prefix(self._job, self._writer)}{self._units[unit].start}"

    def _missing(self, unit: int) -> list[tuple[Layer, int]]:
        """Chunks of a unit that are not committed."""
        return [
            (layer, chunk)
            for layer in self._layers
            for chunk in layer.chunks_of(self._units[unit])
            if layer.chunk_digest(chunk) == 0
        ]

    def _begin(self, unit: int, missing: list[tuple[Layer, int]]) -> None:
        self._left[unit], self._wanted[unit] = len(missing), [layer.rows(chunk) for layer, chunk in missing]
        for layer, chunk in missing:
            self._chunks[layer.name, chunk] = _Chunk(layer, chunk, unit)

    def _batches(self, unit: int) -> Iterator[NDArray[np.int64]]:
        """Rows of the store in batches; those of chunks that are all committed are left out."""
        rows, wanted = self._units[unit], self._wanted.pop(unit)
        skipped, batch = rows.stop - rows.start, self._job.batch
        for start in range(rows.start, rows.stop, batch):
            stop = min(start + batch, rows.stop)
            if any(some.start < stop and start < some.stop for some in wanted):
                skipped -= stop - start
                yield np.arange(start, stop)
        self._count(skipped)

    def _count(self, images: int) -> None:
        """Images that are done, by this process or by others."""
        with self._lock:
            self._progress.advance(images, self.clock.text())

    def _quantize(self, rows_B: NDArray[np.int64], maps: Maps) -> "dict[str, _Found]":
        return {name: self._quantizers[name].quantize(maps[name]) for name in self._quantizers}

    def _keep(self, rows_B: NDArray[np.int64], found: "dict[str, _Found]") -> None:
        """Put a batch's words into their chunks, and hand over those that are full."""
        for layer in self._layers:
            words_Bhw, distance_BM = found[layer.name]
            self._nearest[layer.name].add_batch(rows_B, words_Bhw.reshape(len(rows_B), -1), distance_BM)
            start, stop = int(rows_B[0]), int(rows_B[-1]) + 1
            for chunk in layer.chunks_of(slice(start, stop)):
                filling = self._chunks.get((layer.name, chunk))
                if filling and filling.put(start, words_Bhw):
                    del self._chunks[layer.name, chunk]
                    nearest = self._nearest[layer.name].result()
                    self._writes.add(partial(self._commit, filling, nearest))

    def _commit(self, chunk: "_Chunk", nearest: NearestImages) -> None:
        """Write a chunk, unless another process took this one for dead and wrote it; runs in the writing thread."""
        name, layer = self._name(chunk.unit), chunk.layer
        if self._board.holds(name) and layer.chunk_digest(chunk.number) == 0:
            # First the nearest images, then the chunk: the images of a committed chunk have been counted.
            save_nearest(self._board.folder / f"{nearest_name(self._writer, layer)}{self._mine}.npz", nearest)
            self._writer.write_chunk(layer.name, chunk.number, chunk.words)
        elif layer.chunk_digest(chunk.number) == 0:
            # This process was silent too long and another one has the unit: make sure that it gets done.
            if chunk.unit not in self._open:
                self._open.append(chunk.unit)
            return
        with self._lock:
            self._left[chunk.unit] -= 1
            whole = self._left[chunk.unit] == 0
        if whole:
            self._board.release(name)


_Found = tuple[NDArray[np.uint16], NDArray[np.float32]]


def claim_prefix(job: Job, writer: StoreWriter) -> str:
    """Prefix of claims on parts of a job: other layers of the store may be encoded at the same time."""
    return f"{job.part}.{writer.fingerprint[:16]}@"


def nearest_name(writer: StoreWriter, layer: Layer) -> str:
    """Name prefix of the files in which processes keep what they saw of a layer's nearest images.

    They lie beside the store, and must not be taken for those of another one that had its name before.
    """
    return f"nearest.{layer.name}.{layer.attributes['vocabulary_digest']}.{writer.fingerprint[:16]}."


class _Chunk:
    """A chunk that is being filled."""

    def __init__(self, layer: Layer, number: int, unit: int) -> None:
        self.layer, self.number, self.unit = layer, number, unit
        rows = layer.rows(number)
        self._start, self._missing = rows.start, rows.stop - rows.start
        self.words = np.empty((self._missing, *layer.grid), np.uint16)

    def put(self, start: int, words_Bhw: NDArray[np.uint16]) -> bool:
        """Take words of consecutive store rows; return whether the chunk is full."""
        first, last = max(start, self._start), min(start + len(words_Bhw), self._start + len(self.words))
        self.words[first - self._start : last - self._start] = words_Bhw[first - start : last - start]
        self._missing -= last - first
        full: bool = self._missing == 0
        return full


class _Writes:
    """Writes in order in a thread of its own, a few at a time; errors surface where the next write is added."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pool = ThreadPoolExecutor(1, "write")
        self._waiting: list[Future[None]] = []

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._wait(0)
        self._pool.shutdown(cancel_futures=kind is not None)

    def add(self, write: "partial[None]") -> None:
        """Write after the ones before; waits while too many are pending."""
        self._wait(_WRITES_WAITING - 1)
        self._waiting.append(self._pool.submit(write))

    def _wait(self, most: int) -> None:
        with self._clock.time("write"):
            while len(self._waiting) > most:
                self._waiting.pop(0).result()
