"""Are images the same that have the same keys? Keys are names of files: splits of a set often use the same ones.

Words tell: a few images are encoded and compared with what the store holds of them.

Legend: N images of the store, B images looked at, h w word grid, K words, n images kept for each word.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bowstore.errors import MismatchError
from bowstore.progress import say
from bowstore.words.assign_pass import quantizer
from bowstore.words.forward import Clock, forward
from bowstore.words.job import Job
from bowstore.words.lanes import Maps, compute_workers
from bowstore.words.layer import Layer

_LOOKED_AT = 16
# Equal images differ in a word in a thousand at most, by rounding; others share what is frequent everywhere.
_ALIKE = 0.9
_CHANCE = 0.1  # of images of one cell, the word of one may change


Known = dict[int, tuple[NDArray[np.int64], NDArray[np.uint16]]]  # of a store's row, some cells and their words


def check_same_images(job: Job, layers: Sequence[Layer], place_N: NDArray[np.int64]) -> None:
    """Refuse shards that hold other images under keys of the store; not asked of sets that the store was made of.

    Args:
        job: has the teacher, the shards, and the store as `base`.
        layers: of the store.
        place_N: int64, for each row of the store the row of the shards' index with its key; -1 for none.

    Raises:
        MismatchError: names such images.
    """
    assert job.base
    if job.index.fingerprint in {part["fingerprint"] for part in job.base.parts} or not (place_N >= 0).any():
        return
    for layer in layers:
        known = _known(layer, place_N)
        if not known:
            say(
                f"warning: nothing that {layer.name} holds is left to compare these images with: keys alone are trusted"
            )
            continue
        rows_B = place_N[list(known)]
        words_Bhw = _encoded(job, layer, rows_B)
        alike = [
            float((words_hw.ravel()[cells] == words).mean())
            for words_hw, (cells, words) in zip(words_Bhw, known.values(), strict=True)
        ]
        other = [row for row, share in zip(rows_B.tolist(), alike, strict=True) if share < _ALIKE]
        if len(other) > _CHANCE * len(known):
            raise MismatchError(
                f"{job.index.root} holds other images than word store {job.base.path} under the same keys: of "
                f"{len(known)} compared {len(other)} have other words, for example "
                f"{', '.join(map(job.index.key, other[:3]))}; keys are paths in shards, so make the shards anew with a "
                "folder for each set, or use a store for each set"
            )


def _known(layer: Layer, place_N: NDArray[np.int64]) -> Known:
    """Words of a few images that the shards have too: of their chunks, or of the nearest images if no chunk is left."""
    there_N = np.repeat(layer.chunk_digests() != 0, layer.chunk_rows)[: len(place_N)]
    rows = _some(np.flatnonzero((place_N >= 0) & there_N))
    if len(rows):
        cells = np.arange(layer.grid[0] * layer.grid[1])
        return {row: (cells, _words_of(layer, row).ravel()) for row in rows.tolist()}
    if not layer.attributes.get("nearest_digest"):
        return {}
    nearest_Kn2 = layer.read_array("nearest")
    row_Kn, cell_Kn = nearest_Kn2[..., 0], nearest_Kn2[..., 1]
    seen = np.unique(row_Kn[row_Kn >= 0])
    known: Known = {}
    for row in _some(seen[place_N[seen] >= 0]).tolist():
        word, place = np.nonzero(row_Kn == row)
        known[row] = cell_Kn[word, place], word.astype(np.uint16)
    return known


def _some(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows[np.unique(np.linspace(0, max(len(rows) - 1, 0), _LOOKED_AT).round().astype(np.int64))[: len(rows)]]


def _encoded(job: Job, layer: Layer, rows_B: NDArray[np.int64]) -> NDArray[np.uint16]:
    words_of = quantizer(layer, job.device)

    def quantize(_rows_B: NDArray[np.int64], maps: Maps) -> NDArray[np.uint16]:
        return words_of.quantize(maps[layer.name])[0]

    parts = forward(
        job,
        np.array_split(rows_B, -(-len(rows_B) // job.batch)),
        quantize,
        clock=Clock(compute_workers(job.device, alone=True)),
        stage="compare",
    )
    return np.concatenate([words for _, words in parts])


def _words_of(layer: Layer, row: int) -> NDArray[np.uint16]:
    chunk = row // layer.chunk_rows
    words: NDArray[np.uint16] = layer.read_chunk(chunk, layer.chunk_digest(chunk))[row - layer.rows(chunk).start]
    return words
