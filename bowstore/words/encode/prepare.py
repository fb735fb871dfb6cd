"""Layers with their vocabularies, before any word is written: rank 0's work, for which the others sample.

A vocabulary is another store's, or made by k-means over a sample of feature vectors (paper, Eq. 2).

Legend: c channels, p dimensions of a word, S sampled vectors, K words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bowstore.clustering.kmeans import kmeans
from bowstore.clustering.lloyd import distinct_rows
from bowstore.clustering.projection import Projection, fit_projection, project_sample
from bowstore.errors import DataError, MismatchError
from bowstore.progress import say, timed
from bowstore.words.encode.config import EncodeConfig
from bowstore.words.encode.crew import Crew
from bowstore.words.encode.job import Job
from bowstore.words.encode.receptive import receptive_field
from bowstore.words.encode.sample import draw_samples
from bowstore.words.store.layer import Layer, in_words
from bowstore.words.store.statistics import perplexity
from bowstore.words.store.store import Store
from bowstore.words.store.writer import StoreWriter, create_store


@dataclass(frozen=True)
class Vocabulary:
    """Words and how they were made.

    Attributes:
        centroids_Kp: float32.
        projection: applied to the map's vectors; None if there is none, then p = c.
        provenance: plain values: seed, sample, iterations, inertia, refilled and dead words, health.
    """

    centroids_Kp: NDArray[np.float32]
    projection: Projection | None
    provenance: dict[str, Any]


def layers_there(job: Job) -> dict[str, Layer]:
    """The layers that the store has, by name, complete or not.

    Raises:
        MismatchError: it is of another data set, or has a layer of other settings, or one that cannot be continued.
    """
    if not job.store.exists():
        return {}
    writer, index = StoreWriter(job.store), job.index
    if writer.fingerprint != index.fingerprint or writer.images != len(index):
        raise MismatchError(
            f"word store {writer.path} was made of data set {writer.fingerprint} ({writer.images} images), but "
            f"{index.place} is {index.fingerprint} ({len(index)} images); encode into a new --store, under the same "
            f"words with --vocabulary {writer.path}"
        )
    there = {name: writer.layer(name) for name in job.num_words if name in writer.names}
    for layer in there.values():
        job.check_settings(layer)
        if not layer.complete and (old := job.store.with_name(f".{job.store.name}.work")).exists():
            raise MismatchError(
                f"layer {layer.name!r} of word store {job.store} is not complete and was begun by an earlier version, "
                f"which kept in {old} what it had seen; remove both to encode anew, or encode into a new store: "
                f"--vocabulary {job.store} --store NEW keeps its words"
            )
    return there


def make_layers(job: Job, missing: Sequence[str], crew: Crew) -> None:
    """Give the store layers that it lacks, each with its vocabulary and no words."""
    samples = {} if job.source else draw_samples(job, crew)
    for name in missing:
        if job.source:
            made = _taken(job, name, job.source)
        else:
            say(f"vocabulary of {name}: {job.num_words[name]} words from {len(samples[name])} vectors")
            with timed(job.seconds, "k-means"):
                made = build_vocabulary(samples[name], job.num_words[name], job.config, job.device)
        if not job.store.exists():
            create_store(
                job.store,
                fingerprint=job.index.fingerprint,
                key_hash_N=np.asarray(job.index.key_hash),
                image_digest_N=np.asarray(job.index.digest),
            )
        sees = receptive_field(job.teacher.backbone, name, job.teacher.view.size)
        spec = replace(job.spec(name, made.provenance), receptive_field=sees)
        StoreWriter(job.store).add_layer(name, spec, made.centroids_Kp, made.projection)


def _taken(job: Job, name: str, source: Store) -> Vocabulary:
    """The vocabulary of another store, whose layer need not be complete."""
    layer = source.vocabulary_layer(name)
    if layer.arithmetic != job.arithmetic:
        say(
            f"layer {name!r} of word store {layer.path} was made with {in_words(layer.arithmetic)}; these images are "
            f"encoded with {in_words(job.arithmetic)}: their words differ from its way's only where two words are all "
            "but equally near"
        )
    found = layer.read_projection()
    provenance = {**layer.attributes["vocabulary"], "taken_from": source.path.name}
    return Vocabulary(layer.read_array("vocabulary"), Projection(*found) if found else None, provenance)


def build_vocabulary(
    sample_Sc: NDArray[np.float32], num_words: int, config: EncodeConfig, device: torch.device
) -> Vocabulary:
    """Cluster a sample into K words, from random vectors of the sample, all of them used.

    Deterministic for a seed on one machine.

    Args:
        sample_Sc: float32 (S, c), of a `bowstore.words.encode.sample`: finite, and at least K vectors.
        num_words: number of words.
        config: seed of the initial words, iterations, and the principal components that are clustered.
        device: where k-means runs.

    Raises:
        UsageError: more components than vectors.
        DataError: fewer distinct vectors than words.
    """
    projection, about = None, {}
    if config.pca is not None:
        projection, share = fit_projection(sample_Sc, config.pca, whiten=config.whiten)
        sample_Sc, about = project_sample(projection, sample_Sc), {"explained_variance": share}
    distinct = len(distinct_rows(sample_Sc, num_words))
    if distinct < num_words:
        raise DataError(
            f"the sample's {len(sample_Sc)} feature vectors hold only {distinct} distinct ones, too few for "
            f"K = {num_words} words; is the teacher trained? Choose --K at most {distinct}, or another layer"
        )
    found = kmeans(sample_Sc, num_words, seed=config.seed, iterations=config.iterations, device=device)
    return Vocabulary(found.centroids_Kp, projection, {
        "seed": config.seed,
        "sample": len(sample_Sc),
        "sample_per_word": config.sample_per_word,
        "iterations": config.iterations,
        "pca": config.pca,
        "whiten": config.whiten,
        **about,
        "inertia": found.inertia,
        "inertia_history": found.inertia_history,
        "splits": found.splits,
        "refilled_words": found.refilled,
        "dead_words": int((found.counts_K == 0).sum()),
        "duplicate_words": found.duplicates,
        "perplexity": perplexity(found.counts_K),
        "largest_share": float(found.counts_K.max() / found.counts_K.sum()),
        "kmeans": found.backend,
    })  # fmt: skip
