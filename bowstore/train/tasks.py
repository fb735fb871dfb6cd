"""What a network is trained to predict: rotations (the teacher) or bags of words (BoWNet).

A task is a value: the network, how a batch becomes inputs and targets, and the loss. The loop knows no more. What comes
after a batch's tensors are on the device is made of tensors alone, so that it can be compiled with the network.

Legend: B batch, C channels, H W pixels, K words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowstore.config import StorageConfig
from bowstore.data.index import Index
from bowstore.data.plan import Plan
from bowstore.data.views import Batch
from bowstore.models.backbone import Backbone
from bowstore.models.heads import CosineHead, RotationHead
from bowstore.models.memory import training_format
from bowstore.models.registry import build_backbone
from bowstore.progress import say
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import World
from bowstore.train.schedule import images_in_use
from bowstore.words.bags import Bag, MeanBag, bag_entropy, bag_of, bow_cross_entropy, mix_bags
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


class Network(nn.Module):
    """A backbone and a head as one module, so that DDP and torch.compile see the whole step.

    Args:
        backbone: the network to keep.
        head: maps its pooled feature or its last map to logits.
        pooled: whether the head takes the pooled feature (B, C) or the map (B, C, h, w).
    """

    def __init__(self, backbone: Backbone, head: nn.Module, *, pooled: bool) -> None:
        super().__init__()
        self.backbone, self.head, self._pooled = backbone, head, pooled
        self._formats = {device: training_format(backbone, device) for device in ("cpu", "cuda")}

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits."""
        images_BCHW = images_BCHW.contiguous(memory_format=self.memory_format(images_BCHW.device))
        if self._pooled:
            return self.head(self.backbone(images_BCHW))  # type: ignore[no-any-return]
        last = self.backbone.layers[-1]
        return self.head(self.backbone.feature_maps(images_BCHW, (last,))[last])  # type: ignore[no-any-return]

    def memory_format(self, device: torch.device) -> torch.memory_format:
        """How weights and maps lie in memory (`bowstore.models.memory`)."""
        return self._formats[device.type]


@dataclass(frozen=True)
class Task:
    """One training task.

    Attributes:
        network: images to logits.
        bring: a batch's images and whatever its targets are made of, on the device.
        make: network inputs and targets of these tensors.
        loss: (logits, targets) to the scalar loss, and to further scalars that cost next to nothing: of all of these
            the log has the mean over the steps.
        scalars: (logits, targets) to scalars of a step that is logged, and of no other.
        constants: numbers of the whole run for the log of rank 0, such as the marginal's loss.
        inputs: identity of the data the run depends on; a resumed run must find the same.
        ahead: the host's part of a batch's targets, called in the reading thread; `bring` finds it in the batch.
    """

    network: Network
    bring: Callable[[Batch], tuple[Tensor, ...]]
    make: Callable[..., tuple[Tensor, Any]]
    loss: Callable[[Tensor, Any], tuple[Tensor, dict[str, Tensor]]]
    constants: dict[str, float]
    inputs: dict[str, str]
    scalars: Callable[[Tensor, Any], dict[str, Tensor]] | None = None
    ahead: Callable[[Plan], Any] | None = None

    def prepare(self, batch: Batch) -> tuple[Tensor, Any]:
        """Network inputs and targets of a batch."""
        return self.make(*self.bring(batch))


def build_task(config: TrainConfig, index: Index, world: World) -> Task:
    """The task of a configuration, its network randomly initialised from the configuration's seed."""
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.model)
    if (frozen := backbone.freeze_unused()) and world.first:
        names = ", ".join(sorted({name.rpartition(".")[0] for name in frozen}))
        say(f"{names} of {backbone.arch}: behind {backbone.layers[-1]}, the last map that is used; not trained")
    if config.task == "rotation":
        return _rotation_task(backbone, index, config.rotation.blocks)
    return _words_task(config, backbone, index, world)


def _rotation_task(backbone: Backbone, index: Index, blocks: int | None) -> Task:
    """4-way rotation prediction (RotNet); all four rotations of each image are in the batch."""

    def make(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        images_BHWC = images_BCHW.permute(0, 2, 3, 1)
        # Joined as they lie in memory, channels last: joined as BCHW they would be copied once more for the network.
        turned_BHWC = torch.cat([torch.rot90(images_BHWC, quarter, (1, 2)) for quarter in range(4)])
        label_B = torch.arange(4, device=images_BCHW.device).repeat_interleave(len(images_BCHW))
        return turned_BHWC.permute(0, 3, 1, 2), label_B

    def loss(logits_B4: Tensor, label_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        accuracy = (logits_B4.detach().argmax(1) == label_B).float().mean()
        return F.cross_entropy(logits_B4.float(), label_B), {"accuracy": accuracy}

    network = Network(backbone, RotationHead(backbone, blocks), pooled=False)
    return Task(
        network=network,
        bring=lambda batch: (batch.images_BCHW,),
        make=make,
        loss=loss,
        constants={"chance_loss": float(np.log(4))},
        inputs={"shards": index.fingerprint},
    )


def _words_task(config: TrainConfig, backbone: Backbone, index: Index, world: World) -> Task:
    """Bag-of-words prediction under perturbation (paper, section 3)."""
    targets, vocabulary_size = _open_words(config, index, world)
    mean = MeanBag(vocabulary_size, config.words.form) if world.first else None
    used = images_in_use(config, len(index))
    inputs = {"shards": index.fingerprint, "words": words_digest(targets, mean, used=used, shown=world.first)}
    head = CosineHead(backbone.features, vocabulary_size, config.words.gamma)

    waits_ms: list[float] = []

    def bring(batch: Batch) -> tuple[Tensor, ...]:
        plan = batch.plan
        packed_BM = targets.words(plan.rows, batch.ahead)
        waits_ms.append(1e3 * targets.waited_s)
        mixed = (plan.partner.astype(np.int64), plan.kept) if plan.mixed else ()
        moved = (torch.from_numpy(values_B).to(world.device, non_blocking=True) for values_B in mixed)
        return batch.images_BCHW, packed_BM, *moved

    def make(images_BCHW: Tensor, packed_BM: Tensor, *mixed: Tensor) -> tuple[Tensor, Bag]:
        bag = bag_of(packed_BM, targets.form)
        return images_BCHW, mix_bags(bag, *mixed) if mixed else bag

    def scalars(logits_BK: Tensor, bag: Bag) -> dict[str, Tensor]:
        found = {
            "excess_loss": bow_cross_entropy(logits_BK, bag) - bag_entropy(bag),
            "gamma": head.gamma,
            "top_word_weight": _weight_at(bag, logits_BK.argmax(1)),
        }
        if targets.tier == "streamed":  # the mean since the last line, of this sitting
            found["target_wait_ms"] = torch.tensor(sum(waits_ms) / len(waits_ms), device=world.device)
        waits_ms.clear()
        return found

    return Task(
        network=Network(backbone, head, pooled=True),
        bring=bring,
        make=make,
        loss=lambda logits_BK, bag: (bow_cross_entropy(logits_BK, bag), {}),
        constants={"marginal_loss": mean.entropy()} if mean else {},
        inputs=inputs,
        scalars=scalars,
        ahead=lambda plan: targets.ahead(plan.rows),
    )


def _weight_at(bag: Bag, word_B: Tensor) -> Tensor:
    """Mean target weight of one word an image."""
    hit_BM: Tensor = bag.words_BM == word_B[:, None]
    return (hit_BM * bag.weights_BM).sum(1).mean()


def _open_words(config: TrainConfig, index: Index, world: World) -> tuple[Targets, int]:
    """The targets of the index's rows, in the tier that fits, and the vocabulary's size."""
    from bowstore.words.store import join_rows, open_store

    assert config.words.store is not None, "the command line resolves words.store"
    store = open_store(config.words.store)
    layer = store.layer(config.words.layer)
    store_row_N = join_rows(store, index, reencoded=config.words.reencoded)
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
        config.words.form,
        world.device,
        storage=config.runtime.storage or StorageConfig(),
        shown=world.first,
    )
    return targets, layer.words
