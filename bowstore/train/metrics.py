"""Metrics of a run: gathered on the device, written as JSON lines and for TensorBoard, shown as progress."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bowstore.config import TrainConfig
from bowstore.data.pipeline import Batch
from bowstore.files import atomic_file
from bowstore.progress import Progress, say
from bowstore.train.distributed import World
from bowstore.train.schedule import steps_per_epoch, total_steps

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to `metrics.jsonl`; on resume, lines behind the checkpoint's step are dropped first."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run / METRICS_FILE
        kept = [line for line in _whole_lines(path) if line["step"] <= step]
        with atomic_file(path) as file:
            file.writelines((json.dumps(line) + "\n").encode() for line in kept)
        self._file = open(path, "a", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float], order: str) -> None:
        """Record the values of one step and the digest of its keys."""
        self._file.write(json.dumps({"step": step, **values, "order": order}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics, in order."""
    return _whole_lines(run / METRICS_FILE)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # a line cut by kill -9
            break
    return lines


class Meter:
    """Sums the steps' scalars on the device and keeps time; nothing here waits for the device but `read`."""

    _WARM_STEPS = 5

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
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
        for name, value in scalars.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._steps += 1
        self._total_steps += 1
        if self._total_steps == self._WARM_STEPS:
            self._start = time.monotonic()
        elif self._start is not None:
            self._timed_images += images
            self._timed_wait_seconds += self._wait_seconds

    def mean_loss(self, world: World) -> float:
        """Mean loss since the last reading, over all ranks; not finite if any step's was not. 0 right after one."""
        loss = self._sums["loss"] / self._steps if self._steps else torch.zeros((), device=self._device)
        return float(world.mean(loss.clone()).item())

    def read(self, world: World) -> dict[str, float]:
        """Means since the last reading, over all ranks."""
        names = sorted(self._sums)
        values = world.mean(torch.stack([self._sums[name].float() / self._steps for name in names])).tolist()
        self._sums, self._steps = {}, 0
        return dict(zip(names, values, strict=True))

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
        self, config: TrainConfig, run: Path, constants: dict[str, float], *, first: int, steps_per_pass: int
    ) -> None:
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

    def close(self) -> None:
        """Close files and the progress line."""
        self.progress.__exit__(None, None, None)
        self._metrics.close()
