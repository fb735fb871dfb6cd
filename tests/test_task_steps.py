"""tools/task_steps.py: each step by hand computes the product's loss, and another one is refused."""

import json
from pathlib import Path

import pytest
import task_steps
from click.testing import CliRunner, Result


def run(*arguments: object) -> Result:
    few = ("--steps", 1, "--rounds", 2, "--set", "optim.batch=4", "--processor")
    return CliRunner().invoke(task_steps.main, [str(argument) for argument in (*arguments, *few)])


@pytest.mark.parametrize("task", task_steps.BY_HAND)
def test_both_steps_have_the_same_loss(task: str) -> None:
    result = run("--task", task, "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert value["task"] == task
    rates = value["images_per_second"]
    ratios = [
        hand / own for own, hand in zip(*(rates[name]["rounds"] for name in ("bowstore", "by hand")), strict=True)
    ]
    assert [value["least"], value["most"]] == pytest.approx(sorted(ratios))
    assert value["time_over_by_hand"] == pytest.approx(sum(ratios) / 2)


def test_another_loss_or_task_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    by_hand = task_steps.location
    monkeypatch.setitem(task_steps.BY_HAND, "location", lambda made: lambda batch: 1.01 * by_hand(made)(batch))
    result = run("--task", "location")
    assert result.exit_code == 2
    assert "Error: the losses of the first step are 2." in result.stderr
    assert result.stderr.endswith(": not the same step\n")
    path = tmp_path / "other.yaml"
    path.write_text("task: rotation\nview: {cutmix: false}\n")
    result = run("--task", "location", "--config", path)
    assert result.stderr == f"Error: {path} is of task rotation; name it by --task, or another file\n"
