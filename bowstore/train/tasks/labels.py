"""Labels of an index as targets.

Legend: N rows in use, B batch, K classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
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
        share_K = np.bincount(self.label_N) / len(self.label_N)
        return float(-(share_K[share_K > 0] * np.log(share_K[share_K > 0])).sum())

    @property
    def digest(self) -> str:
        """32 hex digits over all of them."""
        return xxhash.xxh3_128_hexdigest(self.label_N.astype("<i4").data)


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
            f"task {task}: {len(without)} of {used} images of {index.root} have no label (the first: "
            f"{index.key(int(without[0]))}); make the shards from class folders or a list with labels, or name their "
            f"label to `bowstore index --label-field`"
        )
    if (label_N == label_N[0]).all():
        raise DataError(
            f"task {task}: the {used} images of {index.root} that are used are all of one class; use shards of "
            f"several, or raise images"
        )
    num_classes = max(len(index.classes), int(label_N.max()) + 1)
    if num_classes > _MAX_CLASSES:
        raise DataError(
            f"task {task}: label {label_N.max()} of {index.root} asks for {num_classes} classes, of at most "
            f"{_MAX_CLASSES}; number the classes from 0"
        )
    return Labels(label_N, num_classes)
