"""Training with its loader over the same step on resident data: what the loader costs a run.

Both sides run interleaved in one process, because machines are noisy: the median of the rounds' ratios counts.
"""

import statistics
import time
from collections.abc import Iterator

import torch

from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.data.feed import PREFETCH
from bowstore.data.index import open_index
from bowstore.data.pipeline import train_batches
from bowstore.data.plan import plans
from bowstore.data.reader import ShardReader, fetched
from bowstore.data.views import Batch
from bowstore.environment import device_name
from bowstore.progress import Progress
from bowstore.train.compiling import compiles, compiles_here
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import joined
from bowstore.train.loop import data_schedule, placed_network
from bowstore.train.schedule import total_steps
from bowstore.train.step import build_objective, build_optimizer, train_step, tuned
from bowstore.train.tasks.task import build_task

_WARM_STEPS = 5


def bench_training(config: TrainConfig, *, steps: int, rounds: int) -> BenchResult | None:
    """Time training steps fed by the loader against the same steps on one resident batch.

    Args:
        config: resolved, as for `bowstore train`; nothing that is trained is kept.
        steps: timed steps of each side a round.
        rounds: interleaved rounds.

    Returns:
        The result on the first rank, None on the others.
    """
    assert config.shards is not None, "the command line resolves shards"
    with joined(config.runtime.device) as world, tuned(world.device, amp=config.runtime.amp):
        index = open_index(config.shards, config.runtime.storage)
        schedule = data_schedule(config, index, world)
        task = build_task(config, index, world)
        network = placed_network(task, config, world)
        length = total_steps(config.optim, schedule.steps_per_pass)
        compiled = compiles_here(compiles(config, task, length, world.device), world)
        optimizer, model = (
            build_optimizer(network, config.optim),
            build_objective(task, config, world, compiled=compiled),
        )
        drain = PREFETCH + 2
        batches = train_batches(
            ShardReader(fetched(index, images=schedule.images, whole=True, display=world.first)),
            config.view,
            plans(schedule, index, config.view, start=0, stop=_WARM_STEPS + 1 + (steps + drain) * rounds + drain),
            batch=schedule.rank_batch,
            device=world.device,
            threads=config.runtime.threads,
            hw_load=config.runtime.hw_decoder_load,
            ahead=task.ahead,
        )

        def rate(source: Iterator[Batch], count: int) -> tuple[float, float]:
            """Images/s, and the share of the time that the host is in the loader and launches nothing."""
            begun, asking = time.perf_counter(), 0.0
            for _ in range(count):
                asked = time.perf_counter()
                batch = next(source)
                asking += time.perf_counter() - asked
                train_step(model, optimizer, task, batch, 1e-4)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begun
            return count * config.optim.batch / seconds, asking / seconds

        resident = _repeat(next(batches))
        rate(batches, _WARM_STEPS)  # compilation, allocator and decoder warm up
        resident_rates: list[float] = []
        loaded: list[tuple[float, float]] = []
        with Progress("bench train", rounds, "rounds", shown=world.first) as progress:
            for _ in range(rounds):
                # The decoder fills its queue while resident steps run; a few steps drain it again.
                resident_rates.append(rate(resident, steps)[0])
                rate(batches, drain)
                loaded.append(rate(batches, steps))
                progress.advance()
        if not world.first:
            return None
        loader_rates, asking = map(list, zip(*loaded, strict=True))
        ratio = statistics.median(a / b for a, b in zip(loader_rates, resident_rates, strict=True))
        return BenchResult(
            protocol="bench/train",
            version=2,
            device=device_name(world.device),
            inputs=task.inputs,
            settings={"batch": config.optim.batch, "ranks": world.size, "config": config.name, "compiled": compiled},
            unit="images",
            timings=[Timing("with the loader", loader_rates), Timing("resident data", resident_rates)],
            figures={"ratio_over_resident": ratio, "share_asking": statistics.median(asking)},
        )


def _repeat(batch: Batch) -> Iterator[Batch]:
    kept = Batch(batch.images_BCHW.clone(memory_format=torch.preserve_format), batch.plan, batch.ahead)
    while True:
        yield kept
