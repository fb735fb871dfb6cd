"""`bowstore verify` of runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from bowstore import runs
from bowstore.cli import main
from bowstore.errors import UsageError
from bowstore.models import saved
from bowstore.train import loop
from bowstore.train.config import TrainConfig
from bowstore.verify import PathReport, verify_path

Make = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def run(finished: Path, make_config: Make, tmp_path: Path) -> Path:
    """A copy of a finished run with two checkpoints."""
    if not finished.exists():
        loop.train(make_config("rotation", name="run"), finished.parent)
    shutil.copytree(finished, tmp_path / "runs" / "run")
    return tmp_path / "runs" / "run"


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def messages(report: PathReport) -> list[str]:
    assert report.kind == "run"
    assert report.sound == (not report.problems)
    return [problem.message for problem in report.problems]


def test_a_sound_run_has_no_problem(run: Path) -> None:
    (run / "checkpoints" / "step-000000007.pt.damaged").write_bytes(b"x")
    report = verify_path(run)
    assert messages(report) == []
    assert report.text() == (
        f"{run}: 2 checkpoints and 1 exported networks; 1 checkpoints set aside earlier\nlineage: rotation -> run\n"
        f"no problem found"
    )
    assert verify_path(run.parent).sound
    for path in (runs.checkpoints(run)[0], run / "backbone.safetensors"):
        assert verify_path(path).sound


def test_every_damage_to_a_run_is_named(run: Path) -> None:
    new, old = runs.checkpoints(run)
    flip(new, new.stat().st_size // 2)
    old.write_bytes(b"")
    flip(run / "backbone.safetensors", -50)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"3\n")
    (run / "config.yaml").write_text("name: [")
    (run / "environment.json").write_text("{")
    (run / "lineage.json").write_text("{")
    (run / "eval").mkdir()
    (run / "eval" / "linear.json").write_bytes(b"\xff")
    (run / "random" / "eval").mkdir(parents=True)
    (run / "random" / "eval" / "knn.json").write_text('{"a": 1}')
    found = messages(verify_path(run))
    names = ("config.yaml", new.name, old.name, "backbone.safetensors", "metrics.jsonl", "lineage.json",
             "environment.json", "linear.json", "knn.json is not a result file")  # fmt: skip
    assert [next(name for name in names if name in line) for line in found] == [*names]
    result = CliRunner().invoke(main, ["verify", str(run), "--json"])
    assert result.exit_code == 1
    assert [problem["message"] for problem in json.loads(result.stdout)["problems"]] == found


def test_an_export_of_another_run_is_named(run: Path, make_config: Make, tmp_path: Path) -> None:
    """Whole, with its digest: it is not what the newest checkpoint holds."""
    loop.train(make_config("rotation", name="other", seed=1, optim={"epochs": 1, "milestones": []}), run.parent)
    shutil.copy(run.parent / "other" / "backbone.safetensors", run)
    (line,) = messages(verify_path(run))
    assert line.startswith(f"{run / 'backbone.safetensors'} holds other weights than the newest checkpoint")
    assert messages(verify_path(run.parent)) == [line]


def test_the_lineage_of_another_run_is_named(run: Path) -> None:
    path = run / "lineage.json"
    lineage = json.loads(path.read_text())
    assert lineage == {
        "name": "run", "task": "rotation", "targets": {},
        "inputs": saved.load_checkpoint(runs.checkpoints(run)[0])["inputs"],
    }  # fmt: skip
    path.write_text(json.dumps({**lineage, "inputs": {"shards": "0" * 32}}))
    assert messages(verify_path(run)) == [
        f"{path} tells of other images or targets than the newest checkpoint; restore both from one copy"
    ]


def test_what_is_no_run_or_cannot_be_repaired(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--repair goes with a word store or shards, not with run .*run: `bowstore"):
        verify_path(run, repair=True)
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "empty")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "empty is neither a word store nor a folder of indexed shards, nor a run; if it holds" in result.stderr
