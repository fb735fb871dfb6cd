"""What the loader can do without a network behind it, stage by stage, and which stage binds.

The train view is made with its end after each stage in turn: the difference between two ends is what a stage costs.
All ends, and the planning and reading that feed them, are timed in interleaved rounds. On a CPU everything after the
resize is one pass: its stage is `normalise`, and flip, jitter and CutMix are what they add to it.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.config import StorageConfig, ViewConfig
from bowstore.data.config import HW_LOAD
from bowstore.data.feed import PREFETCH
from bowstore.data.finish import AHEAD
from bowstore.data.gpu_decode import Way, gpu_decoding
from bowstore.data.index import Index, open_index
from bowstore.data.pipeline import train_batches
from bowstore.data.plan import Plan, Schedule, plans
from bowstore.data.reader import ShardReader
from bowstore.data.views import Stage, stages
from bowstore.environment import cores, device_name
from bowstore.errors import UsageError
from bowstore.progress import Progress

_LOADER = "loader"  # the whole thing, as training calls it


@dataclass(frozen=True)
class LoaderSettings:
    """What is timed.

    Attributes:
        view: the train view.
        batch: images a batch.
        threads: decoding threads.
        device: where the graph runs.
        batches: timed batches of each stage a round.
        rounds: interleaved rounds.
        hw_loads: shares of the GPU's hardware decoder to try, on a GPU.
        ways: of decoding windows to try; without any, that which training takes.
    """

    view: ViewConfig
    batch: int
    threads: int
    device: torch.device
    batches: int
    rounds: int
    hw_loads: tuple[float, ...] = ()
    ways: tuple[Way, ...] = ()


def bench_loader(shards: Path, settings: LoaderSettings, storage: StorageConfig | None = None) -> BenchResult:
    """Rates of planning, reading, each prefix of the graph, and the loader as training calls it.

    Raises:
        UsageError: fewer images than one batch; a sweep of the hardware decoder without a GPU.
    """
    if settings.hw_loads and settings.device.type != "cuda":
        raise UsageError("--hw-load sweeps the hardware decoder of a GPU, and there is none; leave it out")
    index = open_index(shards, storage)
    schedule = Schedule(len(index), settings.batch // 4 * 4, seed=0)
    steps = _steps(index, schedule, settings)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    with Progress("bench loader", (settings.rounds + 1) * len(steps), "timings") as progress:
        for number in range(settings.rounds + 1):
            for name, step in steps.items():
                rate = _rate(step, settings, schedule.batch)
                if number:  # the first round warms the page cache, the allocators and the decoders
                    rates[name].append(rate)
                progress.advance(note=f"{name} {rate:.0f} images/s")
    return _result(rates, index, settings, schedule.batch)


def _steps(index: Index, schedule: Schedule, settings: LoaderSettings) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: each call makes one batch."""

    def planned() -> Iterator[Plan]:
        return plans(schedule, index, settings.view, start=0, stop=sys.maxsize)

    reader = ShardReader(index)
    to_plan, to_read = planned(), planned()
    steps: dict[str, Callable[[], Any]] = {
        "plan": lambda: next(to_plan),
        "read": lambda: reader.read(next(to_read).rows),
    }
    for stage in stages(settings.device):
        steps[stage] = _ended(index, settings, schedule.batch, stage, planned())
    for load, way in product(settings.hw_loads or (HW_LOAD,), settings.ways or (None,)):
        parts = [_LOADER, *([f"hw load {load:g}"] if settings.hw_loads else []), *([f"decode {way}"] if way else [])]
        made = train_batches(
            ShardReader(index),
            settings.view,
            planned(),
            batch=schedule.batch,
            device=settings.device,
            threads=settings.threads,
            hw_load=load,
            way=way,
        )
        steps[", ".join(parts)] = made.__next__
    return steps


def _ended(
    index: Index, settings: LoaderSettings, batch: int, stage: Stage, steps: Iterator[Plan]
) -> Callable[[], Any]:
    """The view with its end after `stage`."""
    made = train_batches(
        ShardReader(index),
        settings.view,
        steps,
        batch=batch,
        device=settings.device,
        threads=settings.threads,
        until=stage,
    )
    return made.__next__


def _rate(step: Callable[[], Any], settings: LoaderSettings, batch: int) -> float:
    """Images/s of one stage; batches made ahead are drained first, and made again before the next one's turn."""
    drain = PREFETCH + AHEAD + 2
    for _ in range(drain):
        step()
    begun = time.perf_counter()
    for _ in range(settings.batches):
        step()
    if settings.device.type == "cuda":
        torch.cuda.synchronize(settings.device)
    seconds = time.perf_counter() - begun
    time.sleep(1.25 * seconds * drain / settings.batches)
    return settings.batches * batch / seconds


def _result(rates: dict[str, list[float]], index: Index, settings: LoaderSettings, batch: int) -> BenchResult:
    median = {name: float(np.median(values)) for name, values in rates.items()}
    whole = max((name for name in median if name.startswith(_LOADER)), key=lambda name: median[name])
    order = stages(settings.device)
    costs = _costs(median, order)
    details = {name: f"{1e6 * seconds:.0f} us an image" for name, seconds in costs.items()}
    details["read"] = f"{median['read'] * float(index.size.mean()) / 1e6:.0f} MB/s"
    feeding = 1 / (1 / median["plan"] + 1 / median["read"])
    dearest = max(costs, key=lambda name: costs[name])
    if feeding < median[order[-1]]:
        binds = "planning and reading (one thread)"
    else:
        binds = f"the view, {100 * costs[dearest] * median[order[-1]]:.0f} % of it {dearest}"
    notes = ["a stage's rate is that of the view up to it; its cost is the difference to the stage before"]
    if settings.device.type == "cuda":
        notes.append(f"decoding: {gpu_decoding(settings.device)}")
    return BenchResult(
        protocol="bench/loader",
        device=f"{device_name(settings.device)}, {cores()} cores",
        inputs={"shards": index.fingerprint},
        settings={
            "batch": batch,
            "threads": settings.threads,
            "images": len(index),
            "mean_image_bytes": float(index.size.mean()),
            "view": settings.view.model_dump(),
        },
        unit="images",
        timings=[Timing(name, values, details.get(name, "")) for name, values in rates.items()],
        binds=binds,
        figures={"images_per_second_loader": median[whole], "images_per_second_feeding": feeding},
        notes=notes,
    )


def _costs(median: dict[str, float], order: Sequence[Stage]) -> dict[str, float]:
    """Seconds an image that each stage of the view adds."""
    ends = {stage: 1 / median[stage] for stage in order}
    first = order[0]
    return dict(
        chain([(first, ends[first])], ((stage, ends[stage] - ends[before]) for before, stage in pairwise(order)))
    )
