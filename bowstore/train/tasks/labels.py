"""Classes as targets: what is learned of them, and the labels of an index.

Legend: N rows in use, B batch, K classes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from bowstore.data.plan import Plan
from bowstore.errors import DataError
from bowstore.train.schedule import images_in_use
from bowstore.train.tasks.task import Job

_MAX_CLASSES = 1_000_000  # a head's weights are of as many rows


@dataclass(frozen=True)
class Labels:
    """Classes of a run's images.

    Attributes:
        label_N: int32.
        num_classes: K.
    """

    label_N: NDArray[np.int32]
    num_classes: int

    def of(self, plan: Plan, device: torch.device) -> Tensor:
        """Those of a batch, int64 (B,), on the device."""
        return torch.from_numpy(self.label_N[plan.rows].astype(np.int64)).to(device, non_blocking=True)

    @property
    def chance(self) -> float:
        """The loss of predicting the classes' frequencies, nats."""
        return frequency_loss(self.label_N)

    @property
    def digest(self) -> str:
        """32 hex digits over all of them."""
        return xxhash.xxh3_128_hexdigest(self.label_N.astype("<i4").data)


def frequency_loss(class_N: NDArray[Any]) -> float:
    """The loss of predicting how often each class occurs, nats."""
    share_K = np.bincount(class_N) / len(class_N)
    return float(-(share_K[share_K > 0] * np.log(share_K[share_K > 0])).sum())


def label_loss(logits_BK: Tensor, class_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in float32, and the accuracy."""
    accuracy = (logits_BK.detach().argmax(1) == class_B).float().mean()
    return F.cross_entropy(logits_BK.float(), class_B), {"accuracy": accuracy}


def read_labels(job: Job) -> Labels:
    """Labels of the rows that a job's run uses.

    Raises:
        DataError: images without a label, or all of one class, or a label too large to be a class number.
    """
    index, task = job.index, job.config.task.name
    used = images_in_use(job.config, len(index))
    label_N = np.asarray(index.label[:used])
    without = np.flatnonzero(label_N < 0)
    if len(without):
        raise DataError(
            f"task {task}: {len(without)} of {used} images of {index.place} have no label (the first: "
            f"{index.key(int(without[0]))}); make the shards from class folders or a list with labels, or name their "
            f"label to `bowstore index --label-field`"
        )
    if (label_N == label_N[0]).all():
        raise DataError(
            f"task {task}: the {used} images of {index.place} that are used are all of one class; use shards of "
            f"several, or raise images"
        )
    num_classes = max(len(index.classes), int(label_N.max()) + 1)
    if num_classes > _MAX_CLASSES:
        raise DataError(
            f"task {task}: label {label_N.max()} of {index.place} asks for {num_classes} classes, of at most "
            f"{_MAX_CLASSES}; number the classes from 0"
        )
    return Labels(label_N, num_classes)
