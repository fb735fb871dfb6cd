"""Are images the same that have the same keys? Keys are names of files: splits of a set often use the same ones.

Words tell: a few images are encoded and compared with what the store holds of them.

Legend: B images looked at, M images that may be looked at, h w word grid.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bowstore.errors import MismatchError
from bowstore.words.assign_pass import quantizer
from bowstore.words.forward import Clock, Maps, compute_workers, forward
from bowstore.words.job import Job
from bowstore.words.layer import Layer

_LOOKED_AT = 16
# Equal images differ in a word in a thousand at most, by rounding; others share what is frequent everywhere.
_ALIKE = 0.9


def check_same_images(
    job: Job, layers: Sequence[Layer], index_rows_M: NDArray[np.int64], store_rows_M: NDArray[np.int64]
) -> None:
    """Refuse shards that hold other images under keys of the store; not asked of sets that the store was made of.

    Args:
        job: has the teacher, the shards, and the store as `base`.
        layers: of the store, whose words of these images can be read.
        index_rows_M: int64, rows of the shards' index.
        store_rows_M: int64, rows of the store with the same keys.

    Raises:
        MismatchError: names such images.
    """
    assert job.base
    if job.index.fingerprint in {part["fingerprint"] for part in job.base.parts} or not len(index_rows_M) or not layers:
        return
    some = np.unique(np.linspace(0, len(index_rows_M) - 1, _LOOKED_AT).round().astype(np.int64))
    store_rows_B, alike_B = store_rows_M[some], np.ones(len(some))
    for layer, words_Bhw in _encoded(job, layers, index_rows_M[some]).items():
        held_Bhw = np.stack([_words_of(layer, row) for row in store_rows_B.tolist()])
        alike_B = np.minimum(alike_B, (held_Bhw == words_Bhw).mean(axis=(1, 2)))
    other = index_rows_M[some][alike_B < _ALIKE].tolist()
    if other:
        raise MismatchError(
            f"{job.index.root} holds other images than word store {job.base.path} under the same keys: of {len(some)} "
            f"compared {len(other)} have other words, for example {', '.join(map(job.index.key, other[:3]))}; keys are "
            "paths in shards, so make the shards anew with a folder for each set, or use a store for each set"
        )


def _encoded(job: Job, layers: Sequence[Layer], rows_B: NDArray[np.int64]) -> dict[Layer, NDArray[np.uint16]]:
    quantizers = {layer: quantizer(layer, job.device) for layer in layers}

    def quantize(_rows_B: NDArray[np.int64], maps: Maps) -> dict[Layer, NDArray[np.uint16]]:
        return {layer: quantizers[layer].quantize(maps[layer.name])[0] for layer in layers}

    parts = forward(
        job.teacher,
        job.index,
        np.array_split(rows_B, -(-len(rows_B) // job.batch)),
        quantize,
        batch=job.batch,
        device=job.device,
        clock=Clock(compute_workers(job.device, alone=True)),
        stage="compare",
        threads=job.config.threads,
    )
    found = [words for _, words in parts]
    return {layer: np.concatenate([words[layer] for words in found]) for layer in layers}


def _words_of(layer: Layer, row: int) -> NDArray[np.uint16]:
    chunk = row // layer.chunk_rows
    words: NDArray[np.uint16] = layer.read_chunk(chunk, layer.chunk_digest(chunk))[row - layer.rows(chunk).start]
    return words
