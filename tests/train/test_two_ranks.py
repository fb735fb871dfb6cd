"""Tasks with several heads on two ranks, beside the same runs on one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_training import exit_codes, next_sitting, start_ranks
from shard_sets import ShardMaker

from bowstore.config import Workspace, validate
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.probe import probe_of
from bowstore.evaluate.protocols.knn import KIND, KnnSettings
from bowstore.evaluate.runner import evaluate
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
        loop.train(config, folder, probe=probe_of(config, Workspace()))


def state_of(run: Path) -> dict[str, Any]:
    state = newest_checkpoint(run)
    assert state is not None
    return state


def test_two_ranks_train_all_heads_of_a_task(
    make_config: Make, make_shard_set: ShardMaker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those of a frozen network end where they end on one rank; the others, whose batch norms differ, all move.

    Rank 0 measures its network, that of the checkpoint, while the other one waits.
    """
    knn: dict[str, Any] = {"k": 9, "test": str(make_shard_set(24, folder="test", first=72).root)}
    probe = {"probe": {"eval": {"knn": knn}}}
    short = {"epochs": 1, "milestones": []}
    each = {"optim": short, "runtime": {"log_every_steps": 1}}
    frozen = make_config("linear", {"norm": "none", "layers": ["block2", "pooled"]}, **each)
    pyramid = make_config("words", {"form": "pyramid"}, **{**each, "runtime": {**each["runtime"], **probe}})
    assert exit_codes(start_ranks(train_both, 2, ([frozen, pyramid], tmp_path / "two"), sittings=2)) == [0, 0]
    assert "Warning" not in capfd.readouterr().err
    for config in (frozen, pyramid):
        loop.train(config, tmp_path / "one", probe=probe_of(config, Workspace()))
        one, two = (read_metrics(tmp_path / name / config.name) for name in ("one", "two"))
        assert [line["order"] for line in one] == [line["order"] for line in two]
    one, two = (state_of(tmp_path / name / frozen.name) for name in ("one", "two"))
    for name, value in one["head"].items():
        torch.testing.assert_close(two["head"][name], value, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(two["backbone"][name], value) for name, value in one["backbone"].items())
    heads = state_of(tmp_path / "two" / pyramid.name)["head"]
    settings = validate(KnnSettings, {**knn, "train": str(pyramid.shards)}, "test")
    how = EvalConfig(run=str(tmp_path / "two" / pyramid.name), compile=False)
    figure = read_metrics(tmp_path / "two" / pyramid.name)[-1]["knn/k9-t0.1/top1"]
    assert evaluate(KIND, settings, how, Workspace()).metrics["top1"] == figure
    assert sum(name.endswith("gamma") and value.item() != 1 for name, value in heads.items()) == 5
