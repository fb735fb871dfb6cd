from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shard_sets import ShardMaker, write_store

from bowstore.config import validate
from bowstore.train.config import TrainConfig
from bowstore.train.tasks import TASKS

Make = Callable[..., TrainConfig]


@pytest.fixture
def make_config(make_shard_set: ShardMaker, tmp_path: Path) -> Make:
    index = make_shard_set(72)

    def make(task: str = "words", settings: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        if task == "words" and not (tmp_path / "words.zarr").exists():
            write_store(tmp_path / "words.zarr", index)
        own = {
            "words": {"store": str(tmp_path / "words.zarr"), "layer": "block3"},
            "location": {"patch": 4, "jitter": 1},  # what fits the view
            "clusters": {"clusters": 6, "every_epochs": 1},  # and so few images
        }.get(task, {})
        values: dict[str, Any] = {
            "name": f"{task}-run",
            "task": {"name": task, **own, **(settings or {})},
            "shards": str(index.root),
            "view": {"size": 16, "resize": None, "cutmix": TASKS.get(task).mixes},
            "model": {"arch": "wrn-10-1", "strides": [2, 2, 1]},
            "optim": {"batch": 16, "epochs": 3, "lr": 0.05, "milestones": [2]},
            "runtime": {"log_every_steps": 2, "checkpoint_every_steps": 5, "threads": 1},
        }
        for key, value in changes.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        return validate(TrainConfig, values, "test")

    return make
