"""Encoding against what bounds it: the clean view alone and the teacher alone, interleaved in one process."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.benchmarks.config import EncodeBench
from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.benchmarks.rounds import in_rounds
from bowstore.config import SomePaths, StorageConfig
from bowstore.data.feed import PREFETCH
from bowstore.data.index import Index, concatenated, open_index
from bowstore.data.pipeline import clean_batches
from bowstore.data.reader import ShardReader, fetched
from bowstore.environment import choose_device, cores, device_name
from bowstore.errors import UsageError
from bowstore.exact import cpu_threads, exact_float32
from bowstore.models.opened import open_network
from bowstore.progress import without_progress
from bowstore.torchrun import Ranks
from bowstore.words.encode.assign_pass import encode_images
from bowstore.words.encode.config import EncodeConfig
from bowstore.words.encode.crew import join
from bowstore.words.encode.job import Job
from bowstore.words.encode.teacher import freeze_teacher
from bowstore.words.encode.workers import compute_workers, workers
from bowstore.words.store.writer import StoreWriter, create_store

_WAYS = ("clean view alone", "teacher alone", "encode")


@dataclass(frozen=True)
class _Bench:
    """What is timed.

    Attributes:
        job: an encode.
        images: of one round.
        vocabularies: float32 (K, c) by layer, vectors of the teacher's own maps.
        images_BCHW: a batch of the clean view.
    """

    job: Job
    images: int
    vocabularies: dict[str, NDArray[np.float32]]
    images_BCHW: Tensor

    def view(self) -> Iterator[int]:
        """Endless batches of the clean view, in the order of the rows; the number of images in each."""
        job = self.job
        rows = np.arange(self.images)
        cut = [rows[start : start + job.batch] for start in range(0, self.images, job.batch)]
        endless = itertools.cycle(cut)
        for rows_B, _ in clean_batches(
            ShardReader(job.index), job.teacher.view, endless, batch=job.batch, device=job.device,
            threads=job.config.threads,
        ):  # fmt: skip
            yield len(rows_B)

    def time_view(self, batches: Iterator[int]) -> float:
        """Images/s of decoding, once what was made ahead is used up."""
        for _ in range(PREFETCH + 2):
            next(batches)
        count = -(-self.images // self.job.batch)
        begun = time.perf_counter()
        images = sum(next(batches) for _ in range(count))
        return images / (time.perf_counter() - begun)

    def time_teacher(self) -> float:
        """Images/s of the teacher, run as in the pass, on one resident batch."""
        job = self.job
        replicas = [job.teacher.replica() for _ in range(compute_workers(job.device))]
        count = max(len(replicas), -(-self.images // len(self.images_BCHW)))

        def work(worker: int) -> None:
            for _ in range(worker, count, len(replicas)):
                replicas[worker].maps(self.images_BCHW)

        # Around all of them: each sets the precision of products and restores it.
        with cpu_threads(job.device, 1), exact_float32(), workers(len(replicas)) as pool:
            begun = time.perf_counter()
            list(pool.map(work, range(len(replicas))))
            if job.device.type == "cuda":
                torch.cuda.synchronize(job.device)
            return count * len(self.images_BCHW) / (time.perf_counter() - begun)

    def time_encode(self) -> tuple[float, dict[str, float]]:
        """Images/s of the whole pass into a temporary store, and the shares of its stages."""
        job = self.job
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "words.zarr"
            hashes = np.arange(1, self.images + 1, dtype=np.uint64)
            writer = create_store(path, fingerprint=job.index.fingerprint, key_hash_N=hashes, image_digest_N=hashes)
            for name, vocabulary_Kc in self.vocabularies.items():
                writer.add_layer(name, job.spec(name, {}), vocabulary_Kc)
            begun = time.perf_counter()
            with join(Ranks(0, 1, 0, 1), {}) as crew, without_progress():
                _, clock = encode_images(job, crew, StoreWriter(path))
            # The other ways are timed at full speed, too.
            seconds = time.perf_counter() - begun - clock.seconds["start"]
            return self.images / seconds, clock.shares()


def bench_encode(
    shards: SomePaths,
    config: EncodeBench,
    storage: StorageConfig | None = None,
) -> BenchResult:
    """Images/s of the clean view alone, of the teacher alone up to its deepest layer, and of the whole pass.

    Args:
        shards: folder of indexed shards.
        config: teacher, layers and K; the vocabulary is made of vectors of the first images, without k-means. A set
            smaller than a round is repeated; one more round warms up.
        storage: how shards are read.
    """
    device = choose_device(config.device)
    bench = _prepare(fetched(open_index(shards, storage)), config, config.images, device)
    batches, job = bench.view(), bench.job
    shares: dict[str, float] = {}

    def encode() -> float:
        rate, found = bench.time_encode()
        shares.update(found)
        return rate

    ways: dict[str, Callable[[], float]] = dict(
        zip(_WAYS, (lambda: bench.time_view(batches), bench.time_teacher, encode), strict=True)
    )
    rates = in_rounds("bench encode", ways, config.rounds, lambda rate: f"{rate:.1f} images/s")
    view, teacher, whole = (rates[name] for name in _WAYS)
    ratios = [all_ / min(one, other) for one, other, all_ in zip(view, teacher, whole, strict=True)]
    median = {name: statistics.median(values) for name, values in rates.items()}
    return BenchResult(
        protocol="bench/encode",
        device=f"{device_name(device)}, {cores()} cores",
        inputs={"shards": job.index.fingerprint, "teacher": job.teacher.sha256},
        settings={
            "images": bench.images,
            "batch": job.batch,
            "workers": compute_workers(device),
            "arch": job.teacher.backbone.arch,
            "layers": {
                name: {"words": job.num_words[name], "grid": layer.grid} for name, layer in job.teacher.layers.items()
            },
            "size": job.teacher.view.size,
            "precision": config.precision,
            "trunk": job.teacher.trunk,
            "mean_image_bytes": float(job.index.size.mean()),
        },
        unit="images",
        timings=[Timing(name, values) for name, values in rates.items()],
        binds=min(_WAYS[:2], key=lambda name: median[name]),
        figures={
            "ratio_over_slower": statistics.median(ratios),
            "least_ratio_over_slower": min(ratios),
            **{f"share_{stage}": share for stage, share in shares.items()},
        },
        notes=[
            "encode, once its first images are there, over the slower of the other two; shares are of the last pass"
        ],
    )


def _prepare(index: Index, config: EncodeConfig, images: int, device: torch.device) -> _Bench:
    opened = open_network(config.teacher, weights=config.weights, size=config.size, seed=config.seed)
    teacher = freeze_teacher(
        opened, config.layers, device, size=config.size, resize=config.resize, precision=config.precision,
        border=config.border,
    )  # fmt: skip
    num_words = config.words_of_each(list(teacher.layers))
    # A set smaller than a round is repeated.
    repeated = replace(concatenated([index] * -(-images // len(index))), fingerprint=index.fingerprint)
    job = Job(config, repeated, teacher, num_words, Path(), device).in_one_way()
    teacher = job.teacher
    found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in num_words}
    kept: Tensor | None = None
    for _, images_BCHW in clean_batches(
        ShardReader(index), teacher.view, np.arange(min(images, len(index))), batch=job.batch, device=device
    ):
        kept = images_BCHW.clone() if kept is None else kept
        for name, map_Bchw in teacher.maps(images_BCHW).items():
            found[name].append(map_Bchw.permute(0, 2, 3, 1).flatten(0, 2).cpu().numpy())
        if all(sum(map(len, found[name])) >= count for name, count in num_words.items()):
            break
    vectors = {name: np.concatenate(parts) for name, parts in found.items()}
    for name, count in num_words.items():
        if len(vectors[name]) < count:
            raise UsageError(
                f"{min(images, len(index))} images give {len(vectors[name])} vectors of layer {name!r}, "
                f"fewer than K = {count}; lower --K, or name more images"
            )
    assert kept is not None, "there is at least one image"
    return _Bench(job, images, {name: vectors[name][:count] for name, count in num_words.items()}, kept)
