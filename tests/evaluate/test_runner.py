"""What every evaluation shares: a plugin's protocol of each form from `bowstore eval` to its result file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from shard_sets import ShardMaker

from bowstore.cli import main
from bowstore.config import Workspace
from bowstore.errors import DataError, UsageError
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.protocol import Kind, Scores
from bowstore.evaluate.protocols.linear import KIND, LinearSettings
from bowstore.evaluate.runner import evaluate
from bowstore.models.saved import load_backbone, network_of, save_backbone
from bowstore.models.weights import weights_sha256

EXTENDING = Path(__file__).parents[1] / "extending"


@pytest.fixture
def workspace(make_shard_set: ShardMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with labelled shards, a network and the two protocols."""
    make_shard_set(24, folder="train", classes=2)
    make_shard_set(8, folder="test", classes=2, first=24)
    plugins = f"[{EXTENDING / 'class_means.py'}, {EXTENDING / 'finetune.py'}]"
    (tmp_path / "bowstore.yaml").write_text(f"shards: train\nval_shards: test\nplugins: {plugins}\n")
    view = {"size": 16, "resize": None, "cutmix": True}
    network = network_of({"name": "r", "task": "words", "view": view, "model": {"arch": "wrn-10-1"}}, "test")
    save_backbone(tmp_path / "net.safetensors", network.fresh(), network)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["eval", *arguments])


def test_a_protocol_of_features_in_a_plugin(workspace: Path) -> None:
    shown = call("--help").output
    assert "Nearest class mean" in shown
    assert "Linear classifier" in shown
    done = call("class-means", "--run", "net.safetensors", "--random", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads((workspace / "net/random/eval/class-means-euclidean.json").read_text())
    assert (result["protocol"], result["headline"], result["inputs"]["run"]) == (
        "class-means/euclidean", "top1", "r (random)"
    )  # fmt: skip
    assert result["metrics"]["top1"] in {n / 8 for n in range(9)}
    assert result["settings"]["images"] == {"train": 24, "test": 8}
    assert result["details"]["variation"].keys() == {"train", "test"}


def test_a_protocol_that_trains_in_a_plugin(workspace: Path) -> None:
    options = call("finetune", "--help").output
    assert "--steps" in options
    assert "[default: 100]" in options
    assert "--compile" not in options  # says how features are taken
    done = call("finetune", "--run", "net.safetensors", "--steps", "3", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads((workspace / "net/eval/finetune-3-steps.json").read_text())
    assert result == json.loads(done.stdout)
    weights = weights_sha256(load_backbone(workspace / "net.safetensors").backbone.state_dict())
    assert result["inputs"]["weights_sha256"] == weights  # before training
    assert len(result["details"]["losses"]) == 3
    assert all(0.2 < loss < 3 for loss in result["details"]["losses"])
    assert (result["settings"]["options"]["steps"], result["settings"]["ranks"]) == (3, 1)
    assert result["settings"]["view"]["cutmix"] is True


def test_what_a_user_can_get_wrong_is_one_line(workspace: Path) -> None:
    for arguments, code, message in (
        (["liner"], 2, "Error: no protocol 'liner'; did you mean 'linear'? there are linear, "),
        (
            ["class-means", "--held-out", "--test", "test"],
            2,
            "Error: eval class-means: configuration: held_out tests on train images",
        ),
        (["class-means", "--run", "nobody"], 1, "Error: no run or file 'nobody'"),
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


def test_a_metric_that_is_no_number_is_no_result(workspace: Path) -> None:
    kind = replace(KIND, score=lambda features, settings: Scores(metrics={"top1": float("nan")}))
    shards = Workspace(shards=Path("train"), val_shards=Path("test"))
    with pytest.raises(DataError, match="linear/bownet-cifar: top1 is nan, which is no result; look at the images"):
        evaluate(kind, LinearSettings(), EvalConfig(run="net.safetensors"), shards)
    assert not (workspace / "net").exists()


def test_a_kind_has_one_form() -> None:
    both = {name: getattr(KIND, name) for name in ("name", "help", "settings", "describe", "data", "score")}
    with pytest.raises(ValueError, match="protocol 'linear' needs one of score and run"):
        Kind(**both, run="module:run")
