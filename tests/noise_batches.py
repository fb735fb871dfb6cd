"""Batches of noise under the plans of a run, and its task, for one process."""

import torch

from bowstore.data.index import Index, open_index
from bowstore.data.plan import plans
from bowstore.data.views import Batch
from bowstore.train import loop
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import World
from bowstore.train.tasks.task import Task, build_task

ALONE = World(0, 1, torch.device("cpu"))


def opened(config: TrainConfig) -> Index:
    assert config.shards is not None
    return open_index(config.shards)


def noise_batch(config: TrainConfig, step: int = 0) -> Batch:
    """The batch of a step; of 16 pixels a side, channels last as the loader has them."""
    index = opened(config)
    plan = next(plans(loop.data_schedule(config, index, ALONE), index, config.view, start=step, stop=step + 1))
    images_BCHW = torch.randn(len(plan.rows), 3, 16, 16, generator=torch.Generator().manual_seed(step))
    return Batch(images_BCHW.contiguous(memory_format=torch.channels_last), plan)


def made(config: TrainConfig) -> tuple[Task, Batch]:
    """The task and its first batch."""
    return build_task(config, opened(config), ALONE), noise_batch(config)
