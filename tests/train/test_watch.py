"""The effective rank in a run's log, and what is said of runs that do not learn."""

import math
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bowstore.models.saved import newest_checkpoint
from bowstore.models.spectrum import effective_rank
from bowstore.runs import read_metrics
from bowstore.train import loop, watch
from bowstore.train.config import TrainConfig
from bowstore.train.step import Measured
from bowstore.train.tasks import task as task_module
from bowstore.train.tasks.task import Dead
from bowstore.train.watch import Course, Features, Watch

Make = Callable[..., TrainConfig]


# --- which lines have one, and of which steps


@pytest.mark.parametrize(("course", "lines"), [
    ((15, 50, 200), [50, 100, 150, 200]),  # epochs shorter than the way from line to line
    ((100, 50, 300), [100, 200, 300]),
    ((120, 50, 310), [100, 200, 310]),  # the last line of an epoch is not its last step; the run's end is a line
    ((5000, 50, 10_000), [5000, 10_000]),
    ((1, 1, 3), [1, 2, 3]),
    ((10, 50, 20), [20]),  # a run that is shorter
])  # fmt: skip
def test_the_last_line_of_each_epoch_has_one(course: tuple[int, int, int], lines: list[int]) -> None:
    epoch, every, steps = course
    logged = [step for step in range(1, steps + 1) if step % every == 0 or step == steps]
    last: dict[int, int] = {}
    for step in logged:
        last[math.ceil(step / epoch)] = step  # by epoch
    assert sorted(last.values()) == lines
    found = [Course(*course).epoch_line(step) for step in range(1, steps + 1)]
    assert found == [min(line for line in lines if line >= step) for step in range(1, steps + 1)]


def steps_of(features: Features, steps: range, rows: int, channels: int) -> dict[int, float]:
    """The ranks of a run's lines, by step; each step's features are its own."""
    found = {}
    for step in steps:
        features.add(step, given(step, rows, channels))
        if told := features.rank(step):
            found[step] = told["effective_rank"]
    return found


def given(step: int, rows: int, channels: int) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(step)) * step


def expected(steps: range, rows: int, channels: int) -> float:
    return effective_rank(torch.cat([given(step, rows, channels) for step in steps]))


@pytest.mark.parametrize("stops", [(), (1,), (2,), (3, 18, 19), (20,), (21, 38, 40)])
def test_it_is_of_the_last_steps_before_the_line_wherever_a_run_stopped(stops: tuple[int, ...]) -> None:
    """Two rows for each channel: 3 steps of 6 rows of 8 channels; and 3 first steps."""
    course = Course(20, 10, 50)
    features, found = Features(8, 6, course), {}
    begins = [0, *stops]
    for begin, end in zip(begins, [*stops, 50], strict=True):
        if begin:
            state = features.state()
            features = Features(8, 6, course)
            features.restore(state)
        found |= steps_of(features, range(begin + 1, end + 1), 6, 8)
    assert found == {line: expected(range(line - 2, line + 1), 6, 8) for line in (20, 40, 50)}
    assert features.first_rank == expected(range(1, 4), 6, 8)
    assert features.state()["features"] is None


def test_short_epochs_give_what_they_have() -> None:
    """Epochs of four steps of 2 rows: all of them, and the first step for the network's beginning."""
    features = Features(8, 2, Course(4, 1, 8))
    assert steps_of(features, range(1, 9), 2, 8) == {4: expected(range(2, 5), 2, 8), 8: expected(range(5, 9), 2, 8)}
    assert features.first_rank == expected(range(1, 2), 2, 8)


def test_maps_are_pooled_and_what_is_no_tensor_is_passed_over() -> None:
    features, course = Features(8, 6, Course(1, 1, 1)), given(1, 6, 8)
    features.add(1, course[:, :, None, None].expand(6, 8, 3, 3))
    assert features.first_rank == pytest.approx(effective_rank(course))
    none = Features(8, 6, Course(1, 1, 1))
    none.add(1, None)
    assert (none.rank(1), none.first_rank) == ({}, None)


@pytest.mark.parametrize("task", ["rotation", "supervised", "words"])
def test_a_runs_log_has_that_of_its_pooled_features(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Of 128 rows or the whole epoch's; of what the head was given, in the step itself."""
    original, seen = loop.train_step, []

    def step(*args: Any, **kwargs: Any) -> Measured:
        measured = original(*args, **kwargs)
        assert measured.features is not None
        seen.append(measured.features.flatten(2).mean(2) if task == "rotation" else measured.features)
        return measured

    monkeypatch.setattr(loop, "train_step", step)
    config = make_config(task, runtime={"log_every_steps": 1})
    loop.train(config, tmp_path / "runs")
    found = {line["step"]: line["effective_rank"] for line in read_metrics(tmp_path / "runs" / config.name)
             if "effective_rank" in line}  # fmt: skip
    steps = {4: (2, 3, 4), 8: (5, 6, 7, 8), 12: (9, 10, 11, 12)}  # the first step was taken for the beginning
    if task == "rotation":  # 64 rows a step
        steps = {4: (3, 4), 8: (7, 8), 12: (11, 12)}
    assert found.keys() == steps.keys()
    for line, of in steps.items():
        assert found[line] == pytest.approx(effective_rank(torch.cat([seen[step - 1] for step in of])), rel=1e-9)
    state = newest_checkpoint(tmp_path / "runs" / config.name)
    assert state is not None
    assert state["watch"] == {"first_rank": pytest.approx(effective_rank(seen[0])), "features": None}


# --- what is said

COURSE = Course(300, 50, 3000)


def watched(dead: Dead | None, first_rank: float | None = 20.0, course: Course = COURSE) -> Watch:
    features = Features(64, 128, course)
    features.first_rank = first_rank
    return Watch(dead, features, course)


SOUND = {"loss": 5.0, "effective_rank": 15.0, "gamma": 1.5}
WORDS = Dead(5.5, "the loss {loss:.4f} stays", 1.0)


@pytest.mark.parametrize(("values", "told"), [
    ({}, None),
    ({"loss": 5.48}, "the loss 5.4800 stays"),
    ({"effective_rank": 4.9},
     "the features have collapsed: their effective rank is 4.9, less than 5.0 (it was 20.0 in the first steps); try a "
     "lower optim.lr or optim.weight_decay"),
    ({"gamma": -0.04},
     "gamma, the scale of the logits, is -0.04, within 0.1 of zero (it began at 1): what the network sees hardly "
     "counts; try a lower optim.lr, a longer run, or fewer words"),
    ({"effective_rank": 5.0, "gamma": 0.1, "loss": 5.47}, None),  # the bounds
    ({"gamma": -1.7}, None),  # as good as 1.7
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_at_the_end_of_the_first_epoch(
    values: dict[str, float], told: str | None
) -> None:
    said = {step: watched(WORDS).warnings(step, SOUND | values) for step in range(50, 3001, 50)}
    for step, lines in said.items():
        assert lines == ([told] if told and step % 300 == 0 else []), step


def test_each_kind_is_said_once_and_again_only_when_it_comes_back() -> None:
    one = watched(WORDS)
    bad, worse = SOUND | {"gamma": 0.01}, SOUND | {"gamma": 0.01, "effective_rank": 1.0}
    said = [[line.split(",")[0].split(" have")[0] for line in one.warnings(300 * n, values)]
            for n, values in enumerate((bad, bad, worse, worse, SOUND, bad), 1)]  # fmt: skip
    assert said == [["gamma"], [], ["the features"], [], [], ["gamma"]]


def test_a_run_that_has_just_begun_is_not_judged_but_at_its_end() -> None:
    def lines(epoch: int, every: int, steps: int) -> list[int]:
        one = watched(WORDS, course=Course(epoch, every, steps))
        logged = [step for step in range(1, steps + 1) if step % every == 0 or step == steps]
        bad = SOUND | {"loss": 6.0}
        return [step for step in logged if (one.warnings(step, bad), one.warnings(step, SOUND))[0]]

    assert lines(15, 50, 300) == [200, 250, 300]
    assert lines(15, 5, 240) == [210, 225, 240]
    assert lines(31, 50, 31) == [31]  # a whole run
    assert lines(15, 5, 90) == [90]
    assert lines(5, 5, 29) == []


def test_a_head_that_began_anew_is_as_young_as_at_first() -> None:
    """Epochs of 73 steps, clusters anew every three: before steps 219 and 438, from 0."""
    course = Course(73, 73, 730, lambda step: step % 219 == 0)
    assert [step for step in range(73, 731, 73) if course.judged(step)] == [219, 438, 657, 730]


@pytest.mark.parametrize(("dead", "first_rank", "rank"), [
    (Dead(math.log(4), "{loss}"), 300.0, 2.0),  # four classes: two directions may be all that it takes
    (Dead(math.log(1000), "{loss}"), 300.0, 75.0),
    (Dead(math.log(1000), "{loss}"), None, 0.0),  # of an older checkpoint: nothing to compare with
])  # fmt: skip
def test_few_classes_take_few_directions(dead: Dead, first_rank: float | None, rank: float) -> None:
    for value in (rank + 0.01, max(rank - 0.01, 1.0)):
        said = watched(dead, first_rank).warnings(300, {"loss": 0.1, "effective_rank": value})
        assert len(said) == (value < rank)


def test_of_a_task_that_cannot_tell_nothing_is_said() -> None:
    assert watched(None).warnings(300, {"loss": 1e9, "effective_rank": 1.0, "gamma": -1.0}) == []


def test_a_run_whose_features_come_to_be_the_same_for_every_image_says_so(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, steps = task_module.build_backbone, count()

    def same(module: Any, _: Any, map_BChw: Tensor) -> Tensor:
        if map_BChw.is_meta or next(steps) < 2:  # a probe of shapes; the first steps
            return map_BChw
        return map_BChw.mean(0, keepdim=True).expand_as(map_BChw)

    def build(*args: Any) -> Any:
        backbone = original(*args)
        backbone.stages["block3"].register_forward_hook(same)
        return backbone

    monkeypatch.setattr(task_module, "build_backbone", build)
    monkeypatch.setattr(watch, "_JUDGED_STEP", 4)
    loop.train(make_config("supervised", optim={"epochs": 2, "milestones": []}), tmp_path / "runs")
    said = [line for line in capsys.readouterr().err.splitlines() if "collapsed" in line]
    assert len(said) == 1
    assert re.match(r"warning: the features have collapsed: their effective rank is 1\.\d, less than 2\.0", said[0])
