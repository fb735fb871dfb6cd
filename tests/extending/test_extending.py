"""A source, a task, protocols of both forms and a recipe of a user's own, run by the command line; docs show them."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from shard_sets import textured_image

from bowstore import plugins
from bowstore.cli import main
from bowstore.runs import read_metrics

HERE = Path(__file__).parent
EXAMPLES = ("npz.py", "upside_down.py", "upside_down.yaml", "class_means.py", "finetune.py", "recipe.yaml")
WORKSPACE = "plugins: [npz.py, upside_down.py, class_means.py]\n"
ENTRY_POINT = '[project.entry-points."bowstore.protocols"]\nfinetune = "finetune:KIND"\n'


def run(*arguments: str) -> Result:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Images, and all examples: three as plugins of the workspace, one as a package that is installed."""
    images = np.stack([textured_image(number, 20, 24) for number in range(60)])
    labels = np.arange(60) % 4
    np.savez(
        tmp_path / "images.npz",
        train_images=images[:40],
        train_labels=labels[:40],
        test_images=images[40:],
        test_labels=labels[40:],
    )
    for name in EXAMPLES:
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "bowstore.yaml").write_text(WORKSPACE)
    package = tmp_path / "finetune-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: finetune\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[bowstore.protocols]\nfinetune = finetune:KIND\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    plugins._installed.cache_clear()
    yield tmp_path
    plugins._installed.cache_clear()
    plugins.use_plugins(plugins.Named((), ""))


def test_what_a_user_adds_runs_end_to_end(workspace: Path) -> None:
    run("run", "recipe.yaml")
    log = read_metrics(workspace / "runs/upside_down")
    chance = -0.4 * np.log(0.4) - 0.6 * np.log(0.6)
    assert log[-1]["chance_loss"] == pytest.approx(chance)
    assert 0 < log[-1]["loss"] < 2 * chance
    assert (workspace / "data/words.zarr/block3").is_dir(), "its network made words"
    for name in ("upside_down", "bownet"):
        results = {
            path.name: json.loads(path.read_text()) for path in (workspace / "runs" / name / "eval").glob("*.json")
        }
        assert set(results) == {"class-means-euclidean.json", "finetune-4-steps.json"}
        assert all(0 <= result["metrics"]["top1"] <= 1 for result in results.values())
        assert len(results["finetune-4-steps.json"]["details"]["losses"]) == 4
    # All of it is done, and the table is there without running anything again.
    before = {path: path.stat().st_mtime_ns for path in workspace.glob("runs/*/eval/*.json")}
    table = run("run", "recipe.yaml").stdout
    assert "class-means/euclidean" in table
    assert {path: path.stat().st_mtime_ns for path in workspace.glob("runs/*/eval/*.json")} == before
    # Each stands among bowstore's own.
    assert "images.npz" in run("data").stdout
    assert "--cosine" in run("eval", "class-means", "--help").stdout
    assert "Fine-tuning on labels." in run("eval", "--help").stdout


def test_docs_show_these_files() -> None:
    text = (HERE.parents[1] / "docs/extending.md").read_text()
    shown = re.findall(r"`tests/extending/([\w.]+)`:\n\n```\w+\n(.*?)```\n", text, flags=re.DOTALL)
    assert [name for name, _ in shown] == list(EXAMPLES)
    for name, code in shown:
        assert code == (HERE / name).read_text(), name
        assert len(code.splitlines()) <= 60, name
    assert WORKSPACE in text
    assert ENTRY_POINT in text
