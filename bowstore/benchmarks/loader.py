"""What the loader can do without a network behind it, stage by stage, and which stage binds.

The train view is made with its end after each stage in turn: the difference between two ends is what a stage costs.
All ends, and the planning and reading that feed them, are timed in interleaved rounds. On a CPU everything after the
resize is one pass: its stage is `normalise`, and flip, jitter and CutMix are what they add to it.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, pairwise, product
from typing import Any

import numpy as np
import torch

from bowstore.benchmarks.config import LoaderBench
from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.benchmarks.rounds import in_rounds
from bowstore.config import SomePaths, StorageConfig, ViewConfig
from bowstore.data.config import HW_LOAD
from bowstore.data.feed import PREFETCH
from bowstore.data.finish import AHEAD
from bowstore.data.gpu_decode import gpu_decoding
from bowstore.data.index import Index, open_index
from bowstore.data.pipeline import train_batches
from bowstore.data.plan import Schedule, plans
from bowstore.data.reader import ShardReader
from bowstore.data.views import Stage, stages
from bowstore.environment import choose_device, cores, cores_per_rank, device_name
from bowstore.errors import UsageError

_LOADER = "loader"  # the whole thing, as training calls it


def bench_loader(
    shards: SomePaths, config: LoaderBench, view: ViewConfig, storage: StorageConfig | None = None
) -> BenchResult:
    """Rates of planning, reading, each prefix of the graph, and the loader as training calls it.

    Raises:
        UsageError: fewer images than one batch; a sweep of the hardware decoder without a GPU.
    """
    device, threads = choose_device(config.device), config.threads or cores_per_rank()
    if config.hw_loads and device.type != "cuda":
        raise UsageError("--hw-load sweeps the hardware decoder of a GPU, and there is none; leave it out")
    index = open_index(shards, storage)
    schedule = Schedule(len(index), config.batch // 4 * 4, seed=0)

    def batches(**how: Any) -> Callable[[], Any]:
        drawn = plans(schedule, index, view, start=0, stop=sys.maxsize)
        batch = schedule.batch
        made = train_batches(ShardReader(index), view, drawn, batch=batch, device=device, threads=threads, **how)
        return made.__next__

    to_plan, to_read = (plans(schedule, index, view, start=0, stop=sys.maxsize) for _ in range(2))
    reader = ShardReader(index)
    steps: dict[str, Callable[[], Any]] = {
        "plan": lambda: next(to_plan),
        "read": lambda: reader.read(next(to_read).rows),
        **{stage: batches(until=stage) for stage in stages(device)},
    }
    for load, way in product(config.hw_loads or (HW_LOAD,), config.ways or (None,)):
        parts = [_LOADER, *([f"hw load {load:g}"] if config.hw_loads else []), *([f"decode {way}"] if way else [])]
        steps[", ".join(parts)] = batches(hw_load=load, way=way)
    ways = {name: partial(_rate, step, config.batches, schedule.batch, device) for name, step in steps.items()}
    rates = in_rounds("bench loader", ways, config.rounds, lambda rate: f"{rate:.0f} images/s")
    return _result(rates, index, {"batch": schedule.batch, "threads": threads}, view, device)


def _rate(step: Callable[[], Any], batches: int, batch: int, device: torch.device) -> float:
    """Images/s of one stage; batches made ahead are drained first, and made again before the next one's turn."""
    drain = PREFETCH + AHEAD + 2
    for _ in range(drain):
        step()
    begun = time.perf_counter()
    for _ in range(batches):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begun
    time.sleep(1.25 * seconds * drain / batches)
    return batches * batch / seconds


def _result(
    rates: dict[str, list[float]], index: Index, settings: dict[str, Any], view: ViewConfig, device: torch.device
) -> BenchResult:
    median = {name: float(np.median(values)) for name, values in rates.items()}
    whole = max((name for name in median if name.startswith(_LOADER)), key=lambda name: median[name])
    order = stages(device)
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
    if device.type == "cuda":
        notes.append(f"decoding: {gpu_decoding(device)}")
    return BenchResult(
        protocol="bench/loader",
        device=f"{device_name(device)}, {cores()} cores",
        inputs={"shards": index.fingerprint},
        settings={
            **settings,
            "images": len(index),
            "mean_image_bytes": float(index.size.mean()),
            "view": view.model_dump(),
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
