"""A workspace that grows: further images under the same words, by the commands alone."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from shard_sets import ShardMaker

from bowstore.cli import main
from bowstore.models.saved import network_of, save_backbone
from bowstore.runs import read_lineage, read_metrics

VIEW = {"size": 16, "resize": 16}
MODEL = {"arch": "wrn-10-1", "strides": [2, 2, 1]}
TRAIN = {
    "task": "words",
    "view": VIEW,
    "model": MODEL,
    "optim": {"batch": 16, "epochs": 1, "steps_per_epoch": 2},
    "runtime": {"log_every_steps": 1, "threads": 1, "device": "cpu"},
}
TEACHER = ("--teacher", "teacher.safetensors", "--device", "cpu")
PARTS = ("--shards", "a/train", "--shards", "b/train")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def call(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object, code: int = 2) -> str:
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    return result.stderr.splitlines()[-1]


def learned(run: str) -> list[dict[str, float]]:
    return [{**line, "images_per_second": 0, "wait_share": 0} for line in read_metrics(Path("runs") / run)]


@pytest.fixture
def workspace(make_shard_set: ShardMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards a and b, the teacher, a store of each under one vocabulary, and one of both."""
    monkeypatch.chdir(tmp_path)
    make_shard_set(32, per_shard=16, folder="a/train")
    make_shard_set(16, per_shard=8, folder="b/train", first=32)
    make_shard_set(8, folder="a/val", first=48)
    teacher = {"name": "t", "task": "rotation", "view": {**VIEW, "cutmix": False}, "model": MODEL}
    network = network_of(teacher, "test")
    save_backbone(Path("teacher.safetensors"), network.fresh(), network)
    Path("train.yaml").write_text(yaml.safe_dump(TRAIN))
    call(
        "encode", "--layer", "block3", "--K", 8, "--iterations", 2, *TEACHER, "--shards", "a/train", "--store", "a.zarr"
    )
    call("encode", "--vocabulary", "a.zarr", *TEACHER, "--shards", "b/train", "--store", "b.zarr")
    call("encode", "--vocabulary", "a.zarr", *TEACHER, *PARTS, "--store", "both.zarr")


def test_growth_by_flags_and_by_the_workspace_learns_the_same(workspace: None) -> None:
    call("train", "--config", "train.yaml", "--name", "one", *PARTS, "--store", "both.zarr")
    call("train", "--config", "train.yaml", "--name", "flags", *PARTS, "--store", "a.zarr", "--store", "b.zarr")
    lists = {"shards": ["a/train", "b/train"], "store": ["a.zarr", "b.zarr"]}
    Path("bowstore.yaml").write_text(yaml.safe_dump(lists))
    call("train", "--config", "train.yaml", "--name", "lists")
    assert learned("flags") == learned("lists") == learned("one")
    recorded = yaml.safe_load(Path("runs/lists/config.yaml").read_text())
    assert (recorded["shards"], recorded["task"]["store"]) == (lists["shards"], lists["store"])
    assert "finished already" in call("train", "--config", "train.yaml", "--name", "lists")
    one, both = (read_lineage(Path("runs") / name) for name in ("one", "lists"))
    assert one
    assert both
    assert one["inputs"] == both["inputs"]
    assert both["targets"]["store"] == "a.zarr, b.zarr"
    # As one path, where there is one.
    assert yaml.safe_load(Path("runs/one/config.yaml").read_text())["task"]["store"] == "both.zarr"

    assert "no problem found" in call("verify", "both.zarr", *PARTS)
    report = json.loads(call("eval", "linear", "--run", "runs/lists", "--device", "cpu", "--json"))
    assert report["settings"]["images"] == {"train": 48, "test": 8}
    named = ("eval", "knn", "--k", 2, "--run", "runs/lists", "--device", "cpu", "--test", "a/val", "--json")
    report = json.loads(call(*named, "--train", "a/train", "--train", "b/train"))
    assert report["settings"]["images"] == {"train": 48, "test": 8}

    asked = "bowstore.yaml names 2 stores, a.zarr, b.zarr; name the one "
    assert refused("encode", "--layer", "block3", "--K", 8, *TEACHER) == f"Error: {asked}to write by --store"
    assert refused("bench", "store") == f"Error: {asked}to read by --store"
    assert refused("words") == f"Error: {asked}whose words are shown, as STORE"
    plan = refused("run", "cifar10", "--dry-run")
    assert "names 2 folders of shards, a/train, b/train; name the one that this stage makes, as in `out: a`" in plan


def test_growth_of_shards_or_stores_alone_is_refused(workspace: None) -> None:
    run = ("train", "--config", "train.yaml")
    line = refused(*run, *PARTS, "--store", "a.zarr", code=1)
    assert line.startswith(
        "Error: 16 of 48 keys of the shards are missing from word store a.zarr, for example c0/00032,"
    )
    line = refused(*run, *PARTS, "--store", "a.zarr", "--store", "both.zarr", code=1)
    assert line.startswith(
        "Error: 32 of 48 keys of the shards are more than once in word store a.zarr, both.zarr, for "
    )
    line = refused(*run, "--shards", "a/train", "--shards", "a/train", "--store", "a.zarr", code=1)
    assert line.startswith("Error: 32 of 64 keys are in more than one of a/train, a/train, for example c0/00000, ")
    line = refused(*run, "--shards", "a/train", "--set", "shards=[]")
    assert "--set 'shards=[]'" in line
    line = refused(*run, "--store", "a.zarr", "--set", "shards=[]")
    assert line.startswith("Error: train.yaml: shards: ")
