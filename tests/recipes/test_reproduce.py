"""The paper's tables made anew, on rendered images: what runs, what is shown, what is refused."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import scipy.stats
from click.testing import CliRunner, Result
from servers import serve

from bowstore.cli import main
from bowstore.config import Workspace
from bowstore.data.downloads import DOWNLOADS
from bowstore.data.synthetic import CLASSES, write_images
from bowstore.errors import MissingError, UsageError
from bowstore.evaluate.claims import claims
from bowstore.evaluate.results import paper_tables
from bowstore.files import exclusive_lock, read_json
from bowstore.recipes.datasets import describe_data
from bowstore.recipes.evaluate import RANDOM, EvalStage
from bowstore.recipes.file import bundled_recipes, load_recipe
from bowstore.recipes.reproduce import Job, evaluated, prepare

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
RECIPE = """
title: tiny
folder: reproduce
runs: "seed-{seed}/runs"
result: "seed-{seed}/table1_small.json"
stages:
  images:  {download: cifar10, out: data}
  cifar10: {shards: {workers: 1}, images: images, out: data/cifar10}
  RotNet:
    train: cifar10_rotnet_small.yaml
    on: cifar10
    name: rotnet
    set: &short
      optim: {epochs: 1, milestones: [], warmup_epochs: 0, steps_per_epoch: 3, batch: 8}
      runtime: {checkpoint_every_steps: 1, log_every_steps: 1}
  words:
    encode: {layers: [block3], num_words: [8], iterations: 2, sample_per_word: 64}
    teacher: RotNet
    on: cifar10
    store: "seed-{seed}/words.zarr"
  BoWNet: {train: cifar10_bownet_small.yaml, name: bownet, on: cifar10, words: words, set: *short}
  "BoWNet, linear head": {train: cifar10_bownet_small.yaml, name: lin, on: cifar10, words: words, set: *short}
  linear:
    eval: [linear, {fewshot: {shots: [1, 2], queries: 2, episodes: 20}}]
    of: [RotNet, BoWNet, "BoWNet, linear head"]
    random: BoWNet
    train: cifar10
    test: cifar10
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a recipe of three rows, and images that have the classes of CIFAR-10."""
    folder = tmp_path_factory.mktemp("prepared")
    write_images(folder / "data/cifar10", train=60, val=40, size=32, workers=1)
    (folder / "data/cifar10/.bowstore-synthetic.json").unlink(missing_ok=True)
    for split in ("train", "val"):
        for ours, theirs in zip(CLASSES, CIFAR10, strict=True):
            (folder / "data/cifar10" / split / ours).rename(folder / "data/cifar10" / split / theirs)
    (folder / "configs/recipes").mkdir(parents=True)
    (folder / "configs/recipes/table1_small.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows of two seeds, of which one was killed while it trained."""
    folder = tmp_path_factory.mktemp("finished") / "w"
    shutil.copytree(prepared, folder)
    command = [sys.executable, "-m", "bowstore", "reproduce", "table1", "--small", "--rows", "RotNet"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    run = folder / "reproduce/seed-0/runs/rotnet"
    try:
        while not list(run.glob("checkpoints/step-*.pt")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    here = Path.cwd()
    os.chdir(folder)
    try:
        done = invoke("--rows", "RotNet,BoWNet", "--seeds", "0,1", "--rows", "random network")
    finally:
        os.chdir(here)
    assert done.exit_code == 0, done.output
    (folder / "shown.txt").write_text(done.stdout)
    (folder / "said.txt").write_text(done.stderr)
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["reproduce", "table1", "--small", *map(str, arguments)])


def refused(*arguments: str, code: int = 2) -> str:
    result = CliRunner().invoke(main, ["reproduce", *arguments])
    assert result.exit_code == code, result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


def row_of(value: dict[str, Any], protocol: str, row: str) -> dict[str, Any]:
    part = next(part for part in value["parts"] if part["here"] and part["here"]["protocol"] == protocol)
    return next(line for line in part["rows"] if line["row"] == row)


def test_rows_that_were_asked_for_are_run_and_shown_beside_the_papers(finished: Path) -> None:
    value = read_json(finished / "reproduce/table1_small.json")
    assert value["seeds"] == [0, 1]
    assert not (finished / "reproduce/seed-0/runs/lin").exists()  # a row that nobody asked for
    for row, name in (("RotNet", "rotnet"), ("BoWNet", "bownet"), ("random network", "bownet/random")):
        line = row_of(value, "linear/bownet-cifar", row)
        files = [finished / f"reproduce/seed-{seed}/runs/{name}/eval/linear-bownet-cifar.json" for seed in (0, 1)]
        found = [100 * read_json(file)["metrics"]["top1"] for file in files]
        assert list(line["here"]["top1"]["by_seed"].values()) == found
        assert line["here"]["top1"]["mean"] == pytest.approx(np.mean(found))
        low, _ = scipy.stats.t.interval(0.95, 1, np.mean(found), scipy.stats.sem(found) or 1e-300)
        assert line["here"]["top1"]["half"] == pytest.approx(np.mean(found) - low, abs=1e-9)
    assert row_of(value, "linear/bownet-cifar", "BoWNet")["paper"] == {"top1": 71.5}
    quoted = row_of(value, "linear/bownet-cifar", "AMDIM")
    assert (quoted["here"], quoted["paper"]) == ({}, {"top1": 70.2})
    assert quoted["absent"].startswith("quoted only: a larger network")
    assert row_of(value, "fewshot/5way-1-2shot/all", "BoWNet")["paper"] == {"1-shot": 69.1}
    assert value["absent"]["BoWNet x2"] == "table1_small does not evaluate it"
    part = next(part for part in value["parts"] if part["here"]["protocol"] == "linear/bownet-cifar")
    assert part["here"]["images"] == f"cifar10 ({part['here']['tested_on']})"
    assert part["paper"]["dataset"] == "cifar100"
    assert not part["paper"]["comparable"]
    assert value["remarks"][0] == "cifar10: 60 train and 40 test images"
    assert value["training_minutes"].keys() == {"RotNet", "BoWNet"}


def test_claims_are_tested_on_differences_of_the_same_seed(finished: Path) -> None:
    value = read_json(finished / "reproduce/table1_small.json")
    claims = {claim["says"]: claim for claim in value["claims"]}
    found = {test["metric"]: test for test in claims["BoWNet is better than RotNet"]["tests"]}
    assert found.keys() == {"1-shot", "top1"}  # of 5, 10 and 50 shots there is nothing here
    for metric, protocol in (("1-shot", "fewshot/5way-1-2shot/all"), ("top1", "linear/bownet-cifar")):
        first, second = (row_of(value, protocol, row)["here"][metric]["by_seed"] for row in ("BoWNet", "RotNet"))
        difference = [first[seed] - second[seed] for seed in ("0", "1")]
        assert found[metric]["mean"] == pytest.approx(np.mean(difference))
    assert (found["top1"]["paper"], found["1-shot"]["paper"]) == (11.2, 10.8)
    assert claims["BoWNet is better than RotNet by at least 10 points"]["above"] == 10
    assert claims["BoWNet is better than AMDIM"]["holds"] == "not tested"
    assert (
        claims["BoWNet is better than AMDIM"]["why"] == "AMDIM: quoted only: a larger network of its authors' own make"
    )
    assert claims["a second round improves BoWNet"]["why"] == "BoWNet x2: table1_small does not evaluate it"


def test_the_table_says_how_to_read_it(finished: Path) -> None:
    shown, said = (finished / "shown.txt").read_text(), (finished / "said.txt").read_text()
    assert "seeds 0, 1; mean ± half the 95 % interval" in shown
    assert "other images: compare the order of rows, not the figures" in shown
    assert max(map(len, shown.splitlines())) < 180
    assert "table1_small, seed 1 (2 of 2): BoWNet (stage 5 of 6)" in said
    assert "train rotnet from step" in said  # what was killed goes on
    assert "Fewer than three seeds decide little" in shown


def test_all_seeds_that_lie_there_are_in_the_table(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    before = read_json(Path("reproduce/table1_small.json"))
    result = invoke("--rows", "RotNet", "--json")
    assert json.loads(result.stdout) == before == read_json(Path("reproduce/table1_small.json"))
    assert "train rotnet" not in result.stderr
    assert "cifar10: 60 train and 40 test images" in result.stderr
    lines = list(csv.DictReader(invoke("--rows", "RotNet", "--csv").stdout.splitlines()))
    (line,) = [it for it in lines if (it["row"], it["metric"]) == ("RotNet", "top1")]
    assert float(line["mean"]) == row_of(before, "linear/bownet-cifar", "RotNet")["here"]["top1"]["mean"]
    assert (line["n"], line["paper"], line["comparable"]) == ("2", "60.3", "False")
    assert "| BoWNet x2 | - | - | - | 74.1 | table1_small does not evaluate it |" in invoke("--markdown").stdout


def test_results_of_other_settings_are_refused(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    recipe = Path("configs/recipes/table1_small.yaml")
    recipe.write_text(RECIPE.replace("batch: 8", "batch: 4"))
    line = refused("table1", "--small", code=1)
    assert "holds another configuration (optim.batch is 8 there, 4 here)" in line
    # Of seeds that were not asked for nothing is in the table, with the reason.
    value = json.loads(invoke("--seeds", "2", "--rows", "RotNet", "--json").stdout)
    assert value["seeds"] == [2]
    told = "seed 0, RotNet: left out of the table: run directory reproduce/seed-0/runs/rotnet holds an"
    assert len([line for line in value["remarks"] if line.startswith(told)]) == 1


def test_what_was_made_of_results_of_other_settings_is_left_out(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    Path("configs/recipes/table1_small.yaml").write_text(RECIPE.replace("num_words: [8]", "num_words: [9]"))
    told = invoke("--rows", "RotNet", "--json")
    value = json.loads(told.stdout)
    assert value["seeds"] == [0, 1]
    assert row_of(value, "linear/bownet-cifar", "RotNet")["here"]["top1"]["n"] == 2
    assert row_of(value, "linear/bownet-cifar", "random network")["here"]["top1"]["n"] == 2
    assert row_of(value, "linear/bownet-cifar", "BoWNet")["here"] == {}  # by eight words, with the configuration of now
    (line,) = [it for it in value["remarks"] if it.startswith("seed 1, ")]
    assert line.startswith("seed 1, BoWNet: left out of the table: layer 'block3' of word store reproduce/seed-1/words")
    assert line.endswith("was made with K 8, not 9")


def test_results_of_other_versions_are_not_averaged_together(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    path = Path("reproduce/seed-1/runs/rotnet/eval/linear-bownet-cifar.json")
    path.write_text(json.dumps(read_json(path) | {"protocol_version": 0}))
    value = json.loads(invoke("--seeds", "0", "--rows", "RotNet", "--json").stdout)
    assert list(row_of(value, "linear/bownet-cifar", "RotNet")["here"]["top1"]["by_seed"]) == ["0"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tabel1"], "no table 'tabel1' in the paper; did you mean 'table1'?"),
        (["x"], "no table 'x' in the paper; there are table1; table2; table3; table4; table5; table6"),
        (["table1", "--small", "--seeds", "0,0"], "names 0 twice, which would pass for two runs; name each once"),
        (["table1", "--small", "--seeds", "-1"], "'-1' is no seed from 0 to 4294967295; write 0,1,2 for three"),
        (["table1", "--small", "--seeds", "0,a"], "'a' is no seed"),
        (["table1", "--small", "--seeds", "0,"], "'' is no seed"),
        (["table1", "--small", "--seeds", "4294967296"], "'4294967296' is no seed"),
        (["table1", "--small", "--rows", "RotNet,BowNet"], "has no row 'BowNet'; did you mean 'BoWNet'?"),
        (["table1", "--small", "--rows", "AMDIM"], "is only quoted (a larger network of its authors' own make)"),
        (["table1", "--small", "--data", "cifra10=data"], "names no data set of the table; did you mean 'cifar10'?"),
    ],
)
def test_what_cannot_be_meant_is_refused(workspace: Path, arguments: list[str], told: str) -> None:
    assert told in refused(*arguments)
    assert not Path("reproduce").exists()


def test_a_row_may_have_a_comma_in_its_name(workspace: Path) -> None:
    result = invoke("--rows", "RotNet,BoWNet, linear head", "--dry-run", "--json")
    (stages,) = json.loads(result.stdout).values()
    assert [stage["stage"] for stage in stages] == ["cifar10", "RotNet", "words", "BoWNet, linear head", "linear"]


def test_without_images_it_says_what_to_fetch(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(_folder: Path) -> None:
        raise OSError("no network")

    shutil.move("data/cifar10", "images")
    monkeypatch.setattr("bowstore.data.downloads.DOWNLOADS", downloads := _offline(offline))
    monkeypatch.setattr("bowstore.recipes.datasets.DOWNLOADS", downloads)
    line = refused("table1", "--small", code=1)
    assert "cannot download cifar10 to reproduce/data: no network; fetch it where there is a network, `bowstore" in line
    assert "data download cifar10 data`, and put it into data/cifar-10-python.tar.gz, or name it: --data cif" in line
    assert "--data nowhere: nowhere is not there" in refused("table1", "--small", "--data", "nowhere", code=1)


def _offline(fetch: Any) -> dict[str, Any]:
    return {name: replace(download, fetch=fetch) for name, download in DOWNLOADS.items()}


def test_data_are_found_where_they_lie(workspace: Path) -> None:
    def shards_stage(stages: list[dict[str, Any]]) -> tuple[str, str]:
        data = next(stage for stage in stages if stage["stage"] == "cifar10")
        return data["reads"][0], data["writes"][0]

    def source(*arguments: str) -> tuple[str, str]:
        (stages,) = json.loads(invoke("--rows", "RotNet", "--dry-run", "--json", *arguments).stdout).values()
        found = shards_stage(stages)
        if not arguments:  # the recipe alone, whose runs lie in the same places, takes the same images
            run = CliRunner().invoke(main, ["run", "table1_small", "--dry-run", "--json"])
            assert shards_stage(json.loads(run.stdout)) == found
        return found

    images, shards = str(workspace / "data/cifar10"), "reproduce/data/cifar10"
    assert source() == (images, shards)
    assert source("--data", "data/cifar10") == (images, shards)
    shutil.move(images, "else where")
    assert source() == ("reproduce/data/cifar-10-python.tar.gz", shards)
    assert source("--data", "cifar10=else where") == (str(workspace / "else where"), shards)
    made = ["shards", "else where", "data/shards", "--workers", "1", "--per-shard", "30"]
    assert CliRunner().invoke(main, made).exit_code == 0
    ours = str(workspace / "data/shards")
    assert source()[1] == source("--data", "data/shards")[1] == source("--data", "data/shards/train")[1] == ours
    shutil.move("data/shards", "data/cifar10")
    assert source()[1] == images
    set_here = ["--set", "stages.cifar10.images=null", "--set", "stages.cifar10.shards.src=else where"]
    run = CliRunner().invoke(main, ["run", "table1_small", "--dry-run", "--json", *set_here])
    assert shards_stage(json.loads(run.stdout)) == ("else where", shards)


def test_shards_behind_a_url_are_taken_as_they_are(workspace: Path) -> None:
    made = ["shards", "data/cifar10", "served/cifar10", "--workers", "1"]
    assert CliRunner().invoke(main, made).exit_code == 0
    shutil.move("served/cifar10/val", "served/cifar10/test")
    shutil.move("data/cifar10", "images")  # which nobody makes shards of
    Path("bowstore.yaml").write_text("storage: {cache: cache}\n")
    with serve(Path("served")) as server:
        data = ["--data", f"{server.url}/cifar10"]
        (stages,) = json.loads(invoke("--dry-run", "--json", *data).stdout).values()
        assert stages[-1]["reads"][-2:] == [f"{server.url}/cifar10/{split}" for split in ("train", "test")]
        result = invoke("--rows", "random network", *data)
        assert "cifar10: 60 train and 40 test images" in result.stdout
        assert f"{server.url}/cifar10: taken as it is" in result.stderr
        line = refused("table1", "--small", "--data", f"{server.url}/cifar10/train", code=1)
    assert f"{server.url}/cifar10/train holds no shards (no train/index.safetensors)" in line
    assert not list(Path().glob("http:*"))
    assert "s3://b/out is on another machine" in refused("table1", "--small", "--out", "s3://b/out")


@pytest.mark.parametrize("table", sorted(paper_tables()))
def test_rows_of_the_papers_claims_are_in_both_recipes(table: str) -> None:
    for size in ("", "_small"):
        made = {row for _, row, _ in evaluated(load_recipe(bundled_recipes()[table + size]))}
        said = {row for claim in claims() if table in claim.tables for row in claim.rows}
        assert said <= made | paper_tables()[table].quoted.keys()
        assert RANDOM in made


TWO_SETS = """
runs: "seed-{seed}/runs"
stages:
  cifar10: {shards: {src: data/cifar10}, out: data/cifar10}
  miniimagenet: {shards: {src: data/miniimagenet}, out: data/miniimagenet}
  RotNet: {train: cifar10_rotnet_small.yaml, name: a, on: cifar10}
  RotNet at 84 px: {train: cifar10_rotnet_small.yaml, name: b, on: miniimagenet}
  RelLoc: {train: cifar10_rotnet_small.yaml, name: c, on: miniimagenet}
  small: {eval: [linear, voc07], of: [RotNet], train: cifar10, test: cifar10}
  large: {eval: linear, of: [RelLoc, RotNet at 84 px], train: miniimagenet, test: miniimagenet}
"""


def test_rows_and_protocols_without_images_are_left_out_with_the_reason(workspace: Path) -> None:
    def job(*rows: str) -> Job:
        return prepare("table3", Workspace(), Path("reproduce"), small=True, rows=rows)

    Path("configs/recipes/table3_small.yaml").write_text(TWO_SETS)
    found = job()
    assert list(found.chosen.stages) == ["cifar10", "RotNet", "small"]
    assert [cell.kind.name for cell in cast(EvalStage, found.plan(0).stages["small"]).cells] == ["linear"]
    assert "MiniImageNet is made of ImageNet by the split of Ravi and Larochelle" in found.absent["RelLoc"]
    assert found.absent["RelLoc"].endswith("put it into data/miniimagenet, or name it: --data miniimagenet=PATH")
    assert "VOC2007 is not there; `bowstore data download voc2007 data` fetches it" in found.absent["eval voc07"]
    assert found.absent["BoWNet"] == "table3_small does not evaluate it"
    assert "RotNet" not in found.absent
    with pytest.raises(MissingError, match="RelLoc cannot be made: MiniImageNet is made of ImageNet by the split"):
        job("RelLoc")
    with pytest.raises(UsageError, match="--data data names no data set of the table; write cifar10=PATH or mini"):
        prepare("table3", Workspace(), Path("reproduce"), small=True, data=["data"])

    Path("data/miniimagenet").mkdir()
    Path("data/VOCdevkit/VOC2007").mkdir(parents=True)
    assert list(job("RotNet").chosen.stages) == [
        "cifar10", "miniimagenet", "RotNet", "RotNet at 84 px", "small", "large"
    ]  # fmt: skip
    assert job("RelLoc").absent == {row: "table3_small does not evaluate it" for row in job("RelLoc").absent}
    assert list(job("RelLoc").chosen.stages) == ["miniimagenet", "RelLoc", "large"]


def test_a_network_is_evaluated_on_the_images_that_are_there(workspace: Path) -> None:
    """As Table 5's are on ImageNet alone where Places205 is not there."""
    both = TWO_SETS[: TWO_SETS.index("  large:")].replace("[linear, voc07]", "linear")
    both += "  others: {eval: [{knn: {k: 5}}], of: [RotNet], train: miniimagenet, test: miniimagenet}\n"
    Path("configs/recipes/table3_small.yaml").write_text(both)
    found = prepare("table3", Workspace(), Path("reproduce"), small=True)
    assert list(found.chosen.stages) == ["cifar10", "RotNet", "small"]
    assert found.absent["eval knn"].endswith("put it into data/miniimagenet, or name it: --data miniimagenet=PATH")
    assert "RotNet" not in found.absent
    Path("data/miniimagenet").mkdir()
    found = prepare("table3", Workspace(), Path("reproduce"), small=True)
    assert list(found.chosen.stages) == ["cifar10", "miniimagenet", "RotNet", "small", "others"]
    assert "eval knn" not in found.absent


def test_a_table_without_an_evaluation_shows_what_the_paper_has(workspace: Path) -> None:
    Path("configs/recipes/table6.yaml").write_text(TWO_SETS[: TWO_SETS.index("  small:")])
    result = CliRunner().invoke(main, ["reproduce", "table6"])
    assert result.exit_code == 0, result.output
    assert "voc0712-detection/bownet: not run; paper: Table 6, ResNet-50; BoWNet's figures" in result.stdout
    assert "BoWNet-conv5                 81.3        61.1      55.8  table6 does not evaluate it" in result.stdout
    assert not Path("reproduce").exists()
    Path("configs/recipes/table6.yaml").write_text(TWO_SETS.replace("seed-{seed}/runs", "runs"))
    assert "keeps the runs of all seeds in one place; write {seed} into its `runs:`" in refused("table6")


def test_other_images_than_the_tables_are_said_to_be_others(workspace: Path) -> None:
    shutil.move("data/cifar10/train/airplane", "data/cifar10/train/apple")
    shutil.move("data/cifar10/val/airplane", "data/cifar10/val/apple")
    job = prepare("table1", Workspace(), Path("reproduce"), small=True, data=["cifar10=data/cifar10"])
    plan = job.plan(0)
    assert describe_data(plan) == ({}, [])
    plan.stages["cifar10"].make()
    labels, (line,) = describe_data(plan)
    assert set(labels.values()) == {f"images that are not cifar10 ({column})" for column in labels}
    assert len(labels) == 2
    assert line == ("cifar10: 60 train and 40 test images, whose 10 classes are not those of cifar10: not this table")


def test_shards_that_another_process_writes_are_waited_for(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = prepare("table1", Workspace(), Path("reproduce"), small=True).plan(0)
    with ThreadPoolExecutor() as pool:
        with exclusive_lock(Path("reproduce/data/cifar10/.lock"), "cifar10"):
            making = pool.submit(plan.stages["cifar10"].make)
            while "waiting" not in capsys.readouterr().err:
                time.sleep(0.01)
        assert making.result()[0].startswith("train: 60 of 60 images")
