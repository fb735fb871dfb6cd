"""Layers with their vocabularies, before any word is written: rank 0's work, for which the others sample.

Legend: N images, h w word grid, K words, c channels, S sampled vectors.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bowstore.clustering.projection import Projection
from bowstore.errors import MismatchError
from bowstore.progress import say, timed
from bowstore.words.encode.arithmetic import tell_difference
from bowstore.words.encode.crew import Crew
from bowstore.words.encode.job import Job, LayerPlan, view_values
from bowstore.words.encode.receptive import receptive_field
from bowstore.words.encode.sample import check_memory, draw_samples, plan_samples
from bowstore.words.encode.vocabulary import Vocabulary, build_vocabulary
from bowstore.words.store.layer import LayerSpec, bytes_per_image
from bowstore.words.store.writer import StoreWriter, check_room, create_store


def has_layers(job: Job) -> bool:
    """Whether all layers are there; refuses a store of another data set, and layers of other settings."""
    if not job.store.exists():
        return False
    writer, index = StoreWriter(job.store), job.index
    if writer.fingerprint != index.fingerprint or writer.images != len(index):
        raise MismatchError(
            f"word store {writer.path} was made of data set {writer.fingerprint} ({writer.images} images), but "
            f"{index.place} is {index.fingerprint} ({len(index)} images); encode into a new --store, under the same "
            f"words with --vocabulary {writer.path}"
        )
    for name in job.names:
        if name in writer.layers:
            job.check_settings(writer.layer(name))
    return set(job.names) <= set(writer.layers)


def make_layers(job: Job, crew: Crew) -> None:
    """Give the store the layers that it lacks, each with its vocabulary and no words."""
    _check_space(job)
    samples: Mapping[str, NDArray[np.float32]] = {}
    if not job.source:
        plans = plan_samples(job)
        check_memory(job, plans)
        samples = draw_samples(job, plans, crew)
    for plan in job.layers:
        writer = StoreWriter(job.store) if job.store.exists() else None
        if writer and plan.name in writer.layers:
            continue
        vocabulary = _vocabulary(job, plan, samples.get(plan.name))
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
