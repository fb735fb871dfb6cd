"""The pass over all images: the words of units of images, made by any rank; chunks of the store, written by rank 0.

Committed chunks are never made anew. A unit of images need not be a chunk: words wait here until theirs is whole.

Legend: B batch, M cells of an image, h w word grid, K words, c channels, p dimensions of a word.
"""

import glob
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from bowstore.clustering.projection import Projection
from bowstore.files import make_folder
from bowstore.progress import Progress
from bowstore.words.encode.crew import Crew, Work
from bowstore.words.encode.forward import Clock
from bowstore.words.encode.job import Job
from bowstore.words.encode.lanes import Maps, compute_workers
from bowstore.words.encode.quantizer import Quantizer, Words, quantizer
from bowstore.words.encode.units import cut_units, in_bytes, through_teacher
from bowstore.words.store.layer import Layer
from bowstore.words.store.nearest import NearestImages, NearestSearch, load_nearest, save_nearest
from bowstore.words.store.writer import StoreWriter, work_folder

Found = Mapping[str, Words]


def lead_pass(job: Job, writer: StoreWriter, crew: Crew) -> "AssignPass":
    """Encode what the store lacks, together with the other ranks; for rank 0, which writes it."""
    plan = _tell_plan(job, writer, crew)
    mine = AssignPass(job, plan)
    with Progress("encode", writer.images, done=writer.images - mine.images) as progress:
        keeper = _Keeper(writer, plan, progress, mine.clock)
        crew.share("assign", len(plan.units), mine.work(), keeper.keep)
    return mine


def follow_pass(job: Job, crew: Crew) -> None:
    """Any other rank's part in it."""
    plan = _plan(job, load(crew.hear("pass")))
    crew.share("assign", len(plan.units), AssignPass(job, plan).work())


@dataclass(frozen=True)
class _Plan:
    """What is left to do, as rank 0 tells the others.

    Attributes:
        units: of images, by number.
        layers: names and numbers of words of the layers that are not complete.
        quantizers: of these layers.
    """

    units: Sequence[slice]
    layers: Mapping[str, int]
    quantizers: Mapping[str, Quantizer]


def _tell_plan(job: Job, writer: StoreWriter, crew: Crew) -> _Plan:
    """Plan the pass over what the store lacks, and tell the others; for rank 0."""
    layers = [writer.layer(name) for name in job.names]
    missing = np.zeros(writer.images, dtype=bool)
    for layer in layers:
        for chunk in np.flatnonzero(layer.chunk_digests() == 0).tolist():
            missing[layer.rows(chunk)] = True
    rows = min(writer.images, math.lcm(*(layer.chunk_rows for layer in layers)))
    blocks = (slice(start, min(start + rows, writer.images)) for start in range(0, writer.images, rows))
    units = cut_units(blocks, job.batch, crew.size, needed=lambda batch: bool(missing[batch].any()))
    arrays: dict[str, NDArray[Any]] = {
        "units": np.array([(unit.start, unit.stop) for unit in units], np.int64).reshape(-1, 2)
    }
    for layer in layers:
        if not layer.complete:
            arrays[f"{layer.name}/vocabulary"] = layer.read_array("vocabulary")
            for name, values in zip(("projection", "offset"), layer.read_projection() or (), strict=False):
                arrays[f"{layer.name}/{name}"] = values
    crew.tell("pass", in_bytes(arrays))
    return _plan(job, arrays)


def _plan(job: Job, arrays: dict[str, NDArray[Any]]) -> _Plan:
    quantizers = {}
    for name in job.names:
        if (centroids_Kp := arrays.get(f"{name}/vocabulary")) is not None:
            projection = arrays.get(f"{name}/projection")
            prepared = None if projection is None else Projection(projection, arrays[f"{name}/offset"])
            quantizers[name] = quantizer(centroids_Kp, prepared, job.config.border, job.device)
    units = [slice(start, stop) for start, stop in arrays["units"].tolist()]
    return _Plan(units, {name: len(found.centroids_Kp) for name, found in quantizers.items()}, quantizers)


class AssignPass:
    """One rank's part in the pass.

    Attributes:
        images: that all ranks encode.
        clock: where the time went.
    """

    def __init__(self, job: Job, plan: _Plan) -> None:
        self._job, self._plan = job, plan
        self._nearest = {name: NearestSearch(num_words) for name, num_words in plan.layers.items()}
        self.images = sum(unit.stop - unit.start for unit in plan.units)
        self.clock = Clock(compute_workers(job.device))

    def work(self) -> Work:
        """What makes the words of units."""
        return through_teacher(
            self._job, self._plan.units, _rows, self._quantize, self._packed, clock=self.clock, stage="assign"
        )

    def _quantize(self, _rows_B: NDArray[np.int64], maps: Maps) -> Found:
        return {name: found.quantize(maps[name]) for name, found in self._plan.quantizers.items()}

    def _packed(self, unit: slice, made: list[tuple[NDArray[np.int64], Found]]) -> bytes:
        """A unit's words; and those of its images that are among the nearest that this rank has seen.

        An image that is among the nearest of all is among the nearest of those that one rank has seen, too: what a
        rank leaves out is never missed.
        """
        arrays: dict[str, NDArray[Any]] = {}
        for name, search in self._nearest.items():
            for rows_B, found in made:
                words_Bhw, distance_BM = found[name]
                search.add_batch(rows_B, words_Bhw.reshape(len(rows_B), -1), distance_BM)
            arrays[f"{name}/words"] = np.concatenate([found[name][0] for _, found in made])
            arrays |= {f"{name}/{part}": values for part, values in _among(search.result(), unit).items()}
        return in_bytes(arrays)


def _among(nearest: NearestImages, rows: slice) -> dict[str, NDArray[Any]]:
    """What is kept of some rows, by its place in the arrays: a small part of them."""
    place = np.flatnonzero((nearest.row_Kn >= rows.start) & (nearest.row_Kn < rows.stop))
    return {"place": place, **{part: values.ravel()[place] for part, values in nearest._asdict().items()}}


def _alone(arrays: Mapping[str, NDArray[Any]], name: str, num_words: int) -> NearestImages:
    """What `_among` took out of a layer's arrays, where it was in them, and nothing else."""
    alone = NearestSearch(num_words).result()
    for part, values in alone._asdict().items():
        values.ravel()[arrays[f"{name}/place"]] = arrays[f"{name}/{part}"]
    return alone


def _rows(part: slice) -> NDArray[np.int64]:
    return np.arange(part.start, part.stop)


class _Keeper:
    """Rank 0's side of the pass: chunks that fill, and the images nearest to the words.

    Args:
        writer: of the store.
        plan: what is left to do.
        progress: counts images.
        clock: for its note.
    """

    def __init__(self, writer: StoreWriter, plan: _Plan, progress: Progress, clock: Clock) -> None:
        self._writer, self._units, self._progress, self._clock = writer, plan.units, progress, clock
        self._layers = [writer.layer(name) for name in plan.layers]
        self._nearest = {layer.name: nearest_so_far(writer, layer) for layer in self._layers}
        self._chunks = {
            (layer.name, chunk): _Chunk(layer, chunk)
            for layer in self._layers
            for chunk in np.flatnonzero(layer.chunk_digests() == 0).tolist()
        }

    def keep(self, number: int, result: bytes) -> None:
        """Put a unit's words into their chunks, and commit those that are full."""
        unit, arrays = self._units[number], load(result)
        for layer in self._layers:
            words_Nhw = arrays[f"{layer.name}/words"]
            self._nearest[layer.name].merge(_alone(arrays, layer.name, layer.num_words))
            for chunk in layer.chunks_of(unit):
                filling = self._chunks.get((layer.name, chunk))
                if filling and (words := filling.put(unit.start, words_Nhw)) is not None:
                    del self._chunks[layer.name, chunk]
                    # First the nearest images, then the chunk: the images of a committed chunk have been counted.
                    keep_nearest(self._writer, layer, self._nearest[layer.name].result())
                    self._writer.write_chunk(layer.name, chunk, words)
        self._progress.advance(unit.stop - unit.start, self._clock.text())


class _Chunk:
    """A chunk that is being filled."""

    def __init__(self, layer: Layer, number: int) -> None:
        rows = layer.rows(number)
        self._start, self._missing = rows.start, rows.stop - rows.start
        self._shape = (self._missing, *layer.grid)
        self._words: NDArray[np.uint16] | None = None

    def put(self, start: int, words_Nhw: NDArray[np.uint16]) -> NDArray[np.uint16] | None:
        """Take words of consecutive rows, each row once; the chunk's words once it is full."""
        if self._words is None:
            self._words = np.empty(self._shape, np.uint16)
        first, last = max(start, self._start), min(start + len(words_Nhw), self._start + len(self._words))
        self._words[first - self._start : last - self._start] = words_Nhw[first - start : last - start]
        self._missing -= last - first
        return None if self._missing else self._words


def nearest_so_far(writer: StoreWriter, layer: Layer) -> NearestSearch:
    """What this store's earlier runs have seen of a layer's nearest images."""
    search = NearestSearch(layer.num_words)
    files = work_folder(writer.path).glob(f"{glob.escape(nearest_name(writer, layer))}*.npz")
    for found in (writer.nearest(layer.name), *load_nearest(sorted(files))):
        search.merge(found)
    return search


def nearest_name(writer: StoreWriter, layer: Layer) -> str:
    """Name prefix of the files in which is kept what was seen of a layer's nearest images.

    They lie beside the store, and must not be taken for those of another one that had its name before.
    """
    return f"nearest.{layer.name}.{layer.attributes['vocabulary_digest']}.{writer.fingerprint[:16]}."


def keep_nearest(writer: StoreWriter, layer: Layer, nearest: NearestImages) -> None:
    """Write what was seen to the one file of a layer; earlier versions wrote one for each process, read too."""
    folder = work_folder(writer.path)
    make_folder(folder)
    save_nearest(folder / f"{nearest_name(writer, layer)}all.npz", nearest)
