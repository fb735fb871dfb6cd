"""Files of another run, or of another time, in a run's folder: each is whole, and none is what it is taken for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bowstore.config import Workspace
from bowstore.errors import MismatchError, MissingError
from bowstore.models.saved import load_backbone, newest_checkpoint
from bowstore.runs import checkpoints
from bowstore.train import loop
from bowstore.train.checkpoint import Checkpoints
from bowstore.train.config import TrainConfig
from bowstore.train.metrics import MetricsLog, RunLog
from bowstore.train.schedule import without_effect
from bowstore.train.watch import Course, Features, Watch
from bowstore.verify import verify_path
from bowstore.workspace import newest_run

Make = Callable[..., TrainConfig]
Run = Callable[[int], Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def make(make_config: Make, trained: Path) -> Make:
    def make(**changes: Any) -> TrainConfig:
        defaults = {"optim": {"epochs": 2, "milestones": []}, "runtime": {"checkpoint_every_steps": 3}}
        return make_config("rotation", name="run", shards=str(trained / "shards"), **{**defaults, **changes})

    if not (trained / "shards").exists():
        shutil.copytree(Path(str(make_config("rotation").shards)), trained / "shards")
    return make


@pytest.fixture
def runs(make: Make, trained: Path, tmp_path: Path) -> Path:
    """Runs of eight steps and the checkpoints 6 and 8 that differ in their seed: 0/run and 1/run."""
    for seed in (0, 1):
        if not (trained / str(seed)).exists():
            loop.train(make(seed=seed), trained / str(seed))
    shutil.copytree(trained, tmp_path / "runs", ignore=shutil.ignore_patterns("shards"))
    return tmp_path / "runs"


def problems(run: Path) -> list[str]:
    return [problem.message for problem in verify_path(run).problems]


def test_an_export_of_another_run_is_refused(runs: Path, make: Make) -> None:
    run = runs / "0" / "run"
    config = make(seed=0)
    shutil.copy(runs / "1" / "run" / "backbone.safetensors", run)
    with pytest.raises(MismatchError, match=r"backbone\.safetensors holds other weights than step-000000008\.pt.*move"):
        loop.train(config, runs / "0")
    with pytest.raises(MismatchError, match=r"is of another run than .*config\.yaml \(seed is 0 there, 1 here\)"):
        load_backbone(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(
        MismatchError, match=r"is of another configuration \(seed is 1 there, 0 here\), and there is no"
    ):
        loop.train(config, runs / "0")
    assert [line.split(" than ")[0] for line in problems(run)] == [f"{run / 'backbone.safetensors'} is of another run"]


def test_a_checkpoint_of_another_run_is_gone_on_from_only_by_demand(
    runs: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / "0" / "run"
    checkpoints(run)[0].unlink()
    (run / "backbone.safetensors").unlink()
    (other,) = (path for path in checkpoints(runs / "1" / "run") if path.name == "step-000000006.pt")
    shutil.copy(other, run / "checkpoints")
    with pytest.raises(
        MismatchError, match=r"step-000000006\.pt was written under another .*\(seed is 1 there, 0 here\)"
    ):
        loop.train(make(seed=0), runs / "0")
    assert [line.split(" than ")[0] for line in problems(run)] == [f"{run}/checkpoints/{other.name} is of another run"]
    assert load_backbone(run).saved.seed == 1
    said = capsys.readouterr().err
    assert f"run {run} is not finished: its newest checkpoint is used, of step 6" in said
    assert (
        f"warning: the newest checkpoint of {run} was written under another configuration than its config.yaml" in said
    )
    loop.train(make(seed=0), runs / "0", resume=True)
    assert "resumed with seed is 1 there, 0 here" in capsys.readouterr().err
    assert problems(run) == []


def test_a_lost_configuration_is_made_good_by_the_checkpoint(runs: Path, make: Make) -> None:
    run = runs / "0" / "run"
    (run / "config.yaml").unlink()
    checkpoints(run)[0].unlink()
    with pytest.raises(
        MismatchError, match=r"step-000000006\.pt was written under another configuration \(optim\.lr is"
    ):
        loop.train(make(optim={"epochs": 2, "milestones": [], "lr": 0.25}), runs / "0")
    assert loop.train(make(), runs / "0").steps == 8
    assert problems(run) == []


def test_a_schedule_that_ends_before_the_checkpoint_is_no_finished_run(runs: Path, make: Make) -> None:
    run = runs / "0" / "run"
    (run / "backbone.safetensors").unlink()
    shorter = make(optim={"epochs": 1, "milestones": []})
    with pytest.raises(MismatchError, match=r"step-000000008\.pt is past the end of .*, which is step 4; raise optim"):
        loop.train(shorter, runs / "0", resume=True)
    assert not (run / "backbone.safetensors").exists()
    loop.train(make(), runs / "0")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(
        MismatchError, match=r"\(optim\.epochs is 2 there, 3 here\), and there is no checkpoint to go on"
    ):
        loop.train(make(optim={"epochs": 3, "milestones": []}), runs / "0", resume=True)


def test_a_log_that_lacks_lines_is_told(runs: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "0" / "run"
    assert problems(run) == []
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    told = "step 8 was logged before the newest checkpoint, and {} lacks that line; restore it from a copy"
    assert problems(run) == [told.format(path)]
    path.unlink()
    checkpoints(run)[0].unlink()
    told = f"step 6 was logged before the newest checkpoint, and {path} is not there; restore it from a copy"
    assert problems(run)[-1] == told
    loop.train(make(), runs / "0")
    assert f"warning: {told}" in capsys.readouterr().err
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [8]


def test_the_log_of_a_run_whose_checkpoints_are_gone_is_kept(
    runs: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / "0" / "run"
    before = (run / "metrics.jsonl").read_bytes()
    for step in (8, 2):  # what was logged before any checkpoint begins anew without a word
        (run / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
        course = Course(4, 2, 8)
        RunLog(
            make(), run, {}, Watch(None, Features(64, 16, course), course), first=0, logged=None, steps_per_pass=4
        ).close()
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1
    assert "has no checkpoint, though it was trained to step 8: it begins anew, and the log of then is kept" in said[0]
    assert (run / "metrics.jsonl.before").read_text() == '{"step": 8}\n'
    assert (run / "metrics.jsonl").read_bytes() == b"" != before


def test_each_damaged_log_is_kept(tmp_path: Path) -> None:
    for text in ("one\n", "two\n"):
        (tmp_path / "metrics.jsonl").write_text(text)
        MetricsLog(tmp_path, 0).close()
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == "one\n"
    assert (tmp_path / "metrics.jsonl.damaged-2").read_text() == "two\n"


def test_a_checkpoint_that_is_pruned_while_it_is_looked_for(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs / "0" / "run"
    newest, before = checkpoints(run)
    listed = [[newest, before], [before]]
    monkeypatch.setattr("bowstore.runs.checkpoints", lambda _run: listed.pop(0))
    newest.unlink()
    assert newest_checkpoint(run)["step"] == 6  # type: ignore[index]
    listed.append([newest, before])
    (run / "backbone.safetensors").unlink()
    assert verify_path(run).text().startswith(f"{run}: 1 checkpoints and 0 exported networks\nlineage: ")
    newest.symlink_to("elsewhere/8.pt")
    listed.append([newest, before])
    with pytest.raises(
        MissingError, match=r"step-000000008\.pt is a link to elsewhere/8\.pt, which is not there; restore"
    ):
        newest_checkpoint(run)


def test_a_run_without_a_checkpoint_yet_and_a_folder_that_is_no_run(runs: Path) -> None:
    (runs / "0" / "begun").mkdir()
    shutil.copy(runs / "0" / "run" / "config.yaml", runs / "0" / "begun")
    with pytest.raises(
        MissingError, match=r"run .*begun holds no checkpoint yet; let `bowstore train` reach its first"
    ):
        load_backbone(runs / "0" / "begun")
    with pytest.raises(MissingError, match=r"checkpoints is not a run directory \(it has no config\.yaml\)"):
        load_backbone(runs / "0" / "run" / "checkpoints")


def test_checkpoints_are_compared_by_their_steps(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("step-999999999.pt", "step-1000000000.pt", "step-5.pt"):
        (tmp_path / "checkpoints" / name).touch()
    Checkpoints(tmp_path, keep=3, start=999_999_999, writes=True)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "step-999999999.pt", "step-1000000000.pt.damaged", "step-5.pt",
    }  # fmt: skip


def test_a_run_that_cannot_be_read_hides_no_other(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = runs / "0" / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("task: [")
    (broken / "backbone.safetensors").touch()
    assert newest_run(Workspace(runs=runs / "0"), teacher=True) == runs / "0" / "run"
    assert "broken/config.yaml is not a YAML file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "changes", "lines"),
    [
        ("words", {"optim": {"epochs": 3, "milestones": [1, 2], "warmup_epochs": 1.0}}, []),
        ("rotation", {"settings": {"blocks": 2}, "optim": {"epochs": 3, "warmup_epochs": 3.0, "milestones": []}},
         []),
        ("words", {"optim": {"epochs": 2, "milestones": [1, 2, 5]}}, ["optim.milestones [2, 5] lie at or"]),
        ("words", {"optim": {"epochs": 4, "milestones": [1], "warmup_epochs": 2.5}}, ["optim.milestones [1] lie"]),
        ("words", {"optim": {"epochs": 2, "warmup_epochs": 3.0, "milestones": []}}, ["optim.warmup_epochs 3 are more"]),
        ("words", {"model": {"arch": "resnet18"}}, ["model.strides are those of a wide ResNet: resnet18 has its own"]),
        ("words", {"model": {"arch": "resnet18", "strides": [1, 2, 2]}}, []),
    ],
)  # fmt: skip
def test_what_a_configuration_says_in_vain_is_told(
    make_config: Make, task: str, changes: dict[str, Any], lines: list[str]
) -> None:
    found = without_effect(make_config(task, **changes))
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True))
