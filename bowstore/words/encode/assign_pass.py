"""The pass over all images: the words of units of images, made by any rank; chunks of the store, written by rank 0.

Committed chunks are never written anew. A unit of images need not be a chunk: words wait here until theirs is whole.

Legend: B batch, M cells of an image, h w word grid, K words, c channels, p dimensions of a word, n images kept.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor

from bowstore.clustering.projection import Projection, prepare_projection
from bowstore.exact import exact_float32
from bowstore.progress import Progress
from bowstore.words.assign.assign import assign, prepare_words
from bowstore.words.encode.crew import Crew
from bowstore.words.encode.forward import Arrays, Clock, Maps, cut_units, through_teacher
from bowstore.words.encode.job import Job
from bowstore.words.store.layer import Layer
from bowstore.words.store.nearest import Cells, NearestSearch, load_nearest, save_nearest
from bowstore.words.store.schema import NOT_WRITTEN
from bowstore.words.store.writer import StoreWriter

Words = tuple[NDArray[np.uint16], NDArray[np.float32]]  # (B, h, w), and the vectors' distances to them, (B, M)


def encode_images(job: Job, crew: Crew, writer: StoreWriter | None = None) -> tuple[int, Clock]:
    """Encode what the store lacks, together with the other ranks.

    Args:
        job: what is encoded, and how.
        crew: the ranks.
        writer: of the store; on rank 0, which alone writes it.

    Returns:
        The number of images that all ranks encoded, and where this rank's time went.
    """
    keeper = None
    if writer:
        layers = [writer.layer(name) for name in job.num_words]
        crew.tell("pass", save(_plan(job, layers, crew.size)))
        keeper = _Keeper(writer, [layer for layer in layers if not layer.complete])
    plan = load(crew.hear("pass"))
    units = [np.arange(start, stop) for start, stop in plan["units"].tolist()]
    quantizers, nearest = {}, {}
    for name in job.num_words:
        if (centroids_Kp := plan.get(f"{name}/vocabulary")) is not None:
            matrix = plan.get(f"{name}/projection")
            projection = None if matrix is None else Projection(matrix, plan[f"{name}/offset"])
            quantizers[name] = quantizer(centroids_Kp, projection, job.device)
            nearest[name] = NearestSearch(len(centroids_Kp))

    def quantized(_rows_B: NDArray[np.int64], maps: Maps) -> Arrays:
        arrays: Arrays = {}
        for name, quantize in quantizers.items():
            arrays[f"{name}/words"], arrays[f"{name}/distance"] = quantize(maps[name])
        return arrays

    def packed(rows: NDArray[np.int64], made: Arrays) -> Arrays:
        arrays: Arrays = {}
        for name, search in nearest.items():
            arrays[f"{name}/words"], distance_NM = made[f"{name}/words"], made[f"{name}/distance"]
            # What a rank leaves out is farther than n images that it has seen, so rank 0 misses nothing; after the
            # first thousands of images that is nearly all, and messages are little more than words.
            near = search.add_batch(rows, arrays[f"{name}/words"].reshape(distance_NM.shape), distance_NM)
            arrays |= {f"{name}/near/{part}": values for part, values in near._asdict().items()}
        return arrays

    images, total = sum(map(len, units)), len(job.index)
    with Progress("encode", total, done=total - images, shown=crew.first) as progress:
        keep = keeper.keep if keeper else None
        clock = through_teacher(job, crew, units, quantized, pack=packed, keep=keep, stage="assign", progress=progress)
    return images, clock


def _plan(job: Job, layers: Sequence[Layer], ranks: int) -> dict[str, NDArray[Any]]:
    """What is left to do: units of images, and how the layers that are not complete get their words."""
    # Blocks end where chunks of all layers do. One that lacks a chunk of any layer is encoded whole.
    rows, images = math.lcm(*(layer.chunk_rows for layer in layers)), layers[0].images
    missing = {
        chunk * layer.chunk_rows // rows for layer in layers for chunk in np.flatnonzero(layer.chunk_digests() == 0)
    }
    blocks = [slice(block * rows, min((block + 1) * rows, images)) for block in sorted(map(int, missing))]
    units = [(unit.start, unit.stop) for unit in cut_units(blocks, job.batch, ranks)]
    arrays: dict[str, NDArray[Any]] = {"units": np.array(units, np.int64).reshape(-1, 2)}
    for layer in layers:
        if not layer.complete:
            arrays[f"{layer.name}/vocabulary"] = layer.read_array("vocabulary")
            for name, values in zip(("projection", "offset"), layer.read_projection() or (), strict=False):
                arrays[f"{layer.name}/{name}"] = values
    return arrays


def quantizer(
    centroids_Kp: NDArray[np.float32], projection: Projection | None, device: torch.device
) -> Callable[[Tensor], Words]:
    """What makes words of maps (B, c, h, w) on a device, under a vocabulary."""
    centroids = torch.from_numpy(centroids_Kp).to(device)
    words, before = prepare_words(centroids), prepare_projection(projection, device) if projection else None

    def quantize(map_Bchw: Tensor) -> Words:
        batch, channels, h, w = map_Bchw.shape
        vectors = map_Bchw.permute(0, 2, 3, 1).reshape(-1, channels)
        with exact_float32():
            if before:
                vectors = before(vectors)
            ids = assign(vectors, words)
            distance = torch.linalg.vector_norm(vectors - centroids[ids.long()], dim=1)
        return ids.view(batch, h, w).cpu().numpy(), distance.view(batch, -1).cpu().numpy()

    return quantize


class _Keeper:
    """Rank 0's side of the pass: chunks that fill, and the images nearest to the words."""

    def __init__(self, writer: StoreWriter, layers: Sequence[Layer]) -> None:
        self._writer, self._layers = writer, layers
        self._nearest = {layer.name: nearest_so_far(layer) for layer in layers}
        # Units of several ranks come in any order, so several chunks fill at once: as many as units are under way.
        self._filling: dict[tuple[str, int], NDArray[np.uint16]] = {}

    def keep(self, rows: NDArray[np.int64], arrays: Arrays) -> None:
        """Put a unit's words into their chunks, and commit those that are full."""
        unit = slice(int(rows[0]), int(rows[-1]) + 1)
        for layer in self._layers:
            self._nearest[layer.name].add(Cells(*(arrays[f"{layer.name}/near/{part}"] for part in Cells._fields)))
            for chunk in layer.chunks_of(unit):
                self._fill(layer, chunk, unit.start, arrays[f"{layer.name}/words"])

    def _fill(self, layer: Layer, chunk: int, start: int, words_Nhw: NDArray[np.uint16]) -> None:
        key, rows = (layer.name, chunk), layer.rows(chunk)
        if key not in self._filling:
            self._filling[key] = np.full((rows.stop - rows.start, *layer.grid), NOT_WRITTEN, np.uint16)
        words = self._filling[key]
        first, last = max(start, rows.start), min(start + len(words_Nhw), rows.stop)
        words[first - rows.start : last - rows.start] = words_Nhw[first - start : last - start]
        if (words == NOT_WRITTEN).any():
            return
        del self._filling[key]
        committed = layer.chunk_digests(slice(chunk, chunk + 1)).any()
        if not committed:  # or another layer, of other chunks, lacked these images
            # First the nearest images, then the chunk: the images of a committed chunk have been counted.
            save_nearest(nearest_file(layer), self._nearest[layer.name].result())
            self._writer.write_chunk(layer.name, chunk, words)


def nearest_so_far(layer: Layer) -> NearestSearch:
    """What this store's earlier runs have seen of a layer's nearest images."""
    search = NearestSearch(layer.num_words)
    if layer.attributes.get("nearest_digest"):
        search.merge(layer.read_nearest())
    if (file := nearest_file(layer)).exists():
        search.merge(load_nearest(file))
    return search


def nearest_file(layer: Layer) -> Path:
    """Where what was seen of the nearest images lies until the layer is complete."""
    return layer.path / layer.name / "nearest.npz"
