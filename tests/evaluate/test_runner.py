"""What every evaluation shares: a plugin's protocol of each form from `bowstore eval` to its result file."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from shard_sets import ShardMaker

from bowstore.cli import main
from bowstore.config import Workspace
from bowstore.errors import UsageError
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.protocol import Kind
from bowstore.evaluate.protocols.linear import KIND, LinearSettings
from bowstore.evaluate.runner import evaluate
from bowstore.models.saved import network_of, save_backbone

PROTOCOLS = '''
"""The nearest class mean, on features; and a linear head that is trained on augmented images."""
import numpy as np
import torch
from pydantic import Field
from torch.nn import functional as F
from bowstore.config import Count
from bowstore.evaluate.augmented import augmented
from bowstore.evaluate.protocol import Kind, Protocol, Scores
from bowstore.evaluate.train_test import TrainTestSettings, open_train_test, resolve_train_test

def describe_mean(settings):
    return Protocol(id="mean/plain", version=1, description="the nearest class mean", headline="top1")

def score(features, settings):
    train, test = features["train"], features["test"]
    means = np.stack([train["pooled"][train.labels == k].mean(axis=0) for k in range(len(train.classes))])
    found = np.square(test["pooled"][:, None] - means).sum(axis=2).argmin(axis=1)
    return Scores(metrics={"first": 0.0, "top1": float((found == test.labels).mean())})

class HeadSettings(TrainTestSettings):
    """Of the head."""
    steps: Count = Field(3, description="of training")

def describe_head(settings):
    return Protocol(id=f"head/{settings.steps}-steps", version=4, description="a linear head", headline="top1")

def run(network, data, settings, world):
    backbone, losses = network.backbone, []
    head = torch.nn.Linear(backbone.features, len(data["train"].classes)).to(world.device)
    parameters = [*head.parameters(), *backbone.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for images_BCHW, labels_B in augmented(
        data["train"], network.view, batch=8, seed=0, world=world, steps=settings.steps
    ):
        loss = F.cross_entropy(head(backbone(images_BCHW.float())), torch.from_numpy(labels_B))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Scores(metrics={"top1": 0.5}, details={"losses": losses}, settings={"batch": 8})

DATA = {"data": open_train_test, "resolve": resolve_train_test}
MEAN = Kind(name="mean", help="The nearest class mean.", settings=TrainTestSettings, describe=describe_mean,
            score=score, **DATA)
HEAD = Kind(name="head", help="A head on augmented images.", settings=HeadSettings, describe=describe_head,
            run=run, **DATA)
'''


@pytest.fixture
def workspace(make_shard_set: ShardMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with labelled shards, a network and the two protocols."""
    make_shard_set(24, folder="train", classes=2)
    make_shard_set(8, folder="test", classes=2, first=24)
    (tmp_path / "own.py").write_text(PROTOCOLS)
    (tmp_path / "bowstore.yaml").write_text("shards: train\nval_shards: test\nplugins: [own.py]\n")
    view = {"size": 16, "resize": None, "cutmix": True}
    network = network_of({"name": "r", "task": "words", "view": view, "model": {"arch": "wrn-10-1"}}, "test")
    save_backbone(tmp_path / "net.safetensors", network.fresh(), network)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["eval", *arguments])


def test_a_protocol_of_features_in_a_plugin(workspace: Path) -> None:
    shown = call("--help").output
    assert "The nearest class mean." in shown
    assert "Linear classifier" in shown
    done = call("mean", "--run", "net.safetensors", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads((workspace / "net/eval/mean-plain.json").read_text())
    assert (result["protocol"], result["headline"]) == ("mean/plain", "top1")
    assert result["metrics"]["top1"] in {n / 8 for n in range(9)}
    assert result["settings"]["images"] == {"train": 24, "test": 8}
    assert result["details"]["variation"].keys() == {"train", "test"}


def test_a_protocol_that_trains_in_a_plugin(workspace: Path) -> None:
    options = call("head", "--help").output
    assert "--steps" in options
    assert "Of training.  [default: 3]" in options
    assert "--compile" not in options  # says how features are taken
    results = []
    for _ in range(2):
        done = call("head", "--run", "net.safetensors", "--json")
        assert done.exit_code == 0, done.output
        results.append(json.loads((workspace / "net/eval/head-3-steps.json").read_text()))
    one, two = results
    assert one["protocol_version"] == 4
    assert one["inputs"] == two["inputs"]  # the digest is that of the weights before training
    assert len(one["details"]["losses"]) == 3
    assert all(0.2 < loss < 3 for loss in one["details"]["losses"])
    assert one["settings"]["options"]["steps"] == 3
    assert one["settings"]["batch"] == 8
    assert one["settings"]["view"]["cutmix"] is True


def test_results_of_a_random_network_lie_apart(workspace: Path) -> None:
    assert call("mean", "--run", "net.safetensors", "--random").exit_code == 0
    result = json.loads((workspace / "net/random/eval/mean-plain.json").read_text())
    assert result["inputs"]["run"] == "r (random)"


def test_what_a_user_can_get_wrong_is_one_line(workspace: Path) -> None:
    for arguments, code, message in (
        (["liner"], 2, "Error: no protocol 'liner'; did you mean 'linear'? there are linear, "),
        (
            ["mean", "--held-out", "--test", "test"],
            2,
            "Error: eval mean: configuration: held_out tests on train images",
        ),
        (["mean", "--run", "nobody"], 1, "Error: no run or file 'nobody'"),
    ):
        done = call(*arguments)
        assert done.exit_code == code
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_features_are_scored_by_one_process(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    shards = Workspace(shards=Path("train"), val_shards=Path("test"))
    with pytest.raises(UsageError, match="eval linear is for one process, and torchrun started 2; start it without"):
        evaluate(KIND, LinearSettings(), EvalConfig(run="net.safetensors"), shards)


def test_a_kind_has_one_form() -> None:
    both = {name: getattr(KIND, name) for name in ("name", "help", "settings", "describe", "data", "score")}
    with pytest.raises(ValueError, match="protocol 'linear' needs one of score and run"):
        Kind(**both, run="module:run")
