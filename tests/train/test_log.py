"""The log of a run, and what a network draws in its steps: both the same however often the run stopped."""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from bowstore.cli import main
from bowstore.data.index import open_index
from bowstore.models.backbone import Backbone
from bowstore.models.saved import newest_checkpoint
from bowstore.models.weights import content_digest
from bowstore.runs import read_metrics
from bowstore.train import loop, metrics
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import World
from bowstore.train.metrics import Meter, MetricsLog
from bowstore.train.schedule import step_seed
from bowstore.train.step import Measured
from bowstore.train.tasks import task as task_module
from bowstore.train.tasks import words as words_module
from bowstore.words.store.store import open_store

Make = Callable[..., TrainConfig]


class Stopped(Exception):
    pass


def train_to(config: TrainConfig, runs: Path, steps: int, *, signalled: bool = False) -> None:
    """Train until the process dies when it starts its `steps`-th step, or is told to stop in it."""
    original, count = loop.train_step, 0

    def step(*args: Any, **kwargs: Any) -> Measured:
        nonlocal count
        count += 1
        if count == steps and not signalled:
            raise Stopped
        if count == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        with pytest.raises(SystemExit if signalled else Stopped):
            loop.train(config, runs)


def log_of(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_metrics(run)]


def with_dropout(patch: pytest.MonkeyPatch, seen: Callable[[torch.Tensor], None] = lambda mask: None) -> None:
    """Networks whose last map loses half of its values in training; `seen` is shown each mask."""
    original = task_module.build_backbone

    def drop(module: Any, _: Any, map_BChw: torch.Tensor) -> torch.Tensor:
        mask = F.dropout(torch.ones_like(map_BChw), 0.5, module.training)
        if not mask.is_meta:  # a probe of shapes
            seen(mask)
        return map_BChw * mask

    def build(*args: Any) -> Backbone:
        backbone = original(*args)
        backbone.stages["block3"].register_forward_hook(drop)  # type: ignore[union-attr]
        return backbone

    patch.setattr(task_module, "build_backbone", build)


# --- metrics.jsonl


@pytest.mark.parametrize("task", ["rotation", "words"])
@pytest.mark.parametrize("signalled", [True, False])
def test_the_log_of_a_run_that_stopped_is_that_of_one_that_did_not(
    make_config: Make, tmp_path: Path, task: str, signalled: bool
) -> None:
    """To the last digit, and no line more: stops lie between two lines of the log."""
    runtime = {"log_every_steps": 5, "checkpoint_every_steps": 3}
    config = make_config(task, runtime=runtime)
    loop.train(config.model_copy(update={"name": "whole"}), tmp_path / "runs")
    run = tmp_path / "runs" / config.name
    for steps in (2, 6):  # by a signal after steps 2 and 8; else in step 2, before any checkpoint, and in step 6
        train_to(config, tmp_path / "runs", steps, signalled=signalled)
    assert newest_checkpoint(run)["step"] == (8 if signalled else 3)  # type: ignore[index]
    loop.train(config, tmp_path / "runs")
    assert [line["step"] for line in log_of(run)] == [5, 10, 12]
    assert log_of(run) == log_of(tmp_path / "runs" / "whole")


def test_means_are_the_same_on_three_ranks_wherever_a_run_stopped() -> None:
    """Numbers that float32 sums would round another way; each rank goes on from the mean of all."""
    values = np.random.default_rng(0).normal(3, 2, (3, 40)).astype(np.float32)

    class Ranks(World):
        @staticmethod
        def mean(values: torch.Tensor) -> torch.Tensor:
            others.append(values)
            return torch.stack(others[-3:]).mean(0) if len(others) % 3 == 0 else values

    def mean_over_ranks(meters: list[Meter], read: Callable[[Meter], Any]) -> Any:
        for meter in meters[:2]:
            state = meter._steps, dict(meter._sums)
            read(meter)
            meter._steps, meter._sums = state
        return read(meters[2])

    world, device = Ranks(0, 3, torch.device("cpu")), torch.device("cpu")
    means = []
    for stops in ((), (1,), (7, 8, 33)):
        meters = [Meter(device) for _ in range(3)]
        for step in range(40):
            if step in stops:
                others: list[torch.Tensor] = []
                state = json.loads(json.dumps(mean_over_ranks(meters, lambda meter: meter.state(world))))
                meters = [Meter(device) for _ in range(3)]
                for meter in meters:
                    meter.restore(state)
            for rank, meter in enumerate(meters):
                meter.count(4, {"loss": torch.tensor(values[rank, step])})
        others = []
        means.append(mean_over_ranks(meters, lambda meter: meter.read(world))["loss"])
    assert means == [float(np.float32(values.astype(np.float64).mean()))] * 3


def test_gamma_is_logged_as_it_was_in_the_step(make_config: Make, tmp_path: Path) -> None:
    config = make_config(settings={"gamma": 1.25}, runtime={"log_every_steps": 1, "checkpoint_every_steps": 1})
    train_to(config, tmp_path / "runs", 3)
    run = tmp_path / "runs" / config.name
    gammas = [line["gamma"] for line in read_metrics(run)]
    assert gammas[0] == 1.25  # before the first update
    assert gammas[1] != 1.25
    loop.train(config, tmp_path / "runs")
    assert newest_checkpoint(run)["head"]["gamma"].item() != read_metrics(run)[-1]["gamma"]  # type: ignore[index]


@pytest.mark.parametrize("form", ["count", "binary"])
@pytest.mark.parametrize("images", [17, 40, 72])
def test_the_marginal_is_that_of_the_images_in_use(make_config: Make, form: str, images: int) -> None:
    config = make_config(settings={"form": form}, images=images)
    assert config.shards is not None
    assert config.task.store is not None
    words = open_store(config.task.store[0]).load_words()[:images].reshape(images, -1).astype(int)
    bags = np.zeros((images, 32))
    for image, row in enumerate(words):
        for word in row if form == "count" else sorted(set(row)):
            bags[image, word] += 1
    mean = (bags / bags.sum(1, keepdims=True)).mean(0)
    expected = -sum(p * np.log(p) for p in mean if p)
    built = task_module.build_task(config, open_index(config.shards), World(0, 1, torch.device("cpu")))
    assert built.constants["marginal_loss"] == pytest.approx(expected, abs=1e-9)


def test_lines_that_cannot_be_read_are_named_and_none_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1, "loss": 2.5}', b"\xff\xfe\x00", b"3", b'"text"', b"[1]", b"null", b'{"loss": 1}', b"{",
             b'{"step": 4, "loss": 1.5}', b'{"step": "5"}', b'{"step": 6, "loss": 1.0}', b'{"step": 7, "l']  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 4, 6]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: 8 lines of {path} are no JSON objects with a step (line 2, 3, 4, ...) and are left out"
    ]
    MetricsLog(tmp_path, 4).close()
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"\n".join(lines)
    assert "the file as it was is kept as metrics.jsonl.damaged" in capsys.readouterr().err
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n{"step": 4, "loss": 1.5}\n'
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 4]
    assert capsys.readouterr().err == ""


def test_a_last_line_that_a_killed_process_cut_is_no_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "loss": 0.')
    MetricsLog(tmp_path, 1).close()
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "metrics.jsonl.damaged").exists()
    assert read_metrics(tmp_path / "nowhere") == []


@pytest.mark.parametrize(("steps", "text"), [
    (2, "interrupted before the first checkpoint: no step was kept, the same command begins anew"),
    (7, "interrupted; run the command again to go on from step 5"),
])  # fmt: skip
def test_an_interrupt_says_what_is_left(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, text: str
) -> None:
    """As the command prints it: no promise to go on where there is nothing to go on from."""
    original, count = loop.train_step, 0

    def step(*args: Any, **kwargs: Any) -> Measured:
        nonlocal count
        count += 1
        if count == steps:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rotation.yaml").write_text(json.dumps(json.loads(make_config("rotation").model_dump_json())))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        result = CliRunner().invoke(main, ["train", "--config", "rotation.yaml"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == f"Error: {text}"


# --- what a network draws


def test_a_network_that_draws_resumes_to_the_same_bits(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_dropout(monkeypatch)
    config = make_config("rotation", runtime={"log_every_steps": 1})
    loop.train(config.model_copy(update={"name": "whole"}), tmp_path / "runs")
    train_to(config, tmp_path / "runs", 9)
    torch.rand(5)
    loop.train(config, tmp_path / "runs")
    whole, cut = (newest_checkpoint(tmp_path / "runs" / name) for name in ("whole", config.name))
    assert whole is not None
    assert cut is not None
    for part in ("backbone", "head", "optimizer"):
        assert content_digest(whole[part]) == content_digest(cut[part]), part
    assert log_of(tmp_path / "runs" / "whole") == log_of(tmp_path / "runs" / config.name)


def test_ranks_and_steps_draw_masks_of_their_own(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[str] = []
    with_dropout(monkeypatch, lambda mask_BChw: masks.append(content_digest(mask_BChw[:8])))
    for rank in (0, 1, 0):
        monkeypatch.setattr(loop, "joined", lambda device, rank=rank: nullcontext(World(rank, 1, torch.device("cpu"))))
        config = make_config("rotation", name=f"run-{len(masks)}", optim={"epochs": 1, "milestones": []})
        loop.train(config, tmp_path / "runs")
    assert len(masks) == 12
    assert len(set(masks[:8])) == 8
    assert masks[8:] == masks[:4]


def test_a_seed_is_of_the_run_the_step_and_the_rank() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(5) for step in range(20) for rank in range(8)}
    assert len(seeds) == 5 * 20 * 8
    assert step_seed(0, 0, 0) == 15793235383387715774
    assert step_seed(2**32 - 1, 10**7, 1023) < 2**64


def test_a_rate_that_was_not_measured_is_not_told(tmp_path: Path) -> None:
    """Runs of a few steps said 0 images/s."""
    report = loop.TrainReport(tmp_path, 2, 0.0, 0.0, last={"loss": 1.5})
    assert report.text() == f"{tmp_path}: 2 steps\nloss 1.5"
    assert ": 2 steps, 7 images/s (50.0 % of the time" in replace(report, images_per_second=7.2, wait_share=0.5).text()


# --- TensorBoard, and the wait for images


def test_without_tensorboard_a_run_has_its_metrics_and_one_line_says_so(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    metrics._summary_writer.cache_clear()
    for name in ("one", "two"):
        loop.train(make_config(name=name, optim={"epochs": 1, "milestones": []}), tmp_path / "runs")
        assert [line["step"] for line in log_of(tmp_path / "runs" / name)] == [2, 4]
        assert not (tmp_path / "runs" / name / "tensorboard").exists()
    metrics._summary_writer.cache_clear()
    said = [line for line in capsys.readouterr().err.splitlines() if "tensorboard" in line.lower()]
    assert said == [
        "tensorboard is not installed: metrics.jsonl has all metrics, and there is no folder for TensorBoard"
    ]


def test_the_loss_is_the_mean_of_all_steps_and_scalars_are_those_of_the_lines_step(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, measured, entropies = loop.train_step, [], []

    def step(*args: Any, **kwargs: Any) -> Measured:
        measured.append(original(*args, **kwargs))
        return measured[-1]

    entropy = words_module.bag_entropy
    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(words_module, "bag_entropy", lambda *given: entropies.append(entropy(*given)) or entropies[-1])
    config = make_config(runtime={"log_every_steps": 5, "checkpoint_every_steps": 100})
    loop.train(config, tmp_path / "runs")
    lines = log_of(tmp_path / "runs" / config.name)
    losses = [float(one.means["loss"]) for one in measured]
    assert [line["step"] for line in lines] == [5, 10, 12]
    for line, first, entropy_of in zip(lines, (0, 5, 10), entropies, strict=True):
        assert line["loss"] == float(np.float32(np.mean(losses[first : line["step"]])))
        assert line["excess_loss"] == pytest.approx(losses[line["step"] - 1] - float(entropy_of), abs=1e-6)


class Event:
    """A CUDA event on a device whose time is set by the test."""

    now_ms, done_ms = 0.0, 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at_ms = Event.now_ms

    def query(self) -> bool:
        return self.at_ms <= Event.done_ms

    def elapsed_time(self, other: "Event") -> float:
        return other.at_ms - self.at_ms


def test_on_a_gpu_the_wait_for_images_is_that_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is two steps ahead; the stream stands still for 30 ms before each of three steps of 100 ms."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: setattr(Event, "done_ms", 1e9))
    Event.now_ms = Event.done_ms = 0.0
    clock = metrics.DeviceClock(torch.device("cuda", 0))
    for _ in range(3):
        clock.begin()
        Event.now_ms += 30
        clock.end()
        Event.now_ms += 100
        Event.done_ms = max(0, Event.now_ms - 260)
        assert clock.waited_s == 0
    clock.settle()
    assert clock.waited_s == pytest.approx(0.09)
    assert not clock._open
    assert isinstance(Meter(torch.device("cpu"))._clock, metrics.HostClock)
