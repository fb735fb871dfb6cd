"""From shards and a teacher to a store of words: sample, cluster, assign; resumable after any interruption.

Legend: B batch, N images, c channels, h w word grid, K words.
"""

import errno
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.config import StorageConfig
from bowstore.data.index import Index, check_columns, open_index
from bowstore.data.pipeline import clean_batches
from bowstore.data.reader import ShardReader, fetched
from bowstore.errors import BowstoreError, DataError, MismatchError
from bowstore.progress import Progress, say, timed
from bowstore.remote import local_only
from bowstore.words.arrays import stored_bytes
from bowstore.words.assign import assign, prepare_words
from bowstore.words.layer import Layer, LayerSpec
from bowstore.words.statistics import health_warnings, word_statistics
from bowstore.words.store import StoreWriter, create_store, open_for_writing, writing_lock
from bowstore.words.teacher import Teacher, TeacherLayer, load_teacher
from bowstore.words.vocabulary import Vocabulary, build_vocabulary, draw_sample, plan_sample

_BATCH = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True)
class EncodeReport:
    """What was encoded.

    Attributes:
        store: the word store.
        layer: the teacher's layer.
        images: N.
        words: K.
        grid: (h, w).
        channels: c.
        chunks: words chunks of the layer.
        chunks_before: those that an earlier run had written.
        already_complete: nothing was left to do.
        bytes_per_image: of words, their digests and key hashes on disk, for each image.
        vocabulary_bytes: of the vocabulary on disk.
        seconds: wall-clock time by stage: sample, k-means, assign, finish.
        vocabulary: how the vocabulary was made, and its health.
        statistics: use of the words: unused_words, perplexity, image_perplexity, largest_share, largest_word.
        warnings: one line each.
    """

    store: Path
    layer: str
    images: int
    words: int
    grid: tuple[int, int]
    channels: int
    chunks: int
    chunks_before: int
    already_complete: bool
    bytes_per_image: float
    vocabulary_bytes: int
    seconds: dict[str, float]
    vocabulary: dict[str, Any]
    statistics: dict[str, Any]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {**asdict(self), "store": str(self.store)}

    def text(self) -> str:
        """A few lines for people."""
        h, w = self.grid
        head = f"{self.store}: {self.layer}, {self.words} words, {self.images} images of {h}x{w} cells"
        if self.already_complete:
            return f"{head}: already complete"
        used = self.statistics
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        largest = f"the most frequent has {100 * used['largest_share']:.1f} % of all cells"
        return (
            f"{head}; {self.bytes_per_image:.0f} bytes an image ({stages})\n"
            f"{used['unused_words']} words never used, {largest}; "
            f"perplexity {used['perplexity']:.0f} over the set, {used['image_perplexity']:.1f} an image"
        )


@dataclass(frozen=True)
class _Job:
    """One call of `encode`, resolved."""

    index: Index
    teacher: Teacher
    store: Path
    k: int
    seed: int
    sample_per_word: int
    iterations: int
    batch: int
    device: torch.device
    threads: int | None
    seconds: dict[str, float]

    @property
    def layer(self) -> TeacherLayer:
        """The layer that is encoded."""
        return self.teacher.layers[0]

    def settings(self) -> dict[str, Any]:
        """Values that must be the same to go on with a layer, by the names that messages use."""
        return {
            "teacher architecture": self.teacher.backbone.arch,
            "teacher weights": self.teacher.sha256,
            "clean view": _plain(asdict(self.teacher.view)),
            "K": self.k,
            "seed": self.seed,
            "sample_per_word": self.sample_per_word,
            "iterations": self.iterations,
        }


def encode(
    *,
    teacher: str | Path,
    shards: Path,
    store: Path,
    layer: str,
    k: int,
    seed: int = 0,
    sample_per_word: int = 256,
    iterations: int = 25,
    batch: int | None = None,
    device: torch.device | None = None,
    threads: int | None = None,
    storage: StorageConfig | None = None,
    weights: Path | None = None,
    size: int | None = None,
    resize: int | None = None,
) -> EncodeReport:
    """Write the words of all images of `shards` at one layer of a teacher into a store (paper, Eq. 1 and 2).

    A layer of the same settings that is complete is left alone; one that is not is gone on with, chunk by chunk,
    and ends as if it had never been interrupted. Other layers of the store stay usable meanwhile.

    Args:
        teacher: run directory, checkpoint or exported backbone; or an architecture, such as `timm:NAME`.
        shards: folder of indexed shards.
        store: where the word store is or will be.
        layer: the teacher's layer.
        k: number of words, 1 to 65535.
        seed: of the sample and of k-means.
        sample_per_word: feature vectors sampled for each word.
        iterations: of k-means.
        batch: images a batch; None for 64 on a CPU, 256 on a GPU.
        device: where the teacher runs; None for the GPU where there is one.
        threads: decoding threads; None for one a core.
        storage: how shards are read, and where copies of remote ones lie; None for the defaults.
        weights: of an architecture: a local file in any known layout; None for random weights from `seed`.
        size: side of the clean view, pixels; None for the teacher's own.
        resize: short side before the centre crop, pixels; None for the teacher's own.

    Raises:
        MissingError: no teacher, shards or index.
        UsageError: no such layer, a K that does not fit the data set, or a store on another machine.
        MismatchError: the store holds another data set, or this layer with other settings.
        DataError: images that do not decode, features that are not finite or too few distinct ones.
        BusyError: another process writes this store.
        BowstoreError: the disk is full; the store can be gone on with.
    """
    local_only(store, "encode into a local --store, then copy it there")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = _Job(
        index=fetched(open_index(shards, storage)),
        teacher=load_teacher(teacher, (layer,), device, weights=weights, size=size, resize=resize, seed=seed),
        store=store,
        k=k,
        seed=seed,
        sample_per_word=sample_per_word,
        iterations=iterations,
        batch=batch or _BATCH[device.type],
        device=device,
        threads=threads,
        seconds={},
    )
    check_columns(job.index)
    try:
        with writing_lock(store):
            return _encode(job)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BowstoreError(
            f"no space left on the disk of {store}; free some and run the same command again: finished chunks are kept"
        ) from error


def _encode(job: _Job) -> EncodeReport:
    name = job.layer.name
    writer = open_for_writing(job.store) if job.store.exists() else None
    if writer:
        _check_data_set(writer, job.index)
    if writer and name in writer.layers:
        layer = writer.layer(name)
        _check_settings(layer, job)
        if layer.complete:
            say(f"layer {name!r} of word store {job.store} is already complete")
            return _report(job, layer, layer.chunks, already_complete=True)
    else:
        vocabulary = _make_vocabulary(job)
        writer = writer or create_store(
            job.store, fingerprint=job.index.fingerprint, key_hash_N=np.asarray(job.index.key_hash)
        )
        layer = writer.add_layer(name, _spec(job, vocabulary), vocabulary.centroids_Kc)
    before = int(writer.committed_chunks(name).sum())
    with timed(job.seconds, "assign"):
        _write_chunks(job, writer, layer)
    with timed(job.seconds, "finish"):
        digests = layer.chunk_digests().tolist()
        parts = (layer.read_chunk(chunk, digest) for chunk, digest in enumerate(digests))
        statistics = word_statistics(parts, layer.words)
        writer.mark_complete(name, statistics.document_frequency_K, statistics.summary())
    return _report(job, writer.layer(name), before, already_complete=False)


def _check_data_set(writer: StoreWriter, index: Index) -> None:
    if writer.fingerprint != index.fingerprint or writer.images != len(index):
        raise MismatchError(
            f"word store {writer.path} was made of data set {writer.fingerprint} ({writer.images} images), but "
            f"{index.root} is {index.fingerprint} ({len(index)} images); encode into a new store"
        )


def _check_settings(layer: Layer, job: _Job) -> None:
    made, vocabulary = layer.attributes, layer.attributes["vocabulary"]
    have = {
        "teacher architecture": made["teacher"]["arch"],
        "teacher weights": made["teacher"]["weights_sha256"],
        "clean view": made["view"],
        "K": layer.words,
        **{name: vocabulary[name] for name in ("seed", "sample_per_word", "iterations")},
    }
    for name, want in job.settings().items():
        if have[name] != want:
            raise MismatchError(
                f"layer {layer.name!r} of word store {layer.path} was begun with {name} {have[name]}, now it is "
                f"{want}; use the same value, or encode into a new store"
            )


def _make_vocabulary(job: _Job) -> Vocabulary:
    grid = job.layer.grid
    plan = plan_sample(len(job.index), grid[0] * grid[1], job.k, sample_per_word=job.sample_per_word, seed=job.seed)
    _check_space(job)
    batches = [plan.rows[start : start + job.batch] for start in range(0, len(plan.rows), job.batch)]
    with timed(job.seconds, "sample"):
        sample_Sc = draw_sample(plan, (maps_Bchw for _, maps_Bchw in _feature_maps(job, batches)))
    with timed(job.seconds, "k-means"):
        vocabulary = build_vocabulary(sample_Sc, job.k, seed=job.seed, iterations=job.iterations, device=job.device)
    vocabulary.provenance.update(sample_per_word=job.sample_per_word, sample_images=len(plan.rows))
    return vocabulary


def _check_space(job: _Job) -> None:
    """Refuse to start what cannot end."""
    height, width = job.layer.grid
    needed = len(job.index) * (2 * height * width + 8) + 4 * job.k * job.layer.channels
    folder = job.store.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BowstoreError(
            f"{folder} has {free / 1e6:.0f} MB free, the words need {needed / 1e6:.0f} MB; free some, or choose "
            "another place for the store"
        )


def _spec(job: _Job, vocabulary: Vocabulary) -> LayerSpec:
    return LayerSpec(
        teacher=job.teacher.provenance(job.layer.name),
        view=_plain(asdict(job.teacher.view)),
        vocabulary=vocabulary.provenance,
        words=job.k,
        grid=job.layer.grid,
        channels=job.layer.channels,
    )


def _feature_maps(job: _Job, batches: list[NDArray[np.int64]]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Rows (B,) and their maps (B, c, h, w), finite, for each batch of rows."""
    images = clean_batches(
        ShardReader(job.index), job.teacher.view, batches, batch=job.batch, device=job.device, threads=job.threads
    )
    for rows, images_BCHW in images:
        maps_Bchw = job.teacher.maps(images_BCHW)[job.layer.name]
        # Waits for the device, and so also ends the use of the images' buffer before it is filled again.
        if not bool(maps_Bchw.isfinite().all()):
            finite_B = maps_Bchw.flatten(1).isfinite().all(dim=1).cpu().numpy()
            bad = [job.index.key(row) for row in rows[~finite_B].tolist()]
            raise DataError(
                f"layer {job.layer.name!r} of the teacher gives NaN or infinity for {len(bad)} images of a batch, "
                f"for example {', '.join(bad[:5])}; check the teacher's weights and these images"
            )
        yield rows, maps_Bchw


def _write_chunks(job: _Job, writer: StoreWriter, layer: Layer) -> None:
    """Assign and write the chunks that are not committed; batches are cut inside chunks, whoever encodes them."""
    committed = writer.committed_chunks(layer.name)
    todo = np.flatnonzero(~committed).tolist()
    done = sum(_length(layer.rows(chunk)) for chunk in np.flatnonzero(committed).tolist())
    words = prepare_words(torch.from_numpy(layer.read_array("vocabulary")).to(job.device))
    batches = [
        np.arange(start, min(start + job.batch, layer.rows(chunk).stop))
        for chunk in todo
        for start in range(layer.rows(chunk).start, layer.rows(chunk).stop, job.batch)
    ]
    maps = _feature_maps(job, batches)
    with Progress("encode", len(job.index), done=done) as progress:
        for chunk in todo:
            rows = layer.rows(chunk)
            buffer_Nhw = torch.empty((_length(rows), *layer.grid), dtype=torch.uint16, device=job.device)
            filled = 0
            while filled < len(buffer_Nhw):
                rows_B, maps_Bchw = next(maps)
                vectors = maps_Bchw.permute(0, 2, 3, 1).reshape(-1, maps_Bchw.shape[1])
                buffer_Nhw[filled : filled + len(rows_B)] = assign(vectors, words).view(-1, *layer.grid)
                filled += len(rows_B)
                progress.advance(len(rows_B))
            writer.write_chunk(layer.name, chunk, buffer_Nhw.cpu().numpy())


def _report(job: _Job, layer: Layer, before: int, *, already_complete: bool) -> EncodeReport:
    statistics = layer.attributes["statistics"]
    warnings = health_warnings(statistics, layer.words)
    for line in warnings:
        say(f"warning: {line}")
    folder = layer.path / layer.name
    parts = (folder / "words", folder / "chunk_digest", layer.path / "key_hash")
    return EncodeReport(
        store=layer.path,
        layer=layer.name,
        images=layer.images,
        words=layer.words,
        grid=layer.grid,
        channels=int(layer.attributes["channels"]),
        chunks=layer.chunks,
        chunks_before=before,
        already_complete=already_complete,
        bytes_per_image=sum(stored_bytes(part) for part in parts) / layer.images,
        vocabulary_bytes=stored_bytes(folder / "vocabulary"),
        seconds=job.seconds,
        vocabulary=layer.attributes["vocabulary"],
        statistics=statistics,
        warnings=warnings,
    )


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists, as they come back from JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
