"""Metrics of a run: gathered on the device, written as JSON lines and for TensorBoard, shown as progress."""

import io
import json
import os
import secrets
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bowstore.data.views import Batch
from bowstore.files import atomic_file, open_end
from bowstore.progress import Progress, say
from bowstore.runs import BOARD_FOLDER, METRICS_FILE, lost_lines, metric_lines
from bowstore.train.checkpoint import aside
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import World
from bowstore.train.probe import Probed
from bowstore.train.schedule import steps_per_epoch, total_steps
from bowstore.train.watch import Watch


class MetricsLog:
    """Appends to `metrics.jsonl`; on resume, lines behind the checkpoint's step are dropped first."""

    def __init__(self, run: Path, step: int) -> None:
        path = run / METRICS_FILE
        lines, problems = metric_lines(run)
        for problem in problems:
            copy = aside(path, "damaged")
            with atomic_file(copy) as file:
                file.write(path.read_bytes())
            say(f"warning: {problem}; the file as it was is kept as {copy.name}")
        with atomic_file(path) as file:
            file.writelines((json.dumps(line) + "\n").encode() for line in lines if line["step"] <= step)
        self._file = io.TextIOWrapper(open_end(path), encoding="utf-8", line_buffering=True)
        # Its writer follows links; nobody can lay one under a name that cannot be foreseen.
        suffix = f".{secrets.token_hex(4)}"
        writer = _summary_writer()
        self._board = writer(str(run / BOARD_FOLDER), purge_step=step + 1, filename_suffix=suffix) if writer else None

    def write(self, step: int, values: dict[str, float], order: str) -> None:
        """Record the values of one step and the digest of its keys."""
        self._file.write(json.dumps({"step": step, **values, "order": order}) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Make all lines durable: a checkpoint is never newer than its log."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        if self._board:
            self._board.close()


@cache
def _summary_writer() -> Any:
    """TensorBoard's writer; None, and a line the first time, where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # where TensorBoard is installed
    except ImportError:
        say(f"tensorboard is not installed: {METRICS_FILE} has all metrics, and there is no folder for TensorBoard")
        return None
    return SummaryWriter


def last_logged(state: dict[str, Any]) -> int | None:
    """The step of the last line that was logged before a checkpoint; 0 for none, None if it does not say."""
    return state["step"] - state["meter"]["steps"] if "meter" in state else None


def _keep_log_of_lost(run: Path, checkpoint_every_steps: int) -> None:
    """Before a run begins anew: keep the log of one that had checkpoints, which are gone."""
    last = max((line["step"] for line in metric_lines(run)[0]), default=0)
    if last >= checkpoint_every_steps:
        path = run / METRICS_FILE
        copy = path.rename(aside(path, "before"))
        say(
            f"warning: {run} has no checkpoint, though it was trained to step {last}: it begins anew, and the log of "
            f"then is kept as {copy.name}"
        )


class HostClock:
    """Seconds spent waiting for images where the host computes: from asking for a batch until it is there.

    Attributes:
        waited_s: so far.
    """

    def __init__(self) -> None:
        self.waited_s = self._begun = 0.0

    def begin(self) -> None:
        """Images are asked for."""
        self._begun = time.monotonic()

    def end(self) -> None:
        """They are there."""
        self.waited_s += time.monotonic() - self._begun

    def settle(self) -> None:
        """Wait until all that was begun has ended."""


class DeviceClock:
    """The same where a GPU computes: seconds that its stream, done with one step, waited for the next one's images.

    The host is ahead of the device and gets images that are still being decoded, so the clock is the stream's own: an
    event behind the step before, and one behind what makes the stream wait for the images.

    Attributes:
        waited_s: so far, of what the device has done.
    """

    def __init__(self, device: torch.device) -> None:
        self.waited_s = 0.0
        self._device = device
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self) -> None:
        """Images are asked for."""
        self._begun = self._event()

    def end(self) -> None:
        """They are there, or what follows on the stream will wait for them."""
        self._open.append((self._begun, self._event()))
        self._collect()

    def settle(self) -> None:
        """Wait until all that was begun has ended."""
        torch.cuda.synchronize(self._device)
        self._collect()

    def _collect(self) -> None:
        while self._open and self._open[0][1].query():  # type: ignore[no-untyped-call]
            begun, ended = self._open.popleft()
            self.waited_s += begun.elapsed_time(ended) / 1e3

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class Meter:
    """Sums the steps' scalars on the device and keeps time; nothing here waits for the device but what reads them.

    Sums are float64: exact for float32 scalars of like size, so that a mean does not depend on where a run stopped.
    """

    _WARM_STEPS = 5

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._last_loss = torch.zeros((), device=device)
        self._steps = self._total_steps = self._timed_images = 0
        self._clock = DeviceClock(device) if device.type == "cuda" else HostClock()
        self._start: float | None = None

    def waiting_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, keeping the time spent waiting for each."""
        while True:
            self._clock.begin()
            batch = next(batches, None)
            self._clock.end()
            if batch is None:
                return
            yield batch

    def count(self, images: int, means: dict[str, Tensor]) -> None:
        """Add what is known of every step."""
        self._last_loss = means["loss"]
        for name, value in means.items():
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value.to(torch.float64, copy=True)
        self._steps += 1
        self._total_steps += 1
        if self._total_steps == self._WARM_STEPS:
            self._clock.settle()
            self._clock.waited_s, self._start = 0.0, time.monotonic()
        elif self._start is not None:
            self._timed_images += images

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside the block is no training: it does not count for the rates."""
        self._clock.settle()
        begun = time.monotonic()
        try:
            yield
        finally:
            if self._start is not None:
                self._start += time.monotonic() - begun

    def losses(self, world: World) -> tuple[float, float]:
        """Loss of the last step, and the mean since the last reading (not finite if any step's was not).

        Over all ranks; after a step at least.
        """
        mean = self._sums["loss"] / self._steps
        last, mean = world.mean(torch.stack([self._last_loss.double(), mean])).tolist()
        return last, mean

    def read(self, world: World, scalars: dict[str, Tensor] | None = None) -> dict[str, float]:
        """Means since the last reading, and the scalars of this step, over all ranks, as float32 values."""
        scalars = scalars or {}
        values = self._sums | {name: value.double() for name, value in scalars.items()}
        names = sorted(values)
        found = world.mean(torch.stack([values[name] for name in names]))
        found = found / torch.tensor([1 if name in scalars else self._steps for name in names], device=found.device)
        self._sums, self._steps = {}, 0
        return dict(zip(names, found.float().tolist(), strict=True))

    def state(self, world: World) -> dict[str, Any]:
        """What has been gathered since the last reading, as plain values for a checkpoint; the same on every rank."""
        names = sorted(self._sums)
        sums = world.mean(torch.stack([self._sums[name] for name in names])).tolist() if names else []
        return {"steps": self._steps, "sums": dict(zip(names, sums, strict=True))}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds, on any number of ranks."""
        self._steps = int(state["steps"])
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64, device=self._device) for name, value in state["sums"].items()
        }

    def rates(self) -> tuple[float, float]:
        """Images/s over all ranks and the share of the time spent waiting for images, without the first steps."""
        self._clock.settle()
        if self._start is None or not self._timed_images:
            return 0.0, 0.0
        seconds = time.monotonic() - self._start
        return self._timed_images / seconds, self._clock.waited_s / seconds


class RunLog:
    """Metrics files and progress of rank 0."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        constants: dict[str, float],
        watch: Watch,
        *,
        first: int,
        logged: int | None,
        steps_per_pass: int,
    ) -> None:
        for line in lost_lines(run, logged):
            say(f"warning: {line}")
        if not first:
            _keep_log_of_lost(run, config.runtime.checkpoint_every_steps)
        self._metrics = MetricsLog(run, first)
        self._constants, self.watch = constants, watch
        self._epoch_steps = steps_per_epoch(config.optim, steps_per_pass)
        self.last: dict[str, float] = {}
        self._probed = ""
        what = f"train {config.name}" + (f" from step {first}" if first else "")
        batch = config.optim.batch
        total = total_steps(config.optim, steps_per_pass)
        self.progress = Progress(what, total * batch, done=first * batch)
        self.progress.__enter__()

    def write(self, step: int, values: dict[str, float], order: str, probed: Probed | None = None) -> None:
        """Record one logging step, with the digest of its keys, and say what is wrong with the run."""
        self.last = {"epoch": step / self._epoch_steps, **values, **self.watch.features.rank(step), **self._constants}
        if probed:
            self.last |= probed.values
            self._probed = f", {probed.note}" if probed.note else ""
        self._metrics.write(step, {**self.last, "images_per_second": self.progress.rate}, order)
        self.progress.advance(0, note=f"loss {values['loss']:.4f}{self._probed}")
        for sentence in self.watch.warnings(step, self.last):
            say(f"warning: {sentence}")

    def sync(self) -> None:
        """Make what was logged durable."""
        self._metrics.sync()

    def close(self) -> None:
        """Close files and the progress line."""
        self.progress.__exit__(None, None, None)
        self._metrics.close()


@contextmanager
def paused(meter: Meter, log: RunLog | None) -> Iterator[None]:
    """What is done inside the block is no training; it may show progress of its own."""
    with meter.paused(), log.progress.paused() if log else nullcontext():
        yield
