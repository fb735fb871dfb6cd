"""`bowstore eval` of networks that are no runs: an architecture with anybody's weights file, or random."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from shard_sets import ShardMaker

from bowstore import runs
from bowstore.cli import main
from bowstore.config import ModelConfig, Workspace
from bowstore.data.pipeline import clean_batches
from bowstore.data.views import clean_view
from bowstore.errors import UsageError
from bowstore.evaluate import kept
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.protocol import DataSets, Network, Scores
from bowstore.evaluate.protocols.linear import KIND, LinearSettings
from bowstore.evaluate.runner import evaluate
from bowstore.evaluate.train_test import open_train_test
from bowstore.models.library import library_view
from bowstore.models.opened import resized
from bowstore.models.registry import build_backbone
from bowstore.models.saved import load_backbone, network_of, save_backbone
from bowstore.models.weights import weights_sha256
from bowstore.workspace import newest_run

PLUGIN = Path(__file__).parents[1] / "extending/class_means.py"
NET = "timm:test_resnet"


@pytest.fixture
def workspace(make_shard_set: ShardMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Labelled shards, a run's network and somebody's weights."""
    make_shard_set(24, folder="train", classes=2)
    make_shard_set(8, folder="test", classes=2, first=24)
    (tmp_path / "bowstore.yaml").write_text(f"shards: train\nval_shards: test\nplugins: [{PLUGIN}]\n")
    of_run = {"name": "r", "task": "words", "seed": 4, "view": {"size": 16, "resize": None, "cutmix": True}}
    network = network_of({**of_run, "model": {"arch": "wrn-10-1", "strides": [2, 2, 1]}}, "test")
    save_backbone(tmp_path / "net.safetensors", network.fresh(), network)
    torch.manual_seed(7)
    theirs = build_backbone(ModelConfig(arch=NET))
    state = {f"module.{name.removeprefix('network.')}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"state_dict": {**state, "module.fc.weight": torch.ones(2, 2)}}, tmp_path / "theirs.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["eval", *arguments])


def measured(*arguments: str) -> tuple[dict[str, Any], str]:
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), done.stderr


def test_anybodys_weights(workspace: Path) -> None:
    result, told = measured("class-means", "--arch", NET, "--weights", "theirs.pth", "--size", "32")
    torch.manual_seed(7)
    theirs = build_backbone(ModelConfig(arch=NET)).eval()
    assert result["inputs"] | {"train": "", "test": "", "dataset": None} == {
        "train": "", "test": "", "dataset": None,
        "run": f"{NET} (theirs.pth) at 32 px",
        "arch": NET,
        "weights_file": "theirs.pth",
        "weights_layout": "timm names in state_dict behind 'module.', without fc",
        "weights_sha256": weights_sha256(theirs.state_dict()),
    }  # fmt: skip
    assert "theirs.pth: timm names in state_dict behind 'module.', without fc" in told
    view = resized(library_view(NET), 32)
    assert result["settings"]["view"] == {
        "size": 32, "resize": view.resize, "squash": False, "mean": list(view.mean), "std": list(view.std)
    }  # fmt: skip
    (file,) = (workspace / "networks").glob("timm-test_resnet-theirs-????????/32px/eval/class-means-euclidean.json")
    assert json.loads(file.read_text()) == result
    assert f"the result lies in {file.relative_to(workspace)}" in told
    # The features are those of the network itself, seen through its own view.
    data = open_train_test(LinearSettings(train=Path("train"), test=Path("test")), Workspace())
    pooled: dict[str, Any] = {}
    for name, split in data.splits.items():
        images = clean_batches(split.open(), clean_view(view), split.rows, batch=8, device=torch.device("cpu"))
        with torch.no_grad():
            pooled[name] = np.concatenate([theirs(images_BCHW).numpy() for _, images_BCHW in images])
    means = np.stack([pooled["train"][data["train"].labels == k].mean(axis=0) for k in range(2)])
    nearest = np.square(pooled["test"][:, None] - means).sum(axis=2).argmin(axis=1)
    assert result["metrics"]["top1"] == (nearest == data["test"].labels).mean()


def test_a_file_of_another_content_has_a_folder_of_its_own_and_none_is_a_run(workspace: Path) -> None:
    here, other = workspace / "theirs.pth", workspace / "other"
    other.mkdir()
    state = torch.load(here)
    state["state_dict"]["module.fc.weight"] += 1  # a head that is not used: the same backbone
    torch.save(state, other / "theirs.pth")
    folders = [runs.network_folder(Path("networks"), NET, weights=path, seed=0) for path in (here, other / here.name)]
    assert folders[0] != folders[1]
    assert folders[0] == runs.network_folder(Path("networks"), NET, weights=here, seed=1)
    odd = workspace / f"a b{'c' * 200}.pth"
    odd.write_bytes(b"")
    assert len(runs.network_folder(Path(), "timm:x", weights=odd, seed=0).name) < 120
    assert runs.network_folder(Path(), "timm:x", weights=odd, seed=0).name.startswith("timm-x-a-bccc")
    measured("class-means", "--arch", "wrn-10-1", "--size", "16")
    assert [path.name for path in (workspace / "networks").iterdir()] == ["wrn-10-1-seed-0"]
    assert runs.below(workspace / "networks") == runs.finished_below(workspace / "networks") == []
    with pytest.raises(Exception, match="no finished run in networks"):
        newest_run(Workspace(runs=Path("networks")))
    assert (
        "wrn-10-1-seed-0/16px is not a run directory"
        in call("class-means", "--run", "networks/wrn-10-1-seed-0/16px").stderr
    )
    done = CliRunner().invoke(main, ["compare", "wrn-10-1-seed-0/16px"])
    assert "class-means/euclidean v1" in done.stdout


def test_without_weights_it_is_random_from_the_seed(workspace: Path) -> None:
    (zero, told), (one, _), (again, _) = (
        measured("class-means", "--arch", "wrn-10-1", "--size", "16", *seed)
        for seed in ([], ["--seed", "1"], ["--seed", "0"])
    )
    assert "wrn-10-1: no weights file was named; its weights are random, of seed 0" in told
    sha256s = [result["inputs"]["weights_sha256"] for result in (zero, one, again)]
    assert sha256s[0] == sha256s[2] != sha256s[1]
    assert (one["inputs"]["run"], one["inputs"]["weights_file"], one["inputs"]["weights_layout"]) == (
        "wrn-10-1 (random, seed 1) at 16 px", None, "random, seed 1"
    )  # fmt: skip
    assert {path.name for path in (workspace / "networks").iterdir()} == {"wrn-10-1-seed-0", "wrn-10-1-seed-1"}


def test_a_runs_own_file_under_its_architecture_is_the_run(workspace: Path) -> None:
    run, _ = measured("class-means", "--run", "net.safetensors")
    arch, told = measured("class-means", "--arch", "wrn-10-1", "--weights", "net.safetensors")
    assert "net.safetensors: bowstore names" in told
    assert arch["inputs"]["weights_sha256"] == run["inputs"]["weights_sha256"]
    assert (arch["metrics"], arch["details"]) == (run["metrics"], run["details"])
    assert arch["settings"] == run["settings"]  # strides and view are those that the file records


def test_a_run_at_another_size_has_results_of_its_own(workspace: Path) -> None:
    own, _ = measured("class-means", "--run", "net.safetensors", "--size", "16")
    larger, _ = measured("class-means", "--run", "net.safetensors", "--size", "24")
    random, _ = measured("class-means", "--run", "net.safetensors", "--size", "24", "--random")
    assert [it["inputs"]["run"] for it in (own, larger, random)] == ["r", "r at 24 px", "r (random) at 24 px"]
    assert random["inputs"]["weights_layout"] == "random, seed 4"
    assert [it["settings"]["view"]["size"] for it in (own, larger)] == [16, 24]
    for folder, result in {"": own, "24px/": larger, "random/24px/": random}.items():
        assert json.loads((workspace / f"net/{folder}eval/class-means-euclidean.json").read_text()) == result
    assert len(runs.all_result_paths(workspace / "net.safetensors")) == 3


def test_whatever_changes_never_meets_features_that_are_kept(
    workspace: Path, make_shard_set: ShardMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "LARGE_BYTES", 1)
    with (workspace / "bowstore.yaml").open("a") as file:
        file.write("storage: {cache: cache}\n")
    network = ("class-means", "--arch", "wrn-10-1", "--weights", "net.safetensors")
    seen: set[str] = set()

    def taken(*arguments: str) -> int:
        """How many feature sets were taken anew."""
        measured(*network, *arguments)
        there = {path.name for path in (workspace / "cache/features").glob("[!.]*.npy")}
        new = len(there - seen)
        seen.update(there)
        return new

    assert (taken(), taken()) == (2, 0)
    assert taken("--dtype", "float16") == 2
    assert taken("--size", "24") == 2
    test = workspace / "test"
    shutil.rmtree(test)
    make_shard_set(8, folder="test", classes=2, first=25)  # seven images stay, and one is another
    assert taken() == 1
    loaded = load_backbone(workspace / "net.safetensors")
    with torch.no_grad():
        next(loaded.backbone.parameters()).view(-1)[0] += 1e-6
    save_backbone(workspace / "net.safetensors", loaded.backbone, loaded.saved)
    assert taken() == 2


def test_a_configuration_is_the_network_that_it_starts_from(workspace: Path) -> None:
    (workspace / "mine.yaml").write_text(
        "name: mine\ntask: rotation\nseed: 5\nmodel: {arch: wrn-10-1}\nview: {size: 16, resize: 16, cutmix: false}\n"
    )
    result, _ = measured("class-means", "--run", "mine.yaml")
    assert (result["inputs"]["run"], result["inputs"]["arch"]) == ("mine (random, seed 5)", "wrn-10-1")
    assert (workspace / "networks/mine-seed-5/eval/class-means-euclidean.json").is_file()


def test_what_trains_gets_the_same_network_and_one_seed_draws_all(workspace: Path) -> None:
    given: list[Network] = []

    def run(network: Network, *_: Any) -> Scores:
        given.append(network)
        return Scores(metrics={"top1": 0.5})

    shards = Workspace(shards=Path("train"), val_shards=Path("test"))
    kind = replace(KIND, score=None, run=run)
    result = evaluate(kind, LinearSettings(seed=3), EvalConfig(arch="wrn-10-1", size=16), shards)
    torch.manual_seed(3)
    drawn = build_backbone(ModelConfig(arch="wrn-10-1")).state_dict()
    assert result.inputs["weights_sha256"] == weights_sha256(drawn) == weights_sha256(given[0].backbone.state_dict())
    assert (given[0].view.size, given[0].view.resize, given[0].view.cutmix) == (16, 18, True)
    assert result.settings["view"]["size"] == 16
    assert call("linear", "--help").output.count("--seed") == 1


def test_a_protocol_may_fix_the_size(workspace: Path) -> None:
    def data(settings: LinearSettings, given: Workspace) -> DataSets:
        return replace(open_train_test(settings, given), view={"size": 24, "resize": 24})

    kind = replace(KIND, data=data, score=lambda features, settings: Scores(metrics={"top1": 0.5}))
    shards = Workspace(shards=Path("train"), val_shards=Path("test"))
    with pytest.raises(UsageError, match=r"eval linear has a size of its own, 24 pixels; leave --size 32 out"):
        evaluate(kind, LinearSettings(), EvalConfig(arch="wrn-10-1", size=32), shards)
    result = evaluate(kind, LinearSettings(), EvalConfig(arch="wrn-10-1", size=24), shards)
    assert result.settings["view"]["size"] == 24
    assert (workspace / "networks/wrn-10-1-seed-0/eval/linear-bownet-cifar.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--arch", "resnet5"], 2, "model.arch 'resnet5' is unknown; did you mean 'resnet50'? known: "),
        (["--arch", "timm:test_resne"], 2, "did you mean 'timm:test_resnet'?"),
        (
            ["--arch", NET, "--run", "net.safetensors"],
            2,
            f"run net.safetensors and arch {NET} are two networks; leave one",
        ),
        (["--arch", NET, "--random"], 2, f"--random is the initialisation of a run's network, and {NET} is no run"),
        (["--arch", NET, "--weights", "none.pth"], 1, "no weights file none.pth"),
        (["--arch", "resnet18", "--weights", "theirs.pth"], 1, "theirs.pth does not fit resnet18: "),
        (["--run", "net.safetensors", "--weights", "theirs.pth"], 2, "weights theirs.pth go with an architecture"),
        (["--weights", "theirs.pth"], 2, "weights theirs.pth do not say of which network they are; give --arch, too"),
        (["--run", "theirs.pth"], 1, "go with an architecture: --arch timm:NAME --weights theirs.pth"),
        (["--run", "net.safetensors", "--seed", "1"], 2, "--seed 1 is of random weights of --arch, and r has others"),
        (["--arch", NET, "--weights", "theirs.pth", "--seed", "1"], 2, "--seed 1 is of random weights of --arch, and "),
    ],
)
def test_what_names_no_network_is_one_line(workspace: Path, arguments: list[str], code: int, message: str) -> None:
    done = call("class-means", *arguments)
    assert done.exit_code == code
    assert message in done.stderr.splitlines()[-1]
    assert not (workspace / "networks").exists()


def test_layers_takes_a_run_too(workspace: Path) -> None:
    def layers(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["layers", *arguments])

    shown = json.loads(layers("net.safetensors", "--json").stdout)
    assert (shown["arch"], shown["size"]) == ("wrn-10-1", 16)
    assert [layer["grid"] for layer in shown["layers"] if layer["name"] == "block1"] == [[8, 8]]  # its strides
    assert json.loads(layers("net.safetensors", "--size", "32", "--json").stdout)["size"] == 32
    refused = layers("net.safetensors", "--strides", "1", "2", "2")
    assert "--strides are those that net.safetensors was trained with; leave them out" in refused.stderr


def test_a_teacher_may_be_named_by_arch(workspace: Path) -> None:
    arguments = ["encode", "--arch", NET, "--weights", "theirs.pth", "--size", "32", "--layer", "none", "--K", "4"]
    done = CliRunner().invoke(main, [*arguments, "--store", "words.zarr"])
    understood, refused = done.stderr.splitlines()
    assert understood.startswith("theirs.pth: timm names in state_dict")
    assert refused.startswith(f"Error: {NET} has no layer 'none'; its layers are ")
