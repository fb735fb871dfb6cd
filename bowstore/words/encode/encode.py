"""From shards and a teacher to a store of words: sample, cluster, assign; by all ranks of the job, resumable.

`encode` reads top to bottom. All ranks load what the call names and join; rank 0, which alone opens the store, prepares
its layers; all share the passes over the images; rank 0 then records what was found. Whatever ends it, the same call
goes on from the last chunk that was committed.

Legend: N images, h w word grid, K words, c channels.
"""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import bowstore
from bowstore.config import SomePaths, StorageConfig
from bowstore.data.gpu_decode import jpeg_decoder
from bowstore.data.index import Index, open_index
from bowstore.data.reader import fetched
from bowstore.data.resize import resized_by
from bowstore.environment import choose_device
from bowstore.errors import BowstoreError, UsageError
from bowstore.models.opened import OpenedNetwork, open_network
from bowstore.models.weights import weights_sha256
from bowstore.progress import Progress, say, timed
from bowstore.remote import fetch_store
from bowstore.torchrun import ranks
from bowstore.words.encode.arithmetic import as_rank_0, in_one_way
from bowstore.words.encode.assign_pass import follow_pass, keep_nearest, lead_pass, nearest_name, nearest_so_far
from bowstore.words.encode.config import EncodeConfig, check_place, check_sample
from bowstore.words.encode.crew import Crew, join
from bowstore.words.encode.job import Job, LayerPlan, plan_layers
from bowstore.words.encode.prepare import has_layers, make_layers
from bowstore.words.encode.report import EncodeReport, report_layer
from bowstore.words.encode.sample import draw_samples, plan_samples
from bowstore.words.encode.teacher import freeze_teacher
from bowstore.words.store.statistics import word_statistics
from bowstore.words.store.store import Store
from bowstore.words.store.writer import StoreWriter, store_lock, sweep_leftovers, work_folder

# What may differ between ranks: where files lie on their machines, and what changes no result.
_OWN_SETTINGS = {"teacher", "weights", "vocabulary", "device", "threads"}


def encode(
    config: EncodeConfig,
    *,
    shards: SomePaths,
    store: Path,
    storage: StorageConfig | None = None,
) -> EncodeReport | None:
    """Write the words of all images of `shards` at some layers of a teacher into a store (paper, Eq. 1 and 2).

    Layers with the same settings that are complete are left alone; incomplete ones are continued, chunk by chunk, and
    end as if they had never been interrupted. Other layers of the store stay usable meanwhile. Processes that torchrun
    started share the work; each needs the shards and the teacher, and rank 0 alone the store and the vocabulary.

    Args:
        config: teacher, layers, vocabulary.
        shards: folder of indexed shards, or several, whose rows follow each other.
        store: where the word store is or will be.
        storage: how shards are read, and where copies of remote ones lie; None for the defaults.

    Returns:
        The report, on rank 0; None on the others.

    Raises:
        MissingError: no teacher, shards, index, or vocabulary.
        UsageError: no such layer, a K that does not fit the data set, or a store on another machine.
        MismatchError: the store holds another data set, or a layer with other settings; or ranks that were given
            different things.
        BusyError: another process writes the store.
        DataError: images that do not decode, features that are not finite or too few distinct ones.
        BowstoreError: the disk is full; the same call continues once there is room.
    """
    check_place(store)
    if not store.name:
        raise UsageError(f"--store {store} has no name of its own; name a folder in it, {store / 'words.zarr'}")
    place = ranks()
    device = choose_device(config.device, place.local_rank)
    index = fetched(open_index(shards, storage))
    opened = open_network(config.teacher, weights=config.weights, size=config.size, seed=config.seed)
    with _disk_errors(store), join(place, _given(config, index, opened, device)) as crew:
        if not crew.first:
            _follow(config, index, opened, store, device, crew)
            return None
        job = _resolve(config, index, opened, store, device, storage)
        with store_lock(store):
            return _lead(job, crew)


def _given(config: EncodeConfig, index: Index, opened: OpenedNetwork, device: torch.device) -> dict[str, str]:
    """What all ranks must have been given alike, by the names that messages use."""
    return {
        "shards": f"{index.fingerprint} ({len(index)} images)",
        "teacher": opened.backbone.arch,
        "teacher weights": weights_sha256(opened.backbone.state_dict()),
        **{name: str(value) for name, value in sorted(config.model_dump(exclude=_OWN_SETTINGS).items())},
        "kind of device": device.type,
        "decoder": jpeg_decoder(device),
        "resize": resized_by(device),
        "version of bowstore": bowstore.__version__,
        "version of PyTorch": torch.__version__,
    }


def _lead(job: Job, crew: Crew) -> EncodeReport:
    """Rank 0's part."""
    if job.store.exists():
        sweep_leftovers(job.store)
    made = has_layers(job)
    job = in_one_way(job)
    sampled = not made and job.source is None
    layers = [asdict(layer) for layer in job.layers]
    crew.tell("job", json.dumps({"layers": layers, "trunk": job.teacher.trunk, "sampled": sampled}).encode())
    if not made:
        make_layers(job, crew)
    writer = StoreWriter(job.store)
    before = {name: int(writer.committed_chunks(name).sum()) for name in job.names}
    with timed(job.seconds, "assign"):
        mine = lead_pass(job, writer, crew)
    with timed(job.seconds, "finish"):
        _finish(job)
    crew.tell("end", b"complete")
    opened = Store(job.store)
    report = EncodeReport(
        store=job.store,
        images=len(opened),
        images_encoded=mine.images,
        layers=tuple(report_layer(opened.layer(name), before[name]) for name in job.names),
        seconds=job.seconds,
        stages=mine.clock.shares(),
        binds=mine.clock.binds(),
        ranks=crew.size,
    )
    for line in report.warnings:
        say(f"warning: {line}")
    return report


def _follow(
    config: EncodeConfig, index: Index, opened: OpenedNetwork, store: Path, device: torch.device, crew: Crew
) -> None:
    """The part of any other rank: it makes what rank 0 deals out, and opens no store."""
    told = json.loads(crew.hear("job"))
    layers = tuple(LayerPlan(**{**layer, "grid": tuple(layer["grid"])}) for layer in told["layers"])
    teacher = freeze_teacher(
        opened, [layer.name for layer in layers], device,
        size=config.size, resize=config.resize, precision=config.precision,
    )  # fmt: skip
    job = as_rank_0(Job(config, index, teacher, store, layers, device), told["trunk"])
    if told["sampled"]:
        draw_samples(job, plan_samples(job), crew)
    follow_pass(job, crew)
    crew.hear("end")


def _resolve(
    config: EncodeConfig,
    index: Index,
    opened: OpenedNetwork,
    store: Path,
    device: torch.device,
    storage: StorageConfig | None,
) -> Job:
    """Load what a call names; refuse what does not fit together."""
    source = Store(fetch_store(config.vocabulary, storage)) if config.vocabulary else None
    names = config.layers or (tuple(layer.name for layer in source.every_layer()) if source else ())
    if not names:
        raise UsageError(
            "no layer was named; give --layer, for example --layer conv4; `bowstore layers ARCH` lists them"
        )
    try:
        teacher = freeze_teacher(
            opened, names, device, size=config.size, resize=config.resize, precision=config.precision
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


def _finish(job: Job) -> None:
    """Record statistics and nearest images of layers whose chunks are all written, and clear the work away."""
    writer, folder = StoreWriter(job.store), work_folder(job.store)
    for name in job.names:
        layer = writer.layer(name)
        if layer.complete:
            continue
        digests = layer.chunk_digests().tolist()
        with Progress("count", layer.images) as progress:
            parts = _counted(progress, (layer.read_chunk(chunk, digest) for chunk, digest in enumerate(digests)))
            statistics = word_statistics(parts, layer.num_words)
        nearest = nearest_so_far(writer, layer).result()
        keep_nearest(writer, layer, nearest)
        writer.mark_complete(name, statistics, nearest)
    sweep_leftovers(job.store)
    layers = [writer.layer(name) for name in writer.layers]
    needed = tuple(nearest_name(writer, layer) for layer in layers if not layer.complete)
    for path in folder.glob("*"):  # claims of earlier versions, too
        if not needed or not path.name.removeprefix(".").startswith(needed):
            path.unlink()
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _counted(progress: Progress, parts: Iterator[NDArray[np.uint16]]) -> Iterator[NDArray[np.uint16]]:
    for part in parts:
        yield part
        progress.advance(len(part))


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
