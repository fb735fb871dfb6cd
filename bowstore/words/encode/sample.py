"""The sample of feature vectors that vocabularies are made of, spread over the data set (paper, Eq. 2).

Legend: N images, B batch, c channels, h w word grid, S sampled vectors, K words.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.clustering.kmeans import default_backend
from bowstore.environment import available_memory
from bowstore.errors import UsageError
from bowstore.progress import Progress, timed
from bowstore.words.encode.crew import Crew
from bowstore.words.encode.forward import Arrays, Maps, cut_units, through_teacher
from bowstore.words.encode.job import Job

# An image gives at least this many vectors: fewer would mean a pass over all of a large set for no better words.
_POSITIONS_PER_IMAGE = 16
_UNIT_BYTES = 16 << 20


@dataclass(frozen=True)
class SamplePlan:
    """Which vectors to sample: a pure function of (N, h w, K, sample_per_word, seed).

    Attributes:
        rows: int64, ascending, the images to look at.
        counts: int64, vectors to take of each.
        seed: of the positions.
    """

    rows: NDArray[np.int64]
    counts: NDArray[np.int64]
    seed: int

    @property
    def vectors(self) -> int:
        """S."""
        return int(self.counts.sum())

    def take(self, rows_B: NDArray[np.int64], maps_Bchw: Tensor) -> NDArray[np.float32]:
        """The planned vectors of a batch, at random positions of each map, float32 (n, c).

        Args:
            rows_B: int64, ascending, with every planned row between the first and the last; others are skipped.
            maps_Bchw: their maps.
        """
        planned = np.flatnonzero(np.isin(rows_B, self.rows, assume_unique=True))
        if not len(planned):
            return np.empty((0, maps_Bchw.shape[1]), np.float32)
        maps_Bchw = maps_Bchw[torch.from_numpy(planned).to(maps_Bchw.device)]
        batch, device, cells = len(planned), maps_Bchw.device, maps_Bchw[0, 0].numel()
        # One stream of random numbers in the order of all planned images, of which each batch finds its own part: the
        # positions depend neither on the batch size nor on who takes which batch.
        first = int(np.searchsorted(self.rows, rows_B[planned[0]]))
        stream = np.random.PCG64([self.seed, 1])
        stream.advance(first * cells)
        order = np.random.Generator(stream).random((batch, cells)).argsort(axis=1, kind="stable")
        image, place = np.nonzero(np.arange(cells) < self.counts[first : first + batch, None])
        flat_BMc = maps_Bchw.flatten(2).transpose(1, 2)
        some = flat_BMc[torch.from_numpy(image).to(device), torch.from_numpy(order[image, place]).to(device)]
        taken: NDArray[np.float32] = some.cpu().numpy()
        return taken

    def before(self, row: int) -> int:
        """Vectors of all images before a row."""
        return int(self.counts[: np.searchsorted(self.rows, row)].sum())


def plan_sample(images: int, positions: int, num_words: int, *, sample_per_word: int, seed: int) -> SamplePlan:
    """Choose images, and how many vectors of each, for K * sample_per_word vectors or all there are, at least K.

    Args:
        images: N.
        positions: h * w.
        num_words: number of words.
        sample_per_word: vectors for each word.
        seed: of the choice.
    """
    there = images * positions
    wanted = min(num_words * sample_per_word, there)
    rng = np.random.default_rng([seed, 0])
    used = min(images, -(-wanted // min(positions, _POSITIONS_PER_IMAGE)))
    rows = np.sort(rng.permutation(images)[:used]).astype(np.int64)
    counts = np.full(used, wanted // used, dtype=np.int64)
    counts[rng.permutation(used)[: wanted % used]] += 1
    return SamplePlan(rows, counts, seed)


def draw_samples(job: Job, crew: Crew) -> dict[str, NDArray[np.float32]]:
    """Sampled vectors of all layers, float32 (S, c), in one pass that all ranks share; of use on rank 0 alone.

    All layers are looked at even if some have words already, so that batches stay the same.
    """
    how = {"sample_per_word": job.config.sample_per_word, "seed": job.config.seed}
    plans = {
        name: plan_sample(len(job.index), math.prod(layer.grid), job.num_words[name], **how)
        for name, layer in job.teacher.layers.items()
    }
    if crew.first:
        check_memory(job, plans)
    rows = np.unique(np.concatenate([plan.rows for plan in plans.values()]))
    channels = {name: layer.channels for name, layer in job.teacher.layers.items()}
    batch_bytes = 4 * job.batch * sum(plan.vectors * channels[name] for name, plan in plans.items()) // len(rows)
    most = max(1, _UNIT_BYTES // max(1, batch_bytes))
    units = [rows[unit] for unit in cut_units([slice(0, len(rows))], job.batch, crew.size, most)]

    def taken(rows_B: NDArray[np.int64], maps: Maps) -> Arrays:
        return {name: plan.take(rows_B, maps[name]) for name, plan in plans.items()}

    found = {
        name: np.empty((plan.vectors if crew.first else 0, channels[name]), np.float32) for name, plan in plans.items()
    }

    def keep(rows: NDArray[np.int64], arrays: Arrays) -> None:
        for name, vectors in arrays.items():
            start = plans[name].before(int(rows[0]))
            found[name][start : start + len(vectors)] = vectors

    with timed(job.seconds, "sample"), Progress("sample", len(rows), shown=crew.first) as progress:
        through_teacher(job, crew, units, taken, keep=keep, stage="sample", progress=progress)
    return found


def check_memory(job: Job, plans: Mapping[str, SamplePlan]) -> None:
    """Refuse samples that do not fit in memory: the kernel would kill the process without a word."""
    needed, copied = 0, 0
    for name, layer in job.teacher.layers.items():
        vectors = plans[name].vectors
        shape = vectors, job.config.pca or layer.channels
        needed += 4 * vectors * layer.channels
        # Layer by layer, SuperKMeans holds a second copy of the sample, and so do its principal components.
        copies = (job.config.pca is not None) + (default_backend(shape, job.num_words[name], job.device) == "super")
        copied = max(copied, 4 * copies * shape[0] * shape[1])
    needed, free = needed + copied, available_memory()
    if needed > free:
        raise UsageError(
            f"the samples of {', '.join(plans)} take {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB "
            f"are free; lower --sample-per-word (now {job.config.sample_per_word}), or encode fewer layers at a time"
        )
