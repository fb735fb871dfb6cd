"""BoWNet: an image's bag of words under perturbation (paper, section 2).

Legend: B batch, C channels, H W pixels, K words, M bag slots, N rows.
"""

from typing import Any

import torch
from torch import Tensor

from bowstore.config import StorageConfig
from bowstore.data.views import Batch
from bowstore.models.heads import CosineHead
from bowstore.progress import say
from bowstore.remote import fetch_store
from bowstore.train.schedule import images_in_use
from bowstore.train.tasks.settings import WordsSettings
from bowstore.train.tasks.task import Dead, Job, Network, Task, mixing, pooled
from bowstore.words.bags import Bag, MeanBag, bag_entropy, bag_of, bow_cross_entropy, mix_bags, weight_at
from bowstore.words.targets import (
    TIERS,
    Targets,
    TierChoice,
    choose_tier,
    describe,
    open_targets,
    words_bytes,
    words_digest,
)


def build(settings: WordsSettings, job: Job) -> Task:
    """The task of a job."""
    targets, source = _open(settings, job)
    world, num_words = job.world, source["num_words"]
    mean = MeanBag(num_words, settings.form) if world.first else None
    used = images_in_use(job.config, len(job.index))
    digest = words_digest(targets, mean, used=used, shown=world.first)
    constants, dead = {}, None
    if mean:
        marginal = constants["marginal_loss"] = mean.entropy()
        dead = Dead(
            marginal,
            f"the loss {{loss:.4f}} is still that of predicting the words' mean frequencies ({marginal:.4f}): nothing "
            f"is learned (gamma {{gamma:.3g}}); try a lower optim.lr or task.gamma",
        )
    head = CosineHead(job.backbone.features, num_words, settings.gamma)
    waits_ms: list[float] = []

    def bring(batch: Batch) -> tuple[Tensor, ...]:
        plan = batch.plan
        packed_BM = targets.words(plan.rows, batch.ahead)
        waits_ms.append(1e3 * targets.waited_s)
        return batch.images_BCHW, packed_BM, *mixing(plan, world.device)

    def make(images_BCHW: Tensor, packed_BM: Tensor, *mixed: Tensor) -> tuple[Tensor, Bag]:
        bag = bag_of(packed_BM, targets.form)
        return images_BCHW, mix_bags(bag, *mixed) if mixed else bag

    def scalars(logits_BK: Tensor, bag: Bag) -> dict[str, Tensor]:
        found = {
            "excess_loss": bow_cross_entropy(logits_BK, bag) - bag_entropy(bag),
            "gamma": head.gamma,
            "top_word_weight": weight_at(bag, logits_BK.argmax(1)),
        }
        if targets.tier == "streamed":  # the mean since the last line, of this sitting
            found["target_wait_ms"] = torch.tensor(sum(waits_ms) / len(waits_ms), device=world.device)
        waits_ms.clear()
        return found

    return Task(
        network=Network(job.backbone, head, pooled),
        bring=bring,
        make=make,
        loss=lambda logits_BK, bag: (bow_cross_entropy(logits_BK, bag), {}),
        scalars=scalars,
        ahead=lambda plan: targets.ahead(plan.rows),
        constants=constants,
        inputs={"shards": job.index.fingerprint, "words": digest},
        dead=dead,
        lineage=source,
    )


def _open(settings: WordsSettings, job: Job) -> tuple[Targets, dict[str, Any]]:
    """The targets of the index's rows in the tier that fits, and whose words they are."""
    from bowstore.words.store import join_rows, open_store  # Zarr: only where a store is opened

    assert settings.store is not None, "the command line resolves task.store"
    config, world = job.config, job.world
    path = fetch_store(settings.store, config.runtime.storage, display=world.first)
    world.assembled()  # however long it takes on some machine
    store = open_store(path)
    layer = store.layer(settings.layer)
    store_row_N = join_rows(store, job.index, reencoded=settings.reencoded)
    size_bytes = words_bytes(layer, len(store_row_N))
    choice = choose_tier(config.runtime.targets, size_bytes, world.device)
    # All ranks measure before any of them loads, and all take the tier of the one with the least room.
    needed = [tier for tier in TIERS if world.any(choice.tier == tier)][-1]
    if needed != choice.tier:
        choice = TierChoice(needed, f"another rank has no room for {choice.tier}")
    if world.first:
        say(describe(choice, size_bytes))
    targets = open_targets(
        choice.tier,
        layer,
        store_row_N,
        settings.form,
        world.device,
        storage=config.runtime.storage or StorageConfig(),
        shown=world.first,
    )
    return targets, {"store": str(settings.store), **layer.lineage}
