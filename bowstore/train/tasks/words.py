"""BoWNet: an image's bag of words under perturbation (paper, section 2), or several bags, each by a head of its own.

Legend: B batch, C channels, H W pixels, K words, M bag slots, N rows.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bowstore.config import StorageConfig
from bowstore.data.plan import Plan
from bowstore.data.shown import CleanGrid
from bowstore.data.views import Batch
from bowstore.models.heads import CosineHead, Heads, class_head
from bowstore.progress import say
from bowstore.remote import fetch_store
from bowstore.train.schedule import images_in_use
from bowstore.train.tasks.forms import BagForm, PyramidBags, ShownBag, WholeBag
from bowstore.train.tasks.settings import WordsSettings
from bowstore.train.tasks.task import Dead, Job, Logits, Network, Task, placed, pooled
from bowstore.words.targets.bags import Bag, bag_entropy, bow_cross_entropy, weight_at, words_bytes
from bowstore.words.targets.tiers import TIERS, Targets, choose_tier, describe

if TYPE_CHECKING:  # with Zarr
    from bowstore.words.store.join import JoinedLayer
    from bowstore.words.store.layer import Layer

Bags = Bag | list[Bag]


class Source(NamedTuple):
    """A layer whose words are learned.

    Attributes:
        lineage: whose words they are (`bowstore.words.store.layer.Layer.lineage`).
        targets: the words.
        form: the bags that are made of them.
    """

    lineage: dict[str, Any]
    targets: Targets
    form: BagForm


def build(settings: WordsSettings, job: Job) -> Task:
    """The task of a job."""
    sources, world = _open(settings, job), job.world
    used = images_in_use(job.config, len(job.index))
    inputs = {"shards": job.index.fingerprint}
    for source in sources:
        name = "words" if len(sources) == 1 else f"words of {source.lineage['layer']}"
        add = source.form.add if world.first else None
        inputs[name] = source.targets.digest(add, used=used, shown=world.first)
    heads = [
        class_head(settings.head, job.backbone.features, source.lineage["num_words"], settings.gamma)
        for source in sources
        for _ in range(source.form.bags)
    ]
    constants, dead = {}, None
    if world.first:
        marginal = sum(source.form.bags * source.form.marginal_loss() for source in sources) / len(heads)
        constants["marginal_loss"] = marginal
        gamma = settings.gamma if settings.head == "cosine" else 0.0
        dead = Dead.at(marginal, "predicting the words' mean frequencies", gamma)

    def bring(batch: Batch) -> tuple[Tensor, ...]:
        plan, ahead = batch.plan, batch.ahead or [None] * len(sources)
        tensors: list[Tensor] = []
        for source, mine in zip(sources, ahead, strict=True):
            tensors += [source.targets.words(plan.rows, mine), *placed(source.form.numbers(plan), world.device)]
        return batch.images_BCHW, *tensors

    def make(images_BCHW: Tensor, *tensors: Tensor) -> tuple[Tensor, Bags]:
        each = len(tensors) // len(sources)
        bags = [
            bag
            for place, source in enumerate(sources)
            for bag in source.form.make(*tensors[each * place : each * (place + 1)])
        ]
        return images_BCHW, bags if len(bags) > 1 else bags[0]

    def scalars(logits: Logits, bags: Bags) -> dict[str, Tensor]:
        pairs = list(_pairs(logits, bags))
        found = {
            "excess_loss": _mean(
                [bow_cross_entropy(logits_BK, bag) - bag_entropy(bag, logits_BK.shape[1]) for logits_BK, bag in pairs]
            ),
            "top_word_weight": _mean([weight_at(bag, logits_BK.argmax(1)) for logits_BK, bag in pairs]),
        }
        # Of several the one nearest to zero, where a head is dead; far below zero it is not.
        gammas: list[Tensor] = [head.gamma for head in heads if isinstance(head, CosineHead)]
        if gammas:
            gamma_N = torch.stack(gammas)
            found["gamma"] = gamma_N[gamma_N.abs().argmin()]
        return found

    def ahead(plan: Plan) -> list[Any]:
        return [source.targets.ahead(plan.rows) for source in sources]

    return Task(
        network=Network(job.backbone, heads[0] if len(heads) == 1 else Heads(heads), pooled),
        bring=bring,
        make=make,
        loss=_loss,
        scalars=scalars,
        ahead=ahead,
        constants=constants,
        inputs=inputs,
        dead=dead,
        lineage={"store": str(settings.store), **_lineage([source.lineage for source in sources])},
    )


def _pairs(logits: Logits, bags: Bags) -> Iterator[tuple[Tensor, Bag]]:
    """Each head's logits (B, K) with the bags that it learns."""
    if isinstance(bags, Bag):
        assert isinstance(logits, Tensor), "one bag is learned by one head"
        return iter([(logits, bags)])
    return zip(logits, bags, strict=True)


def _loss(logits: Logits, bags: Bags) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over the bags (paper, Eq. 6)."""
    return _mean([bow_cross_entropy(logits_BK, bag) for logits_BK, bag in _pairs(logits, bags)]), {}


def _mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean()


def _lineage(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whose words a run learned: of several layers of a store, names and numbers as lists, digests by layer."""
    if len(layers) == 1:
        return layers[0]
    return {
        "layer": ", ".join(layer["layer"] for layer in layers),
        "num_words": ", ".join(str(layer["num_words"]) for layer in layers),
        "vocabulary_digest": {layer["layer"]: layer["vocabulary_digest"] for layer in layers},
        "teacher": layers[0]["teacher"],
    }


def _open(settings: WordsSettings, job: Job) -> list[Source]:
    """The layers whose words are learned, in the tier that has room for all of them."""
    from bowstore.words.store.join import join_rows, layer_of  # Zarr: only where a store is opened
    from bowstore.words.store.store import open_store

    assert settings.store is not None, "the command line resolves task.store"
    config, world = job.config, job.world
    paths = [fetch_store(place, config.runtime.storage, display=world.first) for place in settings.store]
    world.assembled()  # however long it takes on some machine
    stores = [open_store(path) for path in paths]
    layers = [layer_of(stores, name) for name in settings.layers or (settings.layer,)]
    for layer in layers:
        settings.check_map(layer.name, layer.grid)
    store_row_N = join_rows(stores, job.index, reencoded=settings.reencoded)
    size_bytes = sum(words_bytes(len(store_row_N), layer.grid) for layer in layers)
    chosen, reason = choose_tier(config.runtime.targets, size_bytes, world.device)
    # All ranks measure before any of them loads, and all take the tier of the one with the least room.
    tier = [tier for tier in TIERS if world.any(chosen == tier)][-1]
    if tier != chosen:
        reason = f"another rank has no room for {chosen}"
    if world.first:
        say(describe(tier, reason, size_bytes))
    storage = config.runtime.storage or StorageConfig()
    return [
        Source(
            layer.lineage,
            Targets(tier, layer, store_row_N, world.device, storage=storage, shown=world.first),
            _form(settings, job, layer),
        )
        for layer in layers
    ]


def _form(settings: WordsSettings, job: Job, layer: "Layer | JoinedLayer") -> BagForm:
    config, num_words = job.config, layer.num_words
    if settings.form == "pyramid":
        return PyramidBags(num_words, layer.grid, settings.grids, flip=config.view.flip)
    if not settings.crop_aware:
        return WholeBag(settings.form, num_words)
    clean = layer.attributes["view"]
    resize = None if clean["squash"] else clean["resize"]
    grid = CleanGrid(layer.grid, layer.border, clean["size"], resize)
    return ShownBag(settings.form, num_words, grid, job.index, config.view, config.seed)
