"""From shards and a teacher to a store of words: sample, cluster, assign; by any number of processes, resumable.

`encode` reads top to bottom: resolve the job; one process makes the store and its vocabularies; all share the pass over
the images; the leader then records what was found. A process that dies is replaced by those that are left, or by
the next one to start.

Legend: N images, h w word grid, K words, c channels.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bowstore.config import StorageConfig
from bowstore.data.index import Index, open_index
from bowstore.data.reader import fetched
from bowstore.environment import choose_device
from bowstore.errors import BowstoreError, UsageError
from bowstore.progress import Progress, say, timed
from bowstore.remote import fetch_store
from bowstore.torchrun import ranks
from bowstore.words.encode.assign_pass import AssignPass, claim_prefix, nearest_name
from bowstore.words.encode.claims import Board
from bowstore.words.encode.config import EncodeConfig, check_place, check_sample
from bowstore.words.encode.job import Job, plan_layers
from bowstore.words.encode.prepare import has_layers, in_one_way, prepare_layers
from bowstore.words.encode.report import EncodeReport, report_layer
from bowstore.words.encode.teacher import load_teacher
from bowstore.words.store.nearest import NearestSearch, load_nearest, save_nearest
from bowstore.words.store.statistics import word_statistics
from bowstore.words.store.store import Store
from bowstore.words.store.writer import StoreWriter, sweep_leftovers


def encode(
    config: EncodeConfig,
    *,
    shards: Path,
    store: Path,
    storage: StorageConfig | None = None,
) -> EncodeReport:
    """Write the words of all images of `shards` at some layers of a teacher into a store (paper, Eq. 1 and 2).

    Layers with the same settings that are complete are left alone; incomplete ones are continued, chunk by chunk, and
    end as if they had never been interrupted. Other layers of the store stay usable meanwhile. Several processes that
    are given the same call, on one machine or on several that share the store's folder, share the work.

    Args:
        config: teacher, layers, vocabulary.
        shards: folder of indexed shards.
        store: where the word store is or will be.
        storage: how shards are read, and where copies of remote ones lie; None for the defaults.

    Raises:
        MissingError: no teacher, shards, index, or vocabulary.
        UsageError: no such layer, a K that does not fit the data set, or a store on another machine.
        MismatchError: the store holds another data set, or a layer with other settings.
        DataError: images that do not decode, features that are not finite or too few distinct ones.
        BowstoreError: the disk is full; the same call continues once there is room.
    """
    check_place(store)
    if not store.name:
        raise UsageError(f"--store {store} has no name of its own; name a folder in it, {store / 'words.zarr'}")
    device = choose_device(config.device, ranks().local_rank)
    index = fetched(open_index(shards, storage))
    with _disk_errors(store), Board(store) as board:
        job = _resolve(config, index, store, device, storage)
        job = in_one_way(job if has_layers(job) else prepare_layers(job, board))
        before = _committed(job)
        work = AssignPass(job, StoreWriter(store), board, shown=ranks().first)
        with timed(job.seconds, "assign"):
            work.run()
        with timed(job.seconds, "finish"):
            _finish(job, board)
    return _report(job, before, work)


def _resolve(
    config: EncodeConfig, index: Index, store: Path, device: torch.device, storage: StorageConfig | None
) -> Job:
    """Load what a call names; refuse what does not fit together."""
    source = Store(fetch_store(config.vocabulary, storage)) if config.vocabulary else None
    names = config.layers or (tuple(layer.name for layer in source.every_layer()) if source else ())
    if not names:
        raise UsageError(
            "no layer was named; give --layer, for example --layer conv4; `bowstore layers ARCH` lists them"
        )
    try:
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
    except UsageError as error:
        if source is None or config.layers:
            raise
        arch = source.every_layer()[0].attributes["teacher"]["arch"]
        raise UsageError(f"{error} (--vocabulary needs the teacher of word store {source.path}, {arch})") from error
    words = [source.vocabulary_layer(layer.name).num_words if source else None for layer in teacher.layers]
    plans = plan_layers(config, teacher.layers, words)
    job = Job(config, index, teacher, store, plans, device, source=source)
    for plan in plans:
        if source:
            job.check_settings(source.vocabulary_layer(plan.name))
        else:
            config.check_components(plan.name, plan.channels)
            check_sample(plan.num_words, len(index), plan.grid[0] * plan.grid[1])
    return job


def _committed(job: Job) -> dict[str, int]:
    """The committed chunks of each layer."""
    writer = StoreWriter(job.store)
    return {name: int(writer.committed_chunks(name).sum()) for name in job.names}


def _finish(job: Job, board: Board) -> None:
    """Record statistics and nearest images of layers whose chunks are all written, unless another process has."""
    with board.lead("counts the words"):
        writer = StoreWriter(job.store)
        for name in job.names:
            layer = writer.layer(name)
            if layer.complete:
                continue
            digests = layer.chunk_digests().tolist()
            with Progress("count", layer.images) as progress:
                parts = _counted(progress, (layer.read_chunk(chunk, digest) for chunk, digest in enumerate(digests)))
                statistics = word_statistics(parts, layer.num_words)
            nearest = NearestSearch(layer.num_words)
            for found in (writer.nearest(name), *load_nearest(board.files(f"{nearest_name(writer, layer)}*.npz"))):
                nearest.merge(found)
            save_nearest(board.folder / f"{nearest_name(writer, layer)}all.npz", nearest.result())
            writer.mark_complete(name, statistics, nearest.result())
        if not board.others():
            sweep_leftovers(job.store)
        layers = [writer.layer(name) for name in writer.layers]
        needed = tuple(nearest_name(writer, layer) for layer in layers if not layer.complete)
        board.clear(partial(_is_done, claim_prefix(job, writer), needed))


def _is_done(prefix: str, needed: tuple[str, ...], name: str) -> bool:
    name = name.removeprefix(".")  # files that are being written begin with a dot
    return name.startswith(prefix) or (name.startswith("nearest.") and not name.startswith(needed))


def _counted(progress: Progress, parts: Iterator[NDArray[np.uint16]]) -> Iterator[NDArray[np.uint16]]:
    for part in parts:
        yield part
        progress.advance(len(part))


def _report(job: Job, before: dict[str, int], work: AssignPass) -> EncodeReport:
    opened = Store(job.store)
    layers = tuple(report_layer(opened.layer(name), before[name]) for name in job.names)
    report = EncodeReport(
        store=job.store,
        images=len(opened),
        images_here=work.images,
        layers=layers,
        seconds=job.seconds,
        stages=work.clock.shares(),
        binds=work.clock.binds(),
        first=ranks().first,
    )
    if report.first:
        for line in report.warnings:
            say(f"warning: {line}")
    return report


@contextmanager
def _disk_errors(store: Path) -> Iterator[None]:
    """Say what to do about a disk that is full or cannot be written."""
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
