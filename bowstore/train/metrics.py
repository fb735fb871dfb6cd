"""Metrics of a run: gathered on the device, written as JSON lines and for TensorBoard, shown as progress."""

import io
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bowstore.config import TrainConfig
from bowstore.data.views import Batch
from bowstore.files import atomic_file, open_end
from bowstore.progress import Progress, say
from bowstore.train.checkpoint import aside
from bowstore.train.distributed import World
from bowstore.train.schedule import steps_per_epoch, total_steps

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to `metrics.jsonl`; on resume, lines behind the checkpoint's step are dropped first."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run / METRICS_FILE
        lines, unread = _read_lines(path)
        if unread:
            copy = aside(path, "damaged")
            with atomic_file(copy) as file:
                file.write(path.read_bytes())
            say(f"warning: {_told(path, unread)}; the file as it was is kept as {copy.name}")
        with atomic_file(path) as file:
            file.writelines((json.dumps(line) + "\n").encode() for line in lines if line["step"] <= step)
        self._file = io.TextIOWrapper(open_end(path), encoding="utf-8", line_buffering=True)
        # Its writer follows links; nobody can lay one under a name that cannot be foreseen.
        suffix = f".{secrets.token_hex(4)}"
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1, filename_suffix=suffix)

    def write(self, step: int, values: dict[str, float], order: str) -> None:
        """Record the values of one step and the digest of its keys."""
        self._file.write(json.dumps({"step": step, **values, "order": order}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Make all lines durable: a checkpoint is never newer than its log."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics, in order; a line that cannot be read is left out with a warning.

    The last line may be cut: a process that is killed while it writes leaves it so, and it is written again.
    """
    path = run / METRICS_FILE
    lines, unread = _read_lines(path)
    if unread:
        say(f"warning: {_told(path, unread)}")
    return lines


def unreadable_lines(run: Path) -> list[str]:
    """What is wrong with a run's metrics file, in lines for people; empty if nothing is."""
    path = run / METRICS_FILE
    _, unread = _read_lines(path)
    return [_told(path, unread)] if unread else []


def lost_lines(run: Path, logged: int | None) -> list[str]:
    """Whether the metrics lack what was logged before a checkpoint, in lines for people.

    Args:
        run: the run directory.
        logged: `last_logged` of the checkpoint.
    """
    path = run / METRICS_FILE
    steps = [line["step"] for line in _read_lines(path)[0]]
    if not logged or logged in steps:
        return []
    have = f"holds no line before step {min(steps)}" if steps and min(steps) > logged else "lacks that line"
    have = have if steps else "holds no line" if path.exists() else "is not there"
    return [f"step {logged} was logged before the newest checkpoint, and {path} {have}; restore it from a copy"]


def last_logged(state: dict[str, Any]) -> int | None:
    """The step of the last line that was logged before a checkpoint; 0 for none, None if it does not say."""
    return state["step"] - state["meter"]["steps"] if "meter" in state else None


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines that are objects with a step, and the numbers (from 1) of the others."""
    try:
        texts = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    lines, unread = [], []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text.decode())
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        elif number < len(texts):  # what follows the last line feed is a cut line, or empty
            unread.append(number)
    return lines, unread


def _told(path: Path, unread: list[int]) -> str:
    some = ", ".join(map(str, unread[:3])) + (", ..." if len(unread) > 3 else "")
    return f"{len(unread)} lines of {path} are no JSON objects with a step (line {some}) and are left out"


def _keep_log_of_lost(run: Path, checkpoint_every_steps: int) -> None:
    """Before a run begins anew: keep the log of one that had checkpoints, which are gone."""
    path = run / METRICS_FILE
    last = max((line["step"] for line in _read_lines(path)[0]), default=0)
    if last >= checkpoint_every_steps:
        copy = path.rename(aside(path, "before"))
        say(
            f"warning: {run} has no checkpoint, though it was trained to step {last}: it begins anew, and the log of "
            f"then is kept as {copy.name}"
        )


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
        self._wait_seconds = self._timed_wait_seconds = 0.0
        self._start: float | None = None

    def waiting_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, keeping the time spent waiting for each."""
        while True:
            begun = time.monotonic()
            batch = next(batches, None)
            self._wait_seconds = time.monotonic() - begun
            if batch is None:
                return
            yield batch

    def count(self, images: int, scalars: dict[str, Tensor]) -> None:
        """Add one step's scalars."""
        self._last_loss = scalars["loss"]
        for name, value in scalars.items():
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value.to(torch.float64, copy=True)
        self._steps += 1
        self._total_steps += 1
        if self._total_steps == self._WARM_STEPS:
            self._start = time.monotonic()
        elif self._start is not None:
            self._timed_images += images
            self._timed_wait_seconds += self._wait_seconds

    def losses(self, world: World) -> tuple[float, float]:
        """Loss of the last step, and the mean since the last reading (not finite if any step's was not).

        Over all ranks; after a step at least.
        """
        mean = self._sums["loss"] / self._steps
        last, mean = world.mean(torch.stack([self._last_loss.double(), mean])).tolist()
        return last, mean

    def read(self, world: World) -> dict[str, float]:
        """Means since the last reading, over all ranks, as float32 values."""
        names = sorted(self._sums)
        values = self._over_ranks(names, world) / self._steps
        self._sums, self._steps = {}, 0
        return dict(zip(names, values.float().tolist(), strict=True))

    def state(self, world: World) -> dict[str, Any]:
        """What has been gathered since the last reading, as plain values for a checkpoint; the same on every rank."""
        names = sorted(self._sums)
        sums = self._over_ranks(names, world).tolist() if names else []
        return {"steps": self._steps, "sums": dict(zip(names, sums, strict=True))}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds, on any number of ranks."""
        self._steps = int(state["steps"])
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64, device=self._device) for name, value in state["sums"].items()
        }

    def _over_ranks(self, names: list[str], world: World) -> Tensor:
        """Sums over the steps of the mean over the ranks, float64."""
        return world.mean(torch.stack([self._sums[name] for name in names]))

    def rates(self) -> tuple[float, float]:
        """Images/s over all ranks and the share of the time spent waiting for images, without the first steps."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._start is None or not self._timed_images:
            return 0.0, 0.0
        seconds = time.monotonic() - self._start
        return self._timed_images / seconds, self._timed_wait_seconds / seconds


class RunLog:
    """Metrics files and progress of rank 0."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        constants: dict[str, float],
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
        self._constants = constants
        self._epoch_steps = steps_per_epoch(config.optim, steps_per_pass)
        self._warned = False
        self.last: dict[str, float] = {}
        what = f"train {config.name}" + (f" from step {first}" if first else "")
        batch = config.optim.batch
        total = total_steps(config.optim, steps_per_pass)
        self.progress = Progress(what, total * batch, done=first * batch)
        self.progress.__enter__()

    def write(self, step: int, values: dict[str, float], order: str) -> None:
        """Record one logging step, with the digest of its keys, and say so when the run is dead."""
        self.last = {"epoch": step / self._epoch_steps, **values, **self._constants}
        self._metrics.write(step, {**self.last, "images_per_second": self.progress.rate}, order)
        self.progress.advance(0, note=f"loss {values['loss']:.4f}")
        marginal = self._constants.get("marginal_loss")
        if marginal is not None and step >= 2 * self._epoch_steps and values["loss"] > 0.995 * marginal:
            if not self._warned:
                say(
                    f"warning: the loss {values['loss']:.4f} is still that of predicting the words' mean "
                    f"frequencies ({marginal:.4f}): nothing is learned (gamma {values['gamma']:.3g}); try a lower "
                    f"optim.lr or words.gamma"
                )
            self._warned = True

    def sync(self) -> None:
        """Make what was logged durable."""
        self._metrics.sync()

    def close(self) -> None:
        """Close files and the progress line."""
        self.progress.__exit__(None, None, None)
        self._metrics.close()
