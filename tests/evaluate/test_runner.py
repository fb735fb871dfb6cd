"""What every evaluation shares: a plugin's protocol of each form from `bowstore eval` to its result file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from shard_sets import ShardMaker

from bowstore.cli import main
from bowstore.config import Workspace
from bowstore.errors import DataError, UsageError
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.kept import FeatureSets
from bowstore.evaluate.protocol import Kind, LabelledSplit, Protocol, Scores
from bowstore.evaluate.protocols.linear import KIND, LinearSettings
from bowstore.evaluate.results import read_result
from bowstore.evaluate.runner import evaluate
from bowstore.models.saved import load_backbone, network_of, save_backbone
from bowstore.models.weights import weights_sha256

EXTENDING = Path(__file__).parents[1] / "extending"
SHARDS = Workspace(shards=Path("train"), val_shards=Path("test"))
KEPT = FeatureSets()  # of all tests, whose networks and images are the same


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
    with pytest.raises(UsageError, match="eval linear is for one process, and torchrun started 2; start it without"):
        evaluate(KIND, LinearSettings(), EvalConfig(run="net.safetensors"), SHARDS)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"metrics": {"top1": float("nan")}}, r"metrics.top1: Input should be a finite number \(got nan\)\); look at"),
        ({"metrics": {"top1": "0.5"}}, r"metrics.top1: Input should be a valid number \(got 0.5\)"),
        ({"metrics": {"top1": np.zeros(2)}}, "metrics.top1: Input should be a valid number"),
        ({"metrics": {"top5": 0.5}}, "no headline metric 'top1' among top5"),
        ({"metrics": {}}, "metrics: Dictionary should have at least 1 item"),
        ({"metrics": {"top1": 0.5}, "details": {"of": EXTENDING}}, "PosixPath is no plain value"),
        ({"metrics": {"top1": 0.5}, "details": {(1, 2): 3}}, "keys must be str"),
        ({"metrics": [0.5]}, "a protocol's metrics are list, not values by name; correct it"),
        (None, "protocol 'linear': its score gives NoneType, not Scores; correct it"),
    ],
)
def test_what_is_no_result_is_refused(workspace: Path, scores: dict[str, Any] | None, message: str) -> None:
    kind = replace(KIND, score=lambda features, settings: Scores(**scores) if scores else None)  # type: ignore[arg-type, return-value]
    with pytest.raises((DataError, UsageError), match=message):
        evaluate(kind, LinearSettings(), EvalConfig(run="net.safetensors"), SHARDS, kept=KEPT)
    assert not (workspace / "net").exists()


def test_values_of_numpy_become_plain(workspace: Path) -> None:
    scores = {"metrics": {"top1": np.float32(0.5)}, "details": {"pooled": 3, "curve": np.arange(2)}}
    kind = replace(KIND, score=lambda features, settings: Scores(settings={"k": np.int64(3)}, **scores))
    result = evaluate(kind, LinearSettings(), EvalConfig(run="net.safetensors"), SHARDS, kept=KEPT)
    assert (result.metrics, result.settings["k"]) == ({"top1": 0.5}, 3)
    assert result.details["curve"] == [0, 1]
    assert (result.details["pooled"], result.details["variation"].keys()) == (3, {"train", "test"})
    assert read_result(workspace / "net/eval/linear-bownet-cifar.json") == result


@pytest.mark.parametrize(
    ("part", "given", "message"),
    [
        ("describe", lambda settings: None, "'linear': its describe gives NoneType, not Protocol; correct it"),
        ("describe", lambda settings: named("../../x"), "'../../x' is no id of a protocol; it begins with a letter"),
        ("describe", lambda settings: named(""), "'' is no id of a protocol"),
        ("data", lambda settings, workspace: {}, "its data gives dict, not DataSets"),
        ("data", lambda settings, workspace: uneven(), "a protocol's split has 3 rows and 2 labels; correct it"),
        (
            "data",
            "nowhere:data",
            "nowhere:data cannot be imported: ModuleNotFoundError",
        ),
        (
            "data",
            "json:data",
            "json:data cannot be imported: AttributeError",
        ),
    ],
)
def test_what_a_protocol_gives_is_of_its_type(workspace: Path, part: str, given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(replace(KIND, **{part: given}), LinearSettings(), EvalConfig(run="net.safetensors"), SHARDS)


def named(protocol_id: str) -> Protocol:
    return Protocol(id=protocol_id, version=1, description="", headline="top1")


def uneven() -> LabelledSplit:
    values: dict[str, Any] = {"rows": np.arange(3), "labels": np.zeros(2, int), "classes": (), "fingerprint": ""}
    return LabelledSplit(open=lambda: None, **values)  # type: ignore[arg-type, return-value]


def test_a_kind_has_one_form() -> None:
    both = {name: getattr(KIND, name) for name in ("name", "help", "settings", "describe", "data", "score")}
    with pytest.raises(ValueError, match="protocol 'linear' needs one of score and run"):
        Kind(**both, run="module:run")
