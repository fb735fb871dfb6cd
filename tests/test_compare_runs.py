"""tools/compare_runs.py: what is equal, what is not and where it first differs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import compare_runs
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from shard_sets import write_words


def run(*arguments: object) -> Result:
    return CliRunner().invoke(compare_runs.main, [str(argument) for argument in arguments])


def metrics(folder: Path, loss: float = 0.25, rate: float = 7.0) -> None:
    lines = [
        {"step": 1, "loss": 0.5, "order": "ab", "images_per_second": rate},
        {"step": 2, "loss": loss, "order": "cd", "images_per_second": rate},
    ]
    (folder / "runs/one/metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def result(folder: Path, top1: float = 0.5, seconds: float = 3.0) -> None:
    values = {
        "protocol": "linear/x",
        "protocol_version": 1,
        "metrics": {"top1": top1},
        "details": {"losses": [1.0, float("nan")], "probe_seconds": seconds},
        "created": str(seconds),
    }
    (folder / "runs/one/eval/linear-x.json").write_text(json.dumps(values))


def weights(folder: Path, last: float = 2.0) -> None:
    save_file({"conv.weight": torch.tensor([1.0, last])}, folder / "runs/one/backbone.safetensors")


def words(folder: Path, last: int = 2) -> None:
    shutil.rmtree(folder / "words.zarr", ignore_errors=True)
    write_words(folder / "words.zarr", np.array([[[1]], [[last]]], np.uint16))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("old", "new"):
        (tmp_path / name / "runs/one/eval").mkdir(parents=True)
        for write in (metrics, result, weights, words):
            write(tmp_path / name)
    return tmp_path / "old", tmp_path / "new"


def test_equal_folders_are_equal_whatever_time_they_took(folders: tuple[Path, Path]) -> None:
    metrics(folders[1], rate=9.0)
    result(folders[1], seconds=4.0)
    found = run(*folders)
    assert found.exit_code == 0, found.output
    assert [line.split() for line in found.stdout.splitlines()] == [
        ["metrics", "runs/one/metrics.jsonl", "4", "equal"],
        ["result", "runs/one/eval/linear-x.json", "5", "equal"],
        ["weights", "runs/one/backbone.safetensors", "1", "equal"],
        ["words", "words.zarr", "1", "equal"],
    ]


@pytest.mark.parametrize(
    ("change", "path", "difference"),
    [
        (lambda new: metrics(new, loss=0.25000001), "runs/one/metrics.jsonl", "step 2 loss: 0.25 became 0.25000001"),
        (lambda new: result(new, top1=0.6), "runs/one/eval/linear-x.json", "metrics top1: 0.5 became 0.6"),
        (lambda new: weights(new, 3.0), "runs/one/backbone.safetensors", "conv.weight: "),
        (lambda new: words(new, 3), "words.zarr", "digest: "),
        (lambda new: shutil.rmtree(new / "words.zarr"), "words.zarr", "only in OLD"),
    ],
)
def test_the_first_difference_is_told(
    change: Callable[[Path], None], path: str, difference: str, folders: tuple[Path, Path]
) -> None:
    change(folders[1])
    found = run(*folders, "--json")
    assert found.exit_code == 1, found.output
    (row,) = [row for row in json.loads(found.stdout) if row["difference"]]
    assert row["path"] == path
    assert row["difference"].startswith(difference)


def test_a_folder_of_nothing_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    found = run(folders[0], tmp_path / "none")
    assert found.exit_code == 2
    assert found.stderr.endswith("none holds no metrics.jsonl, results, word store or weights; name a workspace\n")
