"""Layers with their vocabularies, before any word is written: by one process, while the others wait.

Legend: N images, B batch, h w word grid, K words, c channels, S sampled vectors.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bowstore.clustering.kmeans import default_backend
from bowstore.clustering.projection import Projection
from bowstore.environment import available_memory
from bowstore.errors import MismatchError, UsageError
from bowstore.models.compiled import EAGER, FROZEN, CannotCompileError, tell_fallback
from bowstore.progress import Progress, say, timed
from bowstore.torchrun import ranks
from bowstore.words.encode.arithmetic import check_same, recorded, tell_difference
from bowstore.words.encode.assign_pass import without_border
from bowstore.words.encode.claims import Board
from bowstore.words.encode.forward import Clock, forward
from bowstore.words.encode.job import Job, LayerPlan, view_values
from bowstore.words.encode.lanes import Maps, compute_workers
from bowstore.words.encode.receptive import receptive_field
from bowstore.words.encode.vocabulary import Sample, Vocabulary, build_vocabulary, plan_sample
from bowstore.words.store.layer import Layer, LayerSpec, bytes_per_image
from bowstore.words.store.writer import StoreWriter, check_room, create_store, sweep_leftovers


def prepare_layers(job: Job, board: Board) -> Job:
    """Give the store all layers with their vocabularies, or wait for the process that does; the job as it will run."""
    with board.lead("makes the vocabulary"):
        if not board.others() and job.store.exists():
            sweep_leftovers(job.store)
        if not has_layers(job):
            job = in_one_way(job)
            _make_layers(job, board)
    return job


def has_layers(job: Job) -> bool:
    """Whether all layers are there; refuses a store of another data set, and layers of other settings."""
    if not job.store.exists():
        return False
    writer, index = StoreWriter(job.store), job.index
    if writer.fingerprint != index.fingerprint or writer.images != len(index):
        raise MismatchError(
            f"word store {writer.path} was made of data set {writer.fingerprint} ({writer.images} images), but "
            f"{index.root} is {index.fingerprint} ({len(index)} images); encode into a new --store, under the same "
            f"words with --vocabulary {writer.path}"
        )
    for name in job.names:
        if name in writer.layers:
            job.check_settings(writer.layer(name))
    return set(job.names) <= set(writer.layers)


def in_one_way(job: Job) -> Job:
    """The job, its teacher run as unfinished layers were begun; without any, as the setting and the amount of work say.

    Compiles the teacher if that is called for and not yet done. Call it in the main thread.

    Raises:
        MismatchError: an unfinished layer was begun in a way that is not asked for, or not possible here.
        UsageError: compiling was asked for, and is not possible.
    """
    writer = StoreWriter(job.store) if job.store.exists() else None
    layers = [writer.layer(name) for name in job.names if name in writer.layers] if writer else []
    begun = [layer for layer in layers if not layer.complete]
    if len(layers) == len(job.layers) and not begun:
        return job  # nothing is left to do
    return _run_in(job, _begun_way(job, begun), begun) if begun else in_new_way(job)


def in_new_way(job: Job) -> Job:
    """The job, its teacher run as for new layers; see `in_one_way`."""
    return _run_in(job, _new_way(job), ())


def _run_in(job: Job, way: str, begun: Sequence[Layer]) -> Job:
    if way == EAGER:
        return replace(job, teacher=replace(job.teacher, compiled=None))
    if job.teacher.compiled:
        return job
    if ranks().first:
        say("compiling the teacher (10 to 50 s)")
    try:
        with timed(job.seconds, "compile"):
            return replace(job, teacher=job.teacher.compiled_for(job.batch))
    except CannotCompileError as error:
        if begun:
            raise MismatchError(
                f"layer {begun[0].name!r} of word store {job.store} is not complete and was begun with trunk "
                f"{FROZEN!r}, but {error}; go on where that can be had, or encode into a new store"
            ) from error
        if job.config.compile is True:
            raise UsageError(f"{error}; leave --compile out to do without") from error
        tell_fallback(str(error))
        return job


def _begun_way(job: Job, begun: Sequence[Layer]) -> str:
    """How the teacher ran when these layers were begun."""
    ways = {recorded(layer)["trunk"] for layer in begun}
    if len(ways) > 1:
        raise MismatchError(
            f"layers {', '.join(layer.name for layer in begun)} of word store {job.store} are not complete, and were "
            f"begun with trunk {' and '.join(map(repr, sorted(ways)))}; encode them one by one"
        )
    way, setting = ways.pop(), job.config.compile
    for layer in begun:
        check_same(layer, {**job.arithmetic, "trunk": way if way in (EAGER, FROZEN) else job.teacher.trunk})
    if setting != "auto" and setting != (way == FROZEN):
        raise MismatchError(
            f"layer {begun[0].name!r} of word store {job.store} is not complete and was begun with trunk {way!r}; "
            "leave --compile out to go on with it, or encode into a new store"
        )
    return way


def _new_way(job: Job) -> str:
    """How the teacher runs for new layers; under another store's words as it ran there: the two may be joined."""
    if job.source and job.config.compile == "auto":
        return recorded(job.source.vocabulary_layer(job.names[0]))["trunk"]
    return job.teacher.way_of(job.config.compile, len(job.index))


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
            job.store,
            fingerprint=job.index.fingerprint,
            key_hash_N=np.asarray(job.index.key_hash),
            image_digest_N=np.asarray(job.index.digest),
        )
        writer.add_layer(plan.name, _spec(job, plan, vocabulary), vocabulary.centroids_Kp, vocabulary.projection)


def _vocabulary(job: Job, plan: LayerPlan, sample_Sc: NDArray[np.float32] | None) -> Vocabulary:
    """The vocabulary of another store, or one made from the layer's sample."""
    config = job.config
    if job.source or sample_Sc is None:
        assert job.source, "without a sample there is another store's vocabulary"
        layer = job.source.vocabulary_layer(plan.name)
        tell_difference(layer, job.arithmetic)
        found = layer.read_projection()
        provenance = {**layer.attributes["vocabulary"], "taken_from": job.source.path.name}
        return Vocabulary(layer.read_array("vocabulary"), Projection(*found) if found else None, provenance)
    say(f"vocabulary of {plan.name}: {plan.num_words} words from {len(sample_Sc)} vectors")
    with timed(job.seconds, "k-means"):
        vocabulary = build_vocabulary(
            sample_Sc,
            plan.num_words,
            seed=config.seed,
            iterations=config.iterations,
            device=job.device,
            pca=config.pca,
            whiten=config.whiten,
        )
    vocabulary.provenance.update(sample_per_word=config.sample_per_word, pca=config.pca, whiten=config.whiten)
    return vocabulary


def _draw_samples(job: Job) -> dict[str, Sample]:
    """Sampled vectors of all layers in one pass, even if some have words already, so that batches stay the same."""
    config, images = job.config, len(job.index)
    plans = {
        plan.name: plan_sample(
            images,
            plan.grid[0] * plan.grid[1],
            plan.num_words,
            sample_per_word=config.sample_per_word,
            seed=config.seed,
        )
        for plan in job.layers
    }
    _check_memory(job, {name: plan.vectors for name, plan in plans.items()})
    samples = {plan.name: Sample(plans[plan.name], plan.channels) for plan in job.layers}
    rows = np.unique(np.concatenate([plan.rows for plan in plans.values()]))
    batches = (rows[start : start + job.batch] for start in range(0, len(rows), job.batch))
    clock = Clock(compute_workers(job.device, alone=True))

    def trimmed(_rows_B: NDArray[np.int64], maps: Maps) -> dict[str, Tensor]:
        return {name: without_border(map_Bchw, config.border) for name, map_Bchw in maps.items()}

    with timed(job.seconds, "sample"), Progress("sample", len(rows), "images") as progress:
        for rows_B, maps in forward(job, batches, trimmed, clock=clock, stage="sample"):
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
        num_words=plan.num_words,
        grid=plan.grid,
        channels=plan.channels,
        border=config.border,
        projection=projection,
        receptive_field=field._asdict(),
        arithmetic=dict(job.arithmetic),
    )


def _check_space(job: Job) -> None:
    """Refuse to start what cannot finish."""
    needed, there = 0, StoreWriter(job.store).layers if job.store.exists() else ()
    for plan in job.layers:
        if plan.name in there:
            continue
        needed += len(job.index) * bytes_per_image(plan.grid) + 4 * plan.num_words * plan.channels
    check_room(job.store, needed)


def _check_memory(job: Job, vectors: dict[str, int]) -> None:
    """Refuse samples that do not fit in memory: the kernel would kill the process without a word."""
    needed, copied = 0, 0
    for plan in job.layers:
        shape = vectors[plan.name], job.config.pca or plan.channels
        needed += 4 * vectors[plan.name] * plan.channels
        # Layer by layer, SuperKMeans holds a second copy of the sample, and so do its principal components.
        copies = (job.config.pca is not None) + (default_backend(shape, plan.num_words, job.device) == "super")
        copied = max(copied, 4 * copies * shape[0] * shape[1])
    needed, free = needed + copied, available_memory()
    if needed > free:
        raise UsageError(
            f"the samples of {', '.join(vectors)} take {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB "
            f"are free; lower --sample-per-word (now {job.config.sample_per_word}), or encode fewer layers at a time"
        )
