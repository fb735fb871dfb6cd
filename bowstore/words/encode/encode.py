"""From shards and a teacher to a store of words: sample, cluster, assign; by all ranks of the job, resumable.

`encode` reads top to bottom. All ranks load what the call names and join; rank 0, which alone opens the store, prepares
its layers; all share the passes over the images; rank 0 then records what was found. Whatever ends it, the same call
goes on from the last chunk that was committed.

Legend: N images, h w word grid, K words, c channels.
"""

import json
import math
from collections.abc import Iterable, Iterator
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
from bowstore.errors import UsageError
from bowstore.models.opened import OpenedNetwork, open_network
from bowstore.models.weights import weights_sha256
from bowstore.progress import Progress, say, timed
from bowstore.remote import fetch_store
from bowstore.torchrun import ranks
from bowstore.words.encode.assign_pass import encode_images, nearest_file, nearest_so_far
from bowstore.words.encode.config import EncodeConfig, check_place, check_sample
from bowstore.words.encode.crew import Crew, join
from bowstore.words.encode.job import Job
from bowstore.words.encode.prepare import layers_there, make_layers
from bowstore.words.encode.report import EncodeReport, report_layer
from bowstore.words.encode.sample import draw_samples
from bowstore.words.encode.teacher import Teacher, freeze_teacher
from bowstore.words.store.arrays import sweep_leftovers
from bowstore.words.store.layer import Layer
from bowstore.words.store.nearest import save_nearest
from bowstore.words.store.statistics import word_statistics
from bowstore.words.store.store import Store
from bowstore.words.store.writer import StoreWriter, store_lock

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
        OSError: the disk is full, say; the same call continues once there is room.
    """
    check_place(store)
    if not store.name:
        raise UsageError(f"--store {store} has no name of its own; name a folder in it, {store / 'words.zarr'}")
    place = ranks()
    device = choose_device(config.device, place.local_rank)
    index = fetched(open_index(shards, storage))
    opened = open_network(config.teacher, weights=config.weights, size=config.size, seed=config.seed)
    with join(place, _given(config, index, opened, device)) as crew:
        told = {} if crew.first else json.loads(crew.hear("job"))
        source = Store(fetch_store(config.vocabulary, storage)) if config.vocabulary and crew.first else None
        names = told.get("num_words") or config.layers or (source.every_layer if source else ())
        teacher = freeze_teacher(
            opened, tuple(names), device, size=config.size, resize=config.resize, precision=config.precision,
            border=config.border,
        )  # fmt: skip
        num_words = told.get("num_words") or _num_words(config, teacher, source)
        job = Job(config, index, teacher, num_words, store, device, source)
        if crew.first:
            _check(job)
            with store_lock(store):
                return _lead(job, crew)
        job = job.run_in(told["trunk"])
        if told["sampled"]:
            draw_samples(job, crew)
        encode_images(job, crew)
        crew.hear("end")
        return None


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


def _num_words(config: EncodeConfig, teacher: Teacher, source: Store | None) -> dict[str, int]:
    """K of each layer: as asked for, or the other store's."""
    if source and not config.num_words:
        return {name: source.vocabulary_layer(name).num_words for name in teacher.layers}
    return config.words_of_each(list(teacher.layers))


def _check(job: Job) -> None:
    """Refuse what does not fit together."""
    for name, layer in job.teacher.layers.items():
        if job.source:
            job.check_settings(job.source.vocabulary_layer(name))
        else:
            job.config.check_components(name, layer.channels)
            check_sample(job.num_words[name], len(job.index), math.prod(layer.grid))


def _lead(job: Job, crew: Crew) -> EncodeReport:
    """Rank 0's part."""
    if job.store.exists():
        sweep_leftovers(job.store)
    there = layers_there(job)
    missing = [name for name in job.num_words if name not in there]
    begun = [layer for layer in there.values() if not layer.complete]
    if begun or missing:  # something is left to do
        job = job.in_one_way(begun)
    sampled = bool(missing) and job.source is None
    told = {"num_words": job.num_words, "trunk": job.teacher.trunk, "sampled": sampled}
    crew.tell("job", json.dumps(told).encode())
    if missing:
        make_layers(job, missing, crew)
    writer = StoreWriter(job.store)
    before = {name: int(np.count_nonzero(writer.layer(name).chunk_digests())) for name in job.num_words}
    with timed(job.seconds, "assign"):
        images, clock = encode_images(job, crew, writer)
    with timed(job.seconds, "finish"):
        _finish(writer, job.num_words)
    crew.tell("end", b"complete")
    opened = Store(job.store)
    report = EncodeReport(
        store=job.store,
        images=len(opened),
        images_encoded=images,
        layers=tuple(report_layer(opened.layer(name), before[name]) for name in job.num_words),
        seconds=job.seconds,
        stages=clock.shares(),
        binds=clock.binds(),
        ranks=crew.size,
    )
    for line in report.warnings:
        say(f"warning: {line}")
    return report


def _finish(writer: StoreWriter, names: Iterable[str]) -> None:
    """Record statistics and nearest images of layers whose chunks are all written."""
    for layer in map(writer.layer, names):
        if not layer.complete:
            with Progress("count", layer.images) as progress:
                statistics = word_statistics(_counted(layer, progress), layer.num_words)
            nearest = nearest_so_far(layer).result()
            save_nearest(nearest_file(layer), nearest)  # what the store has recorded is gone before it is recorded anew
            writer.mark_complete(layer.name, statistics, nearest)
        nearest_file(layer).unlink(missing_ok=True)  # there after a death in between, too
    sweep_leftovers(writer.path)


def _counted(layer: Layer, progress: Progress) -> Iterator[NDArray[np.uint16]]:
    for chunk, digest in enumerate(layer.chunk_digests().tolist()):
        words = layer.read_chunk(chunk, digest)
        yield words
        progress.advance(len(words))
