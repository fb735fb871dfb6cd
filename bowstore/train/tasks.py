"""What a network is trained to predict: rotations (the teacher) or bags of words (BoWNet).

A task is a value: the network, how a batch becomes inputs and targets, and the loss. The loop knows no more.

Legend: B batch, C channels, H W pixels, K words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn

from bowstore.config import TrainConfig
from bowstore.data.index import Index
from bowstore.data.pipeline import Batch
from bowstore.models.heads import CosineHead, RotationHead
from bowstore.models.registry import Backbone, build_backbone
from bowstore.train.distributed import World
from bowstore.words.store import join_rows, open_store
from bowstore.words.targets import (
    Bag,
    ResidentTargets,
    bag_entropy,
    bow_cross_entropy,
    marginal_loss,
    mix_bags,
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

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits."""
        if self._pooled:
            return self.head(self.backbone(images_BCHW))  # type: ignore[no-any-return]
        last = self.backbone.layers[-1]
        return self.head(self.backbone.feature_maps(images_BCHW, (last,))[last])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Task:
    """One training task.

    Attributes:
        network: images to logits.
        prepare: turns a batch into network inputs and targets.
        loss: (logits, targets) to the scalar loss and further scalars for the log, all tensors on the device.
        constants: numbers of the whole run for the log, such as the marginal's loss.
        inputs: identity of the data the run depends on; a resumed run must find the same.
    """

    network: Network
    prepare: Callable[[Batch], tuple[Tensor, Any]]
    loss: Callable[[Tensor, Any], tuple[Tensor, dict[str, Tensor]]]
    constants: dict[str, float]
    inputs: dict[str, str]


def build_task(config: TrainConfig, index: Index, world: World) -> Task:
    """The task of a configuration, its network randomly initialised from the configuration's seed."""
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.model)
    if config.task == "rotation":
        return _rotation_task(backbone, index)
    return _words_task(config, backbone, index, world)


def _rotation_task(backbone: Backbone, index: Index) -> Task:
    """4-way rotation prediction (RotNet); all four rotations of each image are in the batch."""

    def prepare(batch: Batch) -> tuple[Tensor, Tensor]:
        images_BCHW = batch.images_BCHW
        turned = [torch.rot90(images_BCHW, quarter, (2, 3)) for quarter in range(4)]
        inputs = torch.cat(turned).contiguous(memory_format=torch.channels_last)
        return inputs, torch.arange(4, device=inputs.device).repeat_interleave(len(images_BCHW))

    def loss(logits_B4: Tensor, label_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        accuracy = (logits_B4.detach().argmax(1) == label_B).float().mean()
        return F.cross_entropy(logits_B4.float(), label_B), {"accuracy": accuracy}

    network = Network(backbone, RotationHead(backbone), pooled=False)
    return Task(network, prepare, loss, {"chance_loss": float(np.log(4))}, {"shards": index.fingerprint})


def _words_task(config: TrainConfig, backbone: Backbone, index: Index, world: World) -> Task:
    """Bag-of-words prediction under perturbation (paper, section 3)."""
    words_Nhw, vocabulary_size, digest = _words_of_rows(config, index)
    targets = ResidentTargets(words_Nhw, config.words.form, world.device)
    head = CosineHead(backbone.features, vocabulary_size, config.words.gamma)

    def prepare(batch: Batch) -> tuple[Tensor, Any]:
        plan = batch.plan
        bag = targets.bag(torch.from_numpy(plan.rows).to(world.device, non_blocking=True))
        if config.view.cutmix:
            partner_B = torch.from_numpy(plan.partner.astype(np.int64)).to(world.device, non_blocking=True)
            bag = mix_bags(bag, partner_B, torch.from_numpy(plan.kept).to(world.device, non_blocking=True))
        return batch.images_BCHW, bag

    def loss(logits_BK: Tensor, bag: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value = bow_cross_entropy(logits_BK, bag)
        return value, {
            "excess_loss": value.detach() - bag_entropy(bag),
            "gamma": head.gamma.detach(),
            "top_word_weight": _weight_at(bag, logits_BK.detach().argmax(1)),
        }

    constants = {"marginal_loss": marginal_loss(words_Nhw, vocabulary_size, config.words.form)}
    network = Network(backbone, head, pooled=True)
    return Task(network, prepare, loss, constants, {"shards": index.fingerprint, "words": digest})


def _weight_at(bag: Bag, word_B: Tensor) -> Tensor:
    """Mean target weight of one word an image."""
    hit_BM: Tensor = bag.words_BM == word_B[:, None]
    return (hit_BM * bag.weights_BM).sum(1).mean()


def _words_of_rows(config: TrainConfig, index: Index) -> tuple[NDArray[np.uint16], int, str]:
    """Word maps in the order of the index rows (N, h, w), the vocabulary's size, and the words' identity."""
    assert config.words.store is not None, "the command line resolves words.store"
    store = open_store(config.words.store)
    layer = store.layer(config.words.layer)
    words_Nhw = layer.read_words()
    rows_N = join_rows(store, index)
    if not np.array_equal(rows_N, np.arange(len(words_Nhw))):
        words_Nhw = words_Nhw[rows_N]
    return words_Nhw, layer.words, xxhash.xxh3_128(np.ascontiguousarray(words_Nhw).data).hexdigest()
