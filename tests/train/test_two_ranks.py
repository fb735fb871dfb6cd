"""Tasks with several heads on two ranks, beside the same runs on one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_training import exit_codes, next_sitting, start_ranks

from bowstore.models.saved import newest_checkpoint
from bowstore.runs import read_metrics
from bowstore.train import loop
from bowstore.train.config import TrainConfig

Make = Callable[..., TrainConfig]


def train_both(_rank: int, configs: list[TrainConfig], folder: Path) -> None:
    torch.set_num_threads(1)
    for number, config in enumerate(configs):
        if number:
            next_sitting()
        loop.train(config, folder)


def state_of(run: Path) -> dict[str, Any]:
    state = newest_checkpoint(run)
    assert state is not None
    return state


def test_two_ranks_train_all_heads_of_a_task(
    make_config: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those of a frozen network end where they end on one rank; the others, whose batch norms differ, all move."""
    short = {"epochs": 1, "milestones": []}
    each = {"optim": short, "runtime": {"log_every_steps": 1}}
    frozen = make_config("linear", {"norm": "none", "layers": ["block2", "pooled"]}, **each)
    pyramid = make_config("words", {"form": "pyramid"}, **each)
    assert exit_codes(start_ranks(train_both, 2, ([frozen, pyramid], tmp_path / "two"), sittings=2)) == [0, 0]
    assert "Warning" not in capfd.readouterr().err
    for config in (frozen, pyramid):
        loop.train(config, tmp_path / "one")
        one, two = (read_metrics(tmp_path / name / config.name) for name in ("one", "two"))
        assert [line["order"] for line in one] == [line["order"] for line in two]
    one, two = (state_of(tmp_path / name / frozen.name) for name in ("one", "two"))
    for name, value in one["head"].items():
        torch.testing.assert_close(two["head"][name], value, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(two["backbone"][name], value) for name, value in one["backbone"].items())
    heads = state_of(tmp_path / "two" / pyramid.name)["head"]
    assert sum(name.endswith("gamma") and value.item() != 1 for name, value in heads.items()) == 5
