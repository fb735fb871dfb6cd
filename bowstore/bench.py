"""What each stage can do on this machine.

Both sides of a comparison run interleaved in one process, because machines are noisy: medians of rounds count.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bowstore.config import TrainConfig
from bowstore.data.index import open_index
from bowstore.data.pipeline import Batch, train_batches
from bowstore.data.plan import plans
from bowstore.data.reader import ShardReader
from bowstore.environment import device_name, library_versions
from bowstore.files import write_json
from bowstore.progress import Progress
from bowstore.train.distributed import joined
from bowstore.train.loop import build_optimizer, data_schedule, train_step, wrap_network
from bowstore.train.tasks import build_task


@dataclass(frozen=True)
class TrainingBench:
    """Rates of interleaved rounds.

    Attributes:
        loader: images/s with the loader, each round.
        resident: images/s of the same step on one batch that stays where it is, each round.
        batch: images a step.
        device: where it ran.
        inputs: identity of shards and words.
    """

    loader: list[float]
    resident: list[float]
    batch: int
    device: str
    inputs: dict[str, str]

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios, loader over resident."""
        return statistics.median(a / b for a, b in zip(self.loader, self.resident, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "protocol": "bench/train",
            "protocol_version": 1,
            "device": self.device,
            "inputs": self.inputs,
            "versions": library_versions(),
            "batch": self.batch,
            "images_per_second_loader": self.loader,
            "images_per_second_resident": self.resident,
            "ratio_over_resident": self.ratio,
        }

    def text(self) -> str:
        """A table for people."""
        rows = [("with the loader", self.loader), ("resident data", self.resident)]
        lines = [f"{'images/s, batch ' + str(self.batch):24}{'median':>10}{'min':>10}{'max':>10}"]
        lines += [f"{what:24}{statistics.median(r):10.0f}{min(r):10.0f}{max(r):10.0f}" for what, r in rows]
        lines.append(f"ratio, median of {len(self.loader)} rounds: {self.ratio:.3f} ({self.device})")
        return "\n".join(lines)


def bench_training(config: TrainConfig, out: Path, *, steps: int, rounds: int) -> TrainingBench:
    """Time training steps fed by the loader against the same steps on one resident batch.

    Args:
        config: resolved, as for `bowstore train`; nothing is trained for keeps.
        out: result file.
        steps: timed steps of each side a round.
        rounds: interleaved rounds.
    """
    assert config.shards is not None, "the command line resolves shards"
    with joined(config.runtime.device) as world:
        index = open_index(config.shards)
        schedule = data_schedule(config, index, world)
        task = build_task(config, index, world)
        network = task.network.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer, model = build_optimizer(network, config), wrap_network(network, config, world)
        batches = train_batches(
            ShardReader(index),
            config.view,
            plans(schedule, index, config.view, start=0, stop=(2 * steps + 10) * (rounds + 1)),
            batch=schedule.rank_batch,
            device=world.device,
            threads=config.runtime.threads,
        )

        def rate(source: Iterator[Batch], count: int) -> float:
            begun = time.perf_counter()
            for _ in range(count):
                train_step(model, optimizer, task, next(source), 1e-4, amp=config.runtime.amp)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            return count * config.optim.batch / (time.perf_counter() - begun)

        resident = _repeat(next(batches))
        rate(batches, 5)  # compilation, allocator and decoder warm up
        loader_rates, resident_rates = [], []
        with Progress("bench train", rounds, "rounds") as progress:
            for _ in range(rounds):
                # While resident steps run the decoder fills its queue; two steps drain it again.
                resident_rates.append(rate(resident, steps))
                rate(batches, 4)
                loader_rates.append(rate(batches, steps))
                progress.advance()
        result = TrainingBench(
            loader=loader_rates,
            resident=resident_rates,
            batch=config.optim.batch,
            device=device_name(world.device),
            inputs=task.inputs,
        )
        if world.first:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, result.as_dict())
        return result


def _repeat(batch: Batch) -> Iterator[Batch]:
    kept = Batch(batch.images_BCHW.clone(memory_format=torch.preserve_format), batch.plan)
    while True:
        yield kept
