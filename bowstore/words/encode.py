"""From shards and a teacher to a store of words: sample, cluster, assign; by any number of processes, resumable.

`encode` reads top to bottom: resolve the job; the process that leads makes store and vocabularies; all share the pass
over the images; the one that leads then records what was found. Whoever dies is replaced by whoever is left, or comes
next.

Legend: N images, h w word grid, K words, c channels.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.config import EncodeConfig, StorageConfig
from bowstore.data.index import Index, check_columns, open_index
from bowstore.data.reader import fetched
from bowstore.environment import available_memory, is_first_rank
from bowstore.errors import BowstoreError, MismatchError, UsageError
from bowstore.files import stagings
from bowstore.progress import Progress, say, timed
from bowstore.remote import fetch_store, is_remote, url_of, writable_store
from bowstore.words.append import begin_append, check_held, end_append, recover_append, refill
from bowstore.words.assign_pass import AssignPass, claim_prefix, nearest_name, without_border
from bowstore.words.claims import Board
from bowstore.words.encode_report import EncodeReport, report_layer
from bowstore.words.forward import Clock, Maps, compute_workers, forward
from bowstore.words.job import Job, LayerPlan, plan_layers, view_values
from bowstore.words.layer import LayerSpec, bytes_per_image
from bowstore.words.nearest import NearestSearch, load_nearest, save_nearest
from bowstore.words.projection import Projection
from bowstore.words.receptive import receptive_field
from bowstore.words.statistics import word_statistics
from bowstore.words.store import Store
from bowstore.words.store_writer import StoreWriter, check_room, create_store, sweep_leftovers
from bowstore.words.teacher import load_teacher
from bowstore.words.vocabulary import Sample, Vocabulary, build_vocabulary, plan_sample


def encode(
    config: EncodeConfig,
    *,
    shards: Path,
    store: Path,
    append: bool = False,
    device: torch.device | None = None,
    storage: StorageConfig | None = None,
) -> EncodeReport:
    """Write the words of all images of `shards` at some layers of a teacher into a store (paper, Eq. 1 and 2).

    Layers of the same settings that are complete are left alone; those that are not are gone on with, chunk by chunk,
    and end as if they had never been interrupted. Other layers of the store stay usable meanwhile. Several processes
    that are given the same call, on one machine or on several that share the store's folder, share the work.

    Args:
        config: teacher, layers, vocabulary.
        shards: folder of indexed shards.
        store: where the word store is or will be; a URL gets it when all these layers are complete.
        append: add the images that the store does not hold yet, under its vocabularies, for all its layers.
        device: where the teacher runs; None for the GPU where there is one.
        storage: how shards are read, and where copies of remote ones lie; None for the defaults.

    Raises:
        MissingError: no teacher, shards, index, or vocabulary.
        UsageError: no such layer, a K that does not fit the data set, or a URL that cannot be written.
        MismatchError: the store holds another data set, or a layer with other settings.
        DataError: images that do not decode, features that are not finite or too few distinct ones.
        TransferError: the store's URL cannot be reached; the same call goes on.
        BowstoreError: the disk is full; the store can be gone on with.
    """
    with writable_store(store, storage) as place:
        report = _encode(config, shards, place, append, device, storage)
    return replace(report, store=url_of(store)) if is_remote(store) else report


def _encode(
    config: EncodeConfig,
    shards: Path,
    store: Path,
    append: bool,
    device: torch.device | None,
    storage: StorageConfig | None,
) -> EncodeReport:
    if not store.name:
        raise UsageError(f"--store {store} has no name of its own; name a folder in it, {store / 'words.zarr'}")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    index = fetched(open_index(shards, storage))
    check_columns(index)
    with _disk_errors(store), Board(store) as board:
        with board.lead("looks for an interrupted --append"):
            recover_append(store)
        job = _resolve(config, index, store, append, device, storage)
        works = []
        if append:
            if again := refill(job):
                works.append(_encode_rows(again, store, board))
            job = begin_append(job, board)
            if not job.store.exists():  # another process has ended the same append just now
                job = replace(job, store=store)
        before = _prepare(job, board)
        works.append(_encode_rows(job, store, board))
        if append:
            end_append(job, store, board)
    return _report(job, store, before, works)


def _encode_rows(job: Job, store: Path, board: Board) -> AssignPass:
    """Encode what is missing of the job's rows, with all others that do, and finish their layers."""
    work = AssignPass(job, StoreWriter(job.store), board, shown=is_first_rank())
    if job.rows.ends:
        check_held(job, work.rows_left())
    with timed(job.seconds, "assign"):
        work.run()
    with timed(job.seconds, "finish"):
        _finish(job, store, board)
    return work


def _resolve(
    config: EncodeConfig, index: Index, store: Path, append: bool, device: torch.device, storage: StorageConfig | None
) -> Job:
    """Load what a call names, and refuse what does not fit together."""
    base = Store(store) if append else None
    if base and config.vocabulary:
        raise UsageError("--vocabulary does not go with --append: images are added under the store's own vocabularies")
    names = config.layers or (tuple(layer.name for layer in base.every_layer()) if base else ())
    if not names:
        raise UsageError(
            "no layer was named; give --layer, for example --layer conv4; `bowstore layers ARCH` lists them"
        )
    teacher = load_teacher(
        config.teacher,
        names,
        device,
        weights=config.weights,
        size=config.size,
        resize=config.resize,
        seed=config.seed,
        precision=config.precision,
    )
    source = Store(fetch_store(config.vocabulary, storage)) if config.vocabulary else None
    known = {layer.name: layer.words for layer in base.every_layer()} if base else {}
    words = [source.layer(layer.name).words if source else known.get(layer.name) for layer in teacher.layers]
    if config.whiten and config.pca is None:
        raise UsageError("--whiten goes with --pca N; give the layer's number of channels to whiten all of them")
    plans = plan_layers(config, teacher.layers, words)
    job = Job(config, index, teacher, store, plans, device, base=base, source=source)
    for plan in plans:
        if source:
            job.check_settings(source.layer(plan.name))
        elif base is None:
            grid = plan.grid
            plan_sample(len(index), grid[0] * grid[1], plan.words, sample_per_word=config.sample_per_word, seed=0)
    return job


def _prepare(job: Job, board: Board) -> dict[str, int]:
    """See to it that the store has all layers with their vocabularies; chunks that each has already."""
    if job.base is None and not _has_layers(job):
        with board.lead("makes the vocabulary"):
            if not board.others() and job.store.exists():
                sweep_leftovers(job.store)
            if not _has_layers(job):
                _make_layers(job, board)
    writer = StoreWriter(job.store)
    return {name: int(writer.committed_chunks(name).sum()) for name in job.names}


def _has_layers(job: Job) -> bool:
    """Whether all layers are there; refuses a store of another data set, and layers of other settings."""
    if not job.store.exists():
        return False
    writer, index = StoreWriter(job.store), job.index
    if job.base is None and (writer.fingerprint != index.fingerprint or writer.images != len(index)):
        raise MismatchError(
            f"word store {writer.path} was made of data set {writer.fingerprint} ({writer.images} images), but "
            f"{index.root} is {index.fingerprint} ({len(index)} images); encode into a new store"
        )
    for name in job.names:
        if name in writer.layers:
            job.check_settings(writer.layer(name))
    return set(job.names) <= set(writer.layers)


def _make_layers(job: Job, board: Board) -> None:
    _check_space(job)
    samples = None if job.source else _draw_samples(job)
    for plan in job.layers:
        writer = StoreWriter(job.store) if job.store.exists() else None
        if writer and plan.name in writer.layers:
            continue
        vocabulary = _vocabulary(job, plan, samples[plan.name].vectors() if samples else None)
        board.check_lead()
        writer = writer or create_store(
            job.store, fingerprint=job.index.fingerprint, key_hash_N=np.asarray(job.index.key_hash)
        )
        writer.add_layer(plan.name, _spec(job, plan, vocabulary), vocabulary.centroids_Kp, vocabulary.projection)


def _vocabulary(job: Job, plan: LayerPlan, sample_Sc: NDArray[np.float32] | None) -> Vocabulary:
    """That of another store, or one made of the layer's sample."""
    config = job.config
    if job.source or sample_Sc is None:
        assert job.source, "without a sample there is another store's vocabulary"
        layer = job.source.layer(plan.name)
        found = layer.read_projection()
        provenance = {**layer.attributes["vocabulary"], "taken_from": job.source.path.name}
        return Vocabulary(layer.read_array("vocabulary"), Projection(*found) if found else None, provenance)
    say(f"vocabulary of {plan.name}: {plan.words} words from {len(sample_Sc)} vectors")
    with timed(job.seconds, "k-means"):
        vocabulary = build_vocabulary(
            sample_Sc,
            plan.words,
            seed=config.seed,
            iterations=config.iterations,
            device=job.device,
            pca=config.pca,
            whiten=config.whiten,
        )
    vocabulary.provenance.update(sample_per_word=config.sample_per_word, pca=config.pca, whiten=config.whiten)
    return vocabulary


def _draw_samples(job: Job) -> dict[str, Sample]:
    """Sampled vectors of all layers in one pass; those that are there already, too, so that batches stay the same."""
    config, images = job.config, len(job.index)
    plans = {
        plan.name: plan_sample(
            images,
            plan.grid[0] * plan.grid[1],
            plan.words,
            sample_per_word=config.sample_per_word,
            seed=config.seed,
        )
        for plan in job.layers
    }
    _check_memory(job, {plan.name: 4 * plans[plan.name].vectors * plan.channels for plan in job.layers})
    samples = {plan.name: Sample(plans[plan.name], plan.channels) for plan in job.layers}
    rows = np.unique(np.concatenate([plan.rows for plan in plans.values()]))
    batches = (rows[start : start + job.batch] for start in range(0, len(rows), job.batch))
    clock = Clock(compute_workers(job.device, alone=True))

    def trimmed(_rows_B: NDArray[np.int64], maps: Maps) -> dict[str, Tensor]:
        return {name: without_border(map_Bchw, config.border) for name, map_Bchw in maps.items()}

    with timed(job.seconds, "sample"), Progress("sample", len(rows), "images") as progress:
        for rows_B, maps in forward(
            job.teacher,
            job.index,
            batches,
            trimmed,
            batch=job.batch,
            device=job.device,
            clock=clock,
            stage="sample",
            threads=config.threads,
        ):
            for name, sample in samples.items():
                sample.add(rows_B, maps[name])
            progress.advance(len(rows_B), clock.text())
    return samples


def _spec(job: Job, plan: LayerPlan, vocabulary: Vocabulary) -> LayerSpec:
    config = job.config
    field = receptive_field(job.teacher.backbone, plan.name, job.teacher.view.size)
    projection = None
    if vocabulary.projection:
        dimensions = len(vocabulary.projection.offset_p)
        whiten = bool(vocabulary.provenance["whiten"])
        projection = {"kind": "pca", "dimensions": dimensions, "whiten": whiten}
    return LayerSpec(
        teacher=job.teacher.provenance(plan.name),
        view=view_values(job.teacher),
        vocabulary=vocabulary.provenance,
        words=plan.words,
        grid=plan.grid,
        channels=plan.channels,
        border=config.border,
        projection=projection,
        receptive_field=field._asdict(),
    )


def _finish(job: Job, store: Path, board: Board) -> None:
    """Record statistics and nearest images of layers whose chunks are all written, unless another process has."""
    with board.lead("counts the words"):
        if not job.store.exists():  # an append that another process has ended
            return
        writer = StoreWriter(job.store)
        for name in job.names:
            layer = writer.layer(name)
            if layer.complete:
                continue
            digests = layer.chunk_digests().tolist()
            with Progress("count", layer.images) as progress:
                parts = _counted(progress, (layer.read_chunk(chunk, digest) for chunk, digest in enumerate(digests)))
                statistics = word_statistics(parts, layer.words)
            nearest = NearestSearch(layer.words)
            for found in (writer.nearest(name), *load_nearest(board.files(f"{nearest_name(writer, layer)}*.npz"))):
                nearest.merge(found)
            save_nearest(board.folder / f"{nearest_name(writer, layer)}all.npz", nearest.result())
            writer.mark_complete(name, statistics, nearest.result())
        if not board.others():
            sweep_leftovers(job.store)
        board.clear(partial(_is_done, claim_prefix(job, writer), tuple(_in_work(job, store))))


def _in_work(job: Job, store: Path) -> Iterator[str]:
    """What files of nearest images begin with that layers under way need, in the store and in an append to it."""
    for path in (store, job.store, *stagings(store)):
        if path.exists():
            writer = StoreWriter(path)
            layers = [writer.layer(name) for name in writer.layers]
            yield from (nearest_name(writer, layer) for layer in layers if not layer.complete)


def _is_done(prefix: str, needed: tuple[str, ...], name: str) -> bool:
    name = name.removeprefix(".")  # files that are being written begin with a dot
    return name.startswith(prefix) or (name.startswith("nearest.") and not name.startswith(needed))


def _counted(progress: Progress, parts: Iterator[NDArray[np.uint16]]) -> Iterator[NDArray[np.uint16]]:
    for part in parts:
        yield part
        progress.advance(len(part))


def _check_space(job: Job) -> None:
    """Refuse to start what cannot end."""
    needed, there = 0, StoreWriter(job.store).layers if job.store.exists() else ()
    for plan in job.layers:
        if plan.name in there:
            continue
        needed += len(job.index) * bytes_per_image(plan.grid) + 4 * plan.words * plan.channels
    check_room(job.store, needed)


def _check_memory(job: Job, sample_bytes: dict[str, int]) -> None:
    """Refuse a sample that does not fit: the kernel would end the process without a word."""
    needed, free = sum(sample_bytes.values()), available_memory()
    if needed > free:
        raise UsageError(
            f"the samples of {', '.join(sample_bytes)} take {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB "
            f"are free; lower --sample-per-word (now {job.config.sample_per_word}), or encode fewer layers at a time"
        )


def _report(job: Job, store: Path, before: dict[str, int], works: list[AssignPass]) -> EncodeReport:
    opened, work = Store(store), max(works, key=lambda work: work.images)
    layers = tuple(report_layer(opened.layer(name), before[name]) for name in job.names)
    report = EncodeReport(
        store=store,
        images=len(opened),
        images_added=0 if job.base is None else len(opened) - job.rows.first,
        images_here=sum(work.images for work in works),
        layers=layers,
        seconds=job.seconds,
        stages=work.clock.shares(),
        binds=work.clock.binds(),
        first=is_first_rank(),
    )
    if report.first:
        for line in report.warnings:
            say(f"warning: {line}")
    return report


@contextmanager
def _disk_errors(store: Path) -> Iterator[None]:
    """Say what to do about a disk that is full, or cannot be written."""
    try:
        yield
    except OSError as error:
        if isinstance(error, BowstoreError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BowstoreError(
                f"no space left on the disk of {store}; free some and run the same command again: finished chunks are "
                "kept"
            ) from error
        ours = error.filename is None or Path(error.filename).is_relative_to(store.parent)
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and ours:
            raise BowstoreError(
                f"{store.parent} cannot be written ({error.strerror}); make it writable, or name another --store"
            ) from error
        raise
