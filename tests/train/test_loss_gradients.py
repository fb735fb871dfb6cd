"""Losses and the gradients of every trained parameter against dense targets in float64.

Those of location, clusters, pyramids and linear heads lie beside the rest of these tasks.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from noise_batches import made
from torch import Tensor

from bowstore.data.index import open_index
from bowstore.data.views import Batch
from bowstore.train.config import TrainConfig
from bowstore.words.store.join import join_rows
from bowstore.words.store.store import open_store

Make = Callable[..., TrainConfig]
SIDE = 16


def whole_targets(config: TrainConfig, batch: Batch) -> Tensor:
    """What each image of a batch shows, as shares of all classes or words, before anything is mixed."""
    task: Any = config.task
    index, rows = open_index(Path(str(config.shards))), batch.plan.rows
    if task.name == "supervised":
        return torch.eye(4, dtype=torch.float64)[torch.from_numpy(index.label[rows].astype(np.int64))]
    store = open_store(task.store[0])
    words_NM = store.load_words(task.layer)[join_rows([store], index)].reshape(len(index), -1)
    count_BK = np.stack([np.bincount(words_M, minlength=12) for words_M in words_NM[rows].astype(np.int64)])
    share_BK = torch.from_numpy(np.minimum(count_BK, 1) if task.form == "binary" else count_BK).double()
    return share_BK / share_BK.sum(1, keepdim=True)


def exact_loss(config: TrainConfig, network: Any, batch: Batch) -> Tensor:
    """By the definitions, in float64."""
    images_BCHW, plan = batch.images_BCHW.double(), batch.plan
    if config.task.name == "rotation":
        images_BCHW = torch.cat([torch.rot90(images_BCHW, quarter, (2, 3)) for quarter in range(4)])
        target_BK = torch.eye(4, dtype=torch.float64).repeat_interleave(len(plan.rows), 0)
    else:
        target_BK, kept_B1 = whole_targets(config, batch), torch.from_numpy(plan.kept).double()[:, None]
        assert (kept_B1 < 1).any()
        target_BK = kept_B1 * target_BK + (1 - kept_B1) * target_BK[torch.from_numpy(plan.partner.astype(np.int64))]
    loss: Tensor = -(torch.log_softmax(network(images_BCHW), 1) * target_BK).sum(1).mean()
    return loss


@pytest.mark.parametrize(("name", "settings"), [
    ("rotation", {"head": "block"}), ("rotation", {"head": "linear"}),
    ("supervised", {"head": "linear"}), ("supervised", {"head": "cosine"}),
    ("words", {"form": "count"}), ("words", {"form": "binary"}), ("words", {"head": "linear"}),
])  # fmt: skip
def test_the_loss_and_its_gradients_are_those_in_float64(
    make_config: Make, name: str, settings: dict[str, Any]
) -> None:
    config = make_config(name, settings)
    task, batch = made(config)
    network = copy.deepcopy(task.network).double()
    exact = exact_loss(config, network, batch)
    inputs_BCHW, targets = task.prepare(batch)
    loss, _ = task.loss(task.network(inputs_BCHW), targets)
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6)
    found = torch.autograd.grad(loss, list(task.network.parameters()))
    wanted = torch.autograd.grad(exact, list(network.parameters()))
    whole = torch.cat([other.flatten() for other in wanted]).norm()  # a batch norm behind some leaves next to nothing
    for (parameter, _), one, other in zip(network.named_parameters(), found, wanted, strict=True):
        assert (one.double() - other).norm() <= 1e-5 * other.norm() + 1e-6 * whole, parameter
