"""Classification by labels, the upper reference of the paper's tables.

A label is a bag of one word, the class, so that CutMix and the loss are those of bags.

Legend: B batch, C channels, H W pixels, K classes, N rows in use.
"""

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from bowstore.data.index import Index
from bowstore.data.views import Batch
from bowstore.errors import DataError
from bowstore.models.heads import CosineHead, LinearHead
from bowstore.train.schedule import images_in_use
from bowstore.train.tasks.settings import SupervisedSettings
from bowstore.train.tasks.task import Dead, Job, Network, Task, mixing, pooled
from bowstore.words.bags import Bag, bow_cross_entropy, count_bag, mix_bags, weight_at

_MAX_CLASSES = 1_000_000  # a head's weights are of as many rows


def build(settings: SupervisedSettings, job: Job) -> Task:
    """The task of a job.

    Raises:
        DataError: images without a label or of one class alone, or labels that are no numbers of classes.
    """
    label_N = _labels(job.index, images_in_use(job.config, len(job.index)))
    num_classes = max(len(job.index.classes), int(label_N.max()) + 1)
    if num_classes > _MAX_CLASSES:
        raise DataError(
            f"task supervised: label {label_N.max()} of {job.index.root} asks for {num_classes} classes, of at most "
            f"{_MAX_CLASSES}; number the classes from 0"
        )
    share_K = np.bincount(label_N) / len(label_N)
    chance = float(-(share_K[share_K > 0] * np.log(share_K[share_K > 0])).sum())
    device, features = job.world.device, job.backbone.features
    head = (
        LinearHead(features, num_classes)
        if settings.head == "linear"
        else CosineHead(features, num_classes, settings.gamma, normalised=True)
    )

    def bring(batch: Batch) -> tuple[Tensor, ...]:
        label_B = torch.from_numpy(label_N[batch.plan.rows].astype(np.int64)).to(device, non_blocking=True)
        return batch.images_BCHW, label_B, *mixing(batch.plan, device)

    return Task(
        network=Network(job.backbone, head, pooled),
        bring=bring,
        make=_make,
        loss=_loss,
        constants={"chance_loss": chance},
        inputs={"shards": job.index.fingerprint, "labels": xxhash.xxh3_128_hexdigest(label_N.astype("<i4").data)},
        dead=Dead(
            chance,
            f"the loss {{loss:.4f}} is still that of predicting the classes' frequencies ({chance:.4f}): nothing is "
            f"learned; try a lower optim.lr",
        ),
        lineage={"num_classes": num_classes},
    )


def _labels(index: Index, used: int) -> NDArray[np.int32]:
    """Labels of the rows in use, int32 (N,)."""
    label_N = np.asarray(index.label[:used])
    without = np.flatnonzero(label_N < 0)
    if len(without):
        raise DataError(
            f"task supervised: {len(without)} of {used} images of {index.root} have no label (the first: "
            f"{index.key(int(without[0]))}); make the shards from class folders or a list with labels, or name their "
            f"label to `bowstore index --label-field`"
        )
    if (label_N == label_N[0]).all():
        raise DataError(
            f"task supervised: the {used} images of {index.root} that are used are all of one class; use shards of "
            f"several, or raise images"
        )
    return label_N


def _make(images_BCHW: Tensor, label_B: Tensor, *mixed: Tensor) -> tuple[Tensor, Bag]:
    bag = count_bag(label_B[:, None])
    return images_BCHW, mix_bags(bag, *mixed) if mixed else bag


def _loss(logits_BK: Tensor, bag: Bag) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a mixed image, its accuracy is the share of the class that was predicted."""
    return bow_cross_entropy(logits_BK, bag), {"accuracy": weight_at(bag, logits_BK.detach().argmax(1))}
