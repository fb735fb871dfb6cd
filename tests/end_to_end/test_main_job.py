"""The commands as users type them, on rendered images."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from voc_devkit import write_devkit

from bowstore.cli import main
from bowstore.data.synthetic import write_images
from bowstore.models.saved import newest_checkpoint
from bowstore.runs import read_metrics
from bowstore.words.store.store import open_store

QUICK = ["--set", "runtime.log_every_steps=1", "--set", "runtime.checkpoint_every_steps=4", "--set", "optim.batch=16"]
SHORT = [*QUICK]
for value in ("optim.epochs=2", "optim.milestones=[1]", "optim.steps_per_epoch=7"):
    SHORT += ["--set", value]
ROTNET = ["train", "--config", "cifar10_rotnet_small.yaml", *SHORT]
NEXT = BOWNET = ["train", *SHORT]  # the next stage of the recipe: the teacher first, from then on BoWNet
ENCODE = ["encode", "--layer", "block3", "--K", "16", "--sample-per-word", "64", "--iterations", "5"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "images"
    write_images(folder, train=120, val=60, size=32, workers=1)
    return folder


@pytest.fixture(scope="module")
def prepared(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with shards, a teacher and a store."""
    folder = tmp_path_factory.mktemp("workspace")
    here = Path.cwd()
    os.chdir(folder)
    try:
        call("init", "--recipe", "cifar10")
        call("shards", images, "data/shards", "--workers", 1)
        call(*NEXT)
        call(*ENCODE)
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "workspace"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def call(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object, code: int = 1) -> str:
    """The one line of an error."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    return lines[0]


def bowstore(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bowstore", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, text=True, env=environment, start_new_session=True, **{**pipes, **options})  # type: ignore[call-overload, no-any-return]


def test_the_four_commands(workspace: Path) -> None:
    assert "finished already" in call(*ROTNET)
    assert "already complete" in call(*ENCODE)
    report = json.loads(call(*BOWNET, "--json"))
    name = "cifar10_bownet_without_cutmix_small"
    assert report["run"] == f"runs/{name}"
    lineage = f"lineage: rotation -> cifar10_rotnet_small -> 16 words of block3 -> {name}\n"
    assert lineage in call("verify", f"runs/{name}")
    assert report["steps"] == 14
    result = json.loads(call("eval", "linear", "--json"))
    assert result["protocol"] == "linear/bownet-cifar"
    assert 0 < result["metrics"]["top1"] <= 1
    assert (workspace / f"runs/{name}/eval/linear-bownet-cifar.json").is_file()
    assert name in call("eval", "linear", "--run", name)
    call("eval", "linear", "--random")
    assert (workspace / f"runs/{name}/random/eval/linear-bownet-cifar.json").is_file()


def test_train_takes_the_recipes_next_stage_or_says_what_it_waits_for(workspace: Path) -> None:
    (workspace / "data/words.zarr").rename(workspace / "words.zarr")
    waits = "stage 'bownet' waits for layer block3 of word store data/words.zarr: make it, `bowstore encode`, or `bow"
    assert waits in refused("train")
    shutil.rmtree(workspace / "runs")
    (workspace / "data/shards").rename(workspace / "shards")
    assert "stage 'rotnet' waits for shards in data/shards/train: make them, `bowstore shards IMAGES" in refused(
        "train"
    )
    (workspace / "bowstore.yaml").unlink()
    assert "give --config CONFIG, or write `recipe: NAME` into bowstore.yaml" in refused("train")


def test_words_of_an_untrained_network_as_typed(workspace: Path) -> None:
    """The network is the one that `eval --random` evaluates; --seed is that of everything random."""
    config = workspace / "configs/untrained.yaml"
    config.write_text((workspace / "configs/cifar10_rotnet_small.yaml").read_text() + "seed: 3\n")
    command = ["encode", "--teacher", "untrained.yaml", "--layer", "block1", "--K", 8, "--pca", 16, "--whiten"]
    layers = []
    for seed, more in ((3, ()), (0, ("--seed", 0))):
        call(*command, "--store", f"seed-{seed}.zarr", *more)
        layers.append(open_store(Path(f"seed-{seed}.zarr")).layer("block1").lineage["teacher"])
        assert layers[-1]["weights_layout"] == f"random, seed {seed}"
    assert "lineage: cifar10_rotnet_small (random, seed 3) -> 8 words of block1\n" in call("verify", "seed-3.zarr")
    drawn = json.loads(call("eval", "linear", "--run", "cifar10_rotnet_small", "--random", "--json"))
    assert layers[0]["weights_sha256"] != drawn["inputs"]["weights_sha256"] == layers[1]["weights_sha256"]
    assert "already complete" in call(*command, "--store", "seed-3.zarr")
    assert "was made with teacher weights" in refused(*command, "--store", "seed-3.zarr", "--seed", 0)
    assert "no configuration file nobody.yaml; those that come" in refused(*command, "--teacher", "nobody.yaml")
    config.write_text("task: rotation\nseeds: 3\n")
    assert "unknown configuration key 'seeds'; did you mean 'seed'?" in refused(*command, code=2)


def test_fewshot_and_knn_as_typed(workspace: Path) -> None:
    line = refused("eval", "fewshot", code=2)
    assert "class bird has 6 images in data/shards/val, and 50 shots with 15 queries need 65; take fewer --qu" in line
    few = ["--shots", 1, "--shots", 2, "--queries", 4, "--episodes", 50]
    result = json.loads(call("eval", "fewshot", *few, "--json"))
    assert result["protocol"] == "fewshot/5way-1-2shot/all"
    assert (workspace / "runs/cifar10_rotnet_small/eval/fewshot-5way-1-2shot-all.json").is_file()
    some = call("eval", "fewshot", *few[:2], *few[4:], "--classes", "PLANE,Boat,car,dog,tree")
    assert "fewshot/5way-1shot/5-classes-" in some
    line = refused("eval", "knn", code=2)
    assert "k 200 is more than the 120 train images of data/shards/train; give --k 120 or fewer" in line
    result = json.loads(call("eval", "knn", "--k", 20, "--temperature", 0.07, "--json"))
    assert result["protocol"] == "knn/k20-t0.07"
    assert 0 < result["metrics"]["top1"] <= result["metrics"]["top5"] <= 1


RECIPE = """
title: as typed
stages:
  data:   {{shards: {{src: {images}}}}}
  rotnet: {{train: cifar10_rotnet_small.yaml, on: data, set: {{{short}}}}}
  words:
    encode: {{layers: [block3], num_words: [16], sample_per_word: 64, iterations: 5}}
    teacher: rotnet
    on: data
  bownet: {{train: cifar10_bownet_small.yaml, words: words, on: data, set: {{{short}}}}}
  linear: {{eval: linear, of: [rotnet, bownet], random: bownet, train: data, test: data}}
"""


@pytest.fixture
def recipe(workspace: Path, images: Path) -> Path:
    """The stages of `prepared` and what follows, as a recipe of the workspace."""
    path = workspace / "configs/recipes/typed.yaml"
    short = ", ".join(value.replace("=", ": ", 1) for value in SHORT[1::2])
    path.write_text(RECIPE.format(images=images, short=short))
    return path


def states(*arguments: object) -> list[str]:
    return [stage["state"] for stage in json.loads(call("run", "typed", "--dry-run", "--json", *arguments))]


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_recipe_goes_on_from_what_was_typed_and_never_mixes_settings(workspace: Path, recipe: Path) -> None:
    before = times(workspace)
    assert states() == ["done", "done", "done", "to do", "to do"]
    assert times(workspace) == before, "a dry run changes nothing"
    result = json.loads(call("run", "typed", "--json"))
    assert list(result["results"]) == ["random network", "rotnet", "bownet"]
    assert result == json.loads((workspace / "runs/typed.recipe.json").read_text())
    descent = ["rotation", "cifar10_rotnet_small", "16 words of block3", "cifar10_bownet_small"]
    assert result["lineage"] == {"rotnet": descent[:2], "bownet": descent}
    assert states() == ["done"] * 5

    before = times(workspace / "runs")
    assert "as typed\n\nprotocol" in call("run", "typed")
    changed = {path.name for path, time in times(workspace / "runs").items() if before.get(path) != time}
    assert changed == {"typed.recipe.json"}, "what is done is not done again"

    differs = "run directory runs/cifar10_rotnet_small holds another configuration (optim.lr is 0.1 there, 0.2 here)"
    for change, words in (
        ("stages.rotnet.set.optim.lr=0.2", differs),
        ("stages.words.encode.num_words=[8]", "layer 'block3' of word store data/words.zarr was made with K 16, not 8"),
        ("stages.data.shards.per_shard=7", "data/shards/train was made with per_shard 4096, not 7"),
    ):
        assert f"{words}; set it back, or give the stage another `" in refused("run", "typed", "--set", change)
        assert words in call("run", "typed", "--dry-run", "--set", change), "a dry run says so, too"
    assert states("--set", "stages.linear.eval=[{linear: {seed: 1}}]")[-1] == "to do"

    by_name = ("stages.words.teacher=null", "stages.words.encode.teacher=cifar10_rotnet_small")
    assert (
        "already complete"
        in invoke("run", "typed", "--stage", "words", "--set", by_name[0], "--set", by_name[1]).stderr
    )
    shutil.rmtree(workspace / "data/words.zarr")
    call(*ENCODE, "--seed", "1")
    assert "was made with seed 1, not 0" in refused("run", "typed")
    words = "runs/cifar10_bownet_small was trained on other words of block3 than word store data/words.zarr holds"
    assert words in refused("run", "typed", "--set", "stages.words.encode.seed=1")


@pytest.mark.slow
def test_kill_9_in_a_recipe_and_again(workspace: Path, recipe: Path) -> None:
    torch.set_num_threads(1)
    whole = json.loads(call("run", "typed", "--json"))["results"]
    shutil.rmtree(workspace / "runs/cifar10_bownet_small")
    for result in workspace.glob("runs/*/eval/*.json"):
        result.unlink()
    for path, lines in (
        ("runs/cifar10_bownet_small/metrics.jsonl", 6),
        ("runs/cifar10_rotnet_small/eval/linear-bownet-cifar.json", 1),
    ):
        process = bowstore("run", "typed")
        wait_for_lines(workspace / path, lines)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert states()[:4] == ["done"] * 4
    assert json.loads(call("run", "typed", "--json"))["results"] == whole


ROUNDS = """
folder: out
runs: runs
stages:
  data: {{shards: {{src: {images}}}, out: ../data/shards}}
  words: {{encode: {{teacher: cifar10_bownet_small.yaml, layers: [block1], pca: 16, whiten: true, {words}}}, on: data,
          store: words.zarr}}
  x1: {{train: cifar10_bownet_small.yaml, name: x1, words: words, on: data, set: {{{short}}}}}
  words2: {{encode: {{layers: [block3], {words}}}, teacher: x1, on: data, store: words2.zarr}}
  x2: {{train: cifar10_bownet_small.yaml, name: x2, words: words2, on: data, set: {{{short}}}}}
  words3: {{encode: {{layers: [block3], {words}}}, teacher: x2, on: data, store: words3.zarr}}
  x3: {{train: cifar10_bownet_small.yaml, name: x3, words: words3, on: data, set: {{{short}}}}}
  table: {{eval: {{knn: {{k: 20}}}}, of: [x1, x2, x3], random: x3, train: data, test: data}}
"""


@pytest.mark.slow
def test_kill_9_in_rounds_and_again(workspace: Path, images: Path) -> None:
    """Killed in every kind of stage, rounds from a random network end as those that were left alone."""
    torch.set_num_threads(1)
    short = ", ".join(value.replace("=", ": ", 1) for value in SHORT[1::2])
    words = "num_words: [16], sample_per_word: 64, iterations: 5"
    (workspace / "configs/recipes/rounds.yaml").write_text(ROUNDS.format(images=images, short=short, words=words))
    for path, lines in (("words.zarr", 0), ("runs/x2/metrics.jsonl", 6), ("runs/x3/random/eval", 0)):
        process = bowstore("run", "rounds")
        wait_for_lines(workspace / "out" / path, lines)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    again = json.loads(call("run", "rounds", "--json"))
    whole = json.loads(call("run", "rounds", "--json", "--out", "whole"))
    assert list(again["results"]) == ["random network", "x1", "x2", "x3"]
    assert again["results"] == whole["results"]
    chain = ["cifar10_bownet_small (random, seed 0)", "16 words of block1", "x1"]
    chain += ["16 words of block3", "x2", "16 words of block3", "x3"]
    assert again["lineage"] == {f"x{n}": chain[: 1 + 2 * n] for n in (1, 2, 3)}
    assert f"lineage: {' -> '.join(chain)}\n" in call("verify", "out/runs/x3")


def test_bench_train(workspace: Path) -> None:
    arguments = ["--config", "cifar10_rotnet_small.yaml", *SHORT[:6], "--steps", 5, "--rounds", 2]
    result = json.loads(call("bench", "train", *arguments, "--json"))
    assert result == json.loads((workspace / "runs/bench/train.json").read_text())
    rates = result["images_per_second"]
    assert len(rates["with the loader"]["rounds"]) == len(rates["resident data"]["rounds"]) == 2
    assert result["ratio_over_resident"] > 0
    assert 0 < result["share_asking"] < 1


def test_voc07_as_typed(workspace: Path) -> None:
    write_devkit(workspace / "data")
    result = json.loads(call("eval", "voc07", "--jobs", 1, "--costs", "vissl", "--json"))
    assert result["protocol"] == "voc07-svm/vissl"
    assert {"map_block2", "map_block3", "map_best"} <= result["metrics"].keys()


def test_verify_names_the_chunk_of_a_flipped_byte(workspace: Path) -> None:
    told = call("verify", "data/words.zarr", "--shards", "data/shards/train")
    assert told.splitlines()[1:] == [
        "lineage: rotation -> cifar10_rotnet_small -> 16 words of block3",
        "no problem found",
    ]
    digest = call("verify", "data/words.zarr", "--digest").splitlines()[-1]
    assert len(digest) == 32
    chunk = workspace / "data/words.zarr/block3/words/c/0/0/0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    result = invoke("verify", "data/words.zarr", "--shards", "data/shards/train")
    assert result.exit_code == 1
    assert "block3/words/c/0/0/0" in result.stdout
    assert "block3/words/c/0/0/0" in refused(*BOWNET)
    assert invoke("verify", "data/words.zarr", "--repair").exit_code == 1
    call(*ENCODE)
    assert call("verify", "data/words.zarr", "--digest").splitlines()[-1] == digest


def test_verify_names_the_shard_of_a_flipped_byte(workspace: Path) -> None:
    assert "180 images in 2 shards" in call("verify", "data/shards")
    tar = workspace / "data/shards/train/train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    result = invoke("verify", "data/shards")
    assert result.exit_code == 1
    assert "train-000000.tar" in result.stdout


def test_a_store_joins_resharded_images_by_key(workspace: Path, images: Path) -> None:
    call("shards", images, "other", "--seed", 7, "--per-shard", 50, "--workers", 1)
    assert "no problem found" in call("verify", "data/words.zarr", "--shards", "other/train")
    call(*BOWNET, "--shards", "other/train", "--name", "resharded")
    first, second = Path("data/shards/train"), Path("other/train")
    from bowstore.data.index import open_index
    from bowstore.words.store.join import join_rows

    store, old, new = open_store(Path("data/words.zarr")), open_index(first), open_index(second)
    assert old.fingerprint != new.fingerprint
    rows = join_rows([store], new)
    assert [old.key(row) for row in rows] == list(new.keys())


def test_a_store_of_other_images_is_refused(workspace: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "more", train=200, val=60, size=32, workers=1)
    call("shards", tmp_path / "more", "more", "--workers", 1)
    message = refused(*BOWNET, "--shards", "more/train", "--name", "x")
    assert "80 of 200 keys of the shards are missing from word store data/words.zarr, for example" in message


def test_mistakes_are_one_line(workspace: Path) -> None:
    (workspace / "empty").mkdir()
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("shards", "nowhere", "out"), 1, "nowhere"),
        (("shards", "empty", "out"), 1, "empty"),
        (("encode", "--layer", "conv4", "--K", "16"), 2, "its layers are conv1, block1, block2, block3"),
        (("encode", "--layer", "block2", "--K", "70000"), 2, "65535"),
        (("encode", "--layer", "block2", "--K", "60000"), 2, "60000"),
        (("encode", "--layer", "block3", "--K", "32"), 1, "K"),
        (("encode", "--layer", "block3", "--K", "16", "--teacher", "nobody"), 1, "runs in runs: cifar10_rotnet_small"),
        (("train", "--config", "nothing.yaml"), 1, "those that come with bowstore"),
        (("train", "--set", "optim.lrr=1"), 2, "did you mean 'lr'?"),
        (("train", "--store", "nowhere.zarr"), 1, "no word store nowhere.zarr"),
        (("eval", "linear", "--run", "nobody"), 1, "no run or file 'nobody'"),
        (("eval", "voc07"), 1, "VOC"),
        (("verify", "nowhere"), 1, "neither a word store nor a folder of indexed shards"),
        (("index", "empty"), 1, "no *.tar file"),
    ]
    for arguments, code, words in cases:
        assert words in refused(*arguments, code=code), arguments
    assert not (workspace / "out").exists()
    assert "is already there" in refused("init", code=2)
    assert "finished already" in call(*ROTNET)


def test_shards_changed_after_indexing_stop_everything(workspace: Path) -> None:
    with open(workspace / "data/shards/train/train-000000.tar", "ab") as file:
        file.write(bytes(1024))
    for command in (ENCODE, BOWNET, ["eval", "linear", "--run", "cifar10_rotnet_small"]):
        assert "changed after indexing" in refused(*command)


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if path.exists() and (not count or len(path.read_text().splitlines()) >= count):
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not reach {count} lines")


@pytest.mark.slow
def test_kill_9_in_training_and_again(workspace: Path) -> None:
    torch.set_num_threads(1)
    call(*BOWNET, "--name", "whole")
    for lines in (6, 11):
        process = bowstore(*BOWNET, "--name", "cut")
        wait_for_lines(workspace / "runs/cut/metrics.jsonl", lines)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    call(*BOWNET, "--name", "cut")  # a process of its own has gone on after the first kill
    whole, cut = newest_checkpoint(Path("runs/whole")), newest_checkpoint(Path("runs/cut"))
    assert whole is not None
    assert cut is not None
    for part in ("backbone", "head"):
        assert all(torch.equal(cut[part][name], value) for name, value in whole[part].items())
    assert [line["order"] for line in read_metrics(Path("runs/cut"))] == [
        line["order"] for line in read_metrics(Path("runs/whole"))
    ]


@pytest.mark.slow
def test_two_ranks_see_the_order_of_one(workspace: Path) -> None:
    call(*BOWNET, "--name", "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    done = subprocess.run(
        [*command, "-m", "bowstore", *BOWNET, "--name", "two"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    one, two = read_metrics(Path("runs/one")), read_metrics(Path("runs/two"))
    assert [line["order"] for line in two] == [line["order"] for line in one]
    assert np.allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=0.2)
    assert json.loads(Path("runs/two/environment.json").read_text())["world_size"] == 2
