"""Recipes under torchrun: one process goes through the stages, and starts others for those that can use them."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bowstore.cli import main
from bowstore.config import Workspace, dump
from bowstore.errors import BowstoreError
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.protocols.voc0712_detection import KIND, DetectionSettings
from bowstore.recipes.evaluate import Cell
from bowstore.recipes.file import load_recipe
from bowstore.recipes.plan import make_plan
from bowstore.recipes.run import run_recipe

RANKS = {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "x"}


def test_run_under_torchrun_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {**RANKS, "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, ["run", "cifar10"])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert (
        "for one process, and torchrun started 8; give it --processes 4 without torchrun, or run one stage: torchrun "
        in (result.stderr)
    )
    result = CliRunner().invoke(main, ["run", "cifar10", "--stage", "linear"])
    assert "stage 'linear': it is of kind eval, for one process; start it without torchrun" in result.stderr
    for more in ([], ["--dry-run"]):
        result = CliRunner().invoke(main, ["run", "cifar10", "--stage", "liner", *more])
        assert "has no stage 'liner'; its stages are images, data, rotnet, words, bownet, linear" in result.stderr
    shown = json.loads(CliRunner().invoke(main, ["run", "cifar10", "--stage", "data", "--dry-run", "--json"]).stdout)
    assert [line["stage"] for line in shown] == ["data"]
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_nobody_makes_are_asked_for_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(
        "stages:\n  data: {shards: {src: IMAGES}}\n  rotnet: {train: cifar10_rotnet_small.yaml, on: data}\n"
        "  voc: {eval: {voc07: {voc: VOC2007}}, of: [rotnet]}\n"
    )
    for there, asked in (("x", "stage 'data': IMAGES"), ("IMAGES", "stage 'voc': VOC2007")):
        Path(there).mkdir()
        result = CliRunner().invoke(main, ["run", "r.yaml"])
        line = f"Error: r.yaml: {asked} is not there, and no stage makes it; name another, or put it there"
        assert result.stderr.splitlines() == [line]
        assert (
            f"refused: {asked.partition(': ')[2]} is not"
            in CliRunner().invoke(main, ["run", "r.yaml", "--dry-run"]).stdout
        )
    Path("VOC2007").mkdir()
    result = CliRunner().invoke(main, ["run", "r.yaml"])
    assert result.stderr.startswith("Error: r.yaml: stage 'voc': no folder VOC2007/JPEGImages; name the devkit")
    assert not Path("data").exists()


def test_a_place_for_the_results_is_made_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("r.yaml").write_text("{result: file/r.json, stages: {im: {render: {train: 20, val: 10}}}}")
    result = CliRunner().invoke(main, ["run", "r.yaml"])
    assert result.stderr == "Error: File exists (file); move away what lies there, or name another path\n"
    assert not Path("data").exists()


def test_processes_are_started_by_torchrun_with_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Failing:
        def __init__(self, command: list[str]) -> None:
            started.append(command[1:])

        def __enter__(self) -> "Failing":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def wait(self) -> int:
            return 3

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bowstore.recipes.run.subprocess.Popen", Failing)
    Path("data/shards/train").mkdir(parents=True)
    Path("r.yaml").write_text("stages: {rotnet: {train: cifar10_rotnet_small.yaml}}")
    recipe = load_recipe(Path("r.yaml"), ["stages.rotnet.set.optim.epochs=2"])
    with pytest.raises(BowstoreError, match=r"stage 'rotnet' ended with exit code 3; its own lines above say why"):
        run_recipe(make_plan(recipe, Workspace(), seed=4, folder=Path("out")), processes=8)
    command = "-m torch.distributed.run --standalone --nproc-per-node 8 -m bowstore run r.yaml --stage rotnet --out out"
    assert started == [[*command.split(), "--seed", "4", "--set", "stages.rotnet.set.optim.epochs=2"]]


def test_how_an_evaluation_ran_does_not_undo_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector that many processes trained by hand is not trained again for its workers."""
    monkeypatch.setattr("bowstore.runs.weights_sha256", lambda _: "w")

    def cell(**settings: object) -> Cell:
        asked = DetectionSettings.model_validate({"voc": tmp_path, **settings})
        return Cell("BoWNet", KIND, asked, EvalConfig(run=str(tmp_path / "run")))

    ran = cell(workers=8, checkpoint_every=100)
    result = {"protocol_version": 1, "inputs": {"weights_sha256": "w"}, "settings": {"options": dump(ran.settings)}}
    ran.result.parent.mkdir(parents=True)
    ran.result.write_text(json.dumps(result))
    assert cell().is_done()
    assert not cell(seed=1).is_done()
