"""How long each tier of targets takes for a batch: its part in the reading thread, and its part in the step."""

from pathlib import Path

import numpy as np

from bowstore.benchmarks.config import TargetsBench
from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.config import SomePaths, StorageConfig
from bowstore.data.index import open_index
from bowstore.environment import choose_device, cores, device_name
from bowstore.progress import Progress
from bowstore.remote import fetch_store
from bowstore.words.store.join import join_rows
from bowstore.words.store.store import open_store
from bowstore.words.targets.tiers import TIERS, choose_tier, open_targets, time_batches, words_bytes


def bench_targets(
    store: Path,
    shards: SomePaths,
    layer: str | None,
    config: TargetsBench,
    storage: StorageConfig,
) -> BenchResult:
    """Rows/s and microseconds a batch of random rows, for every tier, in interleaved rounds."""
    device, batch, batches, rounds = choose_device(config.device), config.batch, config.batches, config.rounds
    opened, index = open_store(fetch_store(store, storage)), open_index(shards, storage)
    what, store_row_N = opened.layer(layer), join_rows(opened, index)
    tiers = {tier: open_targets(tier, what, store_row_N, device, storage=storage) for tier in TIERS}
    rates: dict[str, list[float]] = {tier: [] for tier in TIERS}
    ahead: dict[str, list[float]] = {tier: [] for tier in TIERS}
    step: dict[str, list[float]] = {tier: [] for tier in TIERS}
    with Progress("bench targets", (rounds + 1) * len(tiers), "timings") as progress:
        for number in range(rounds + 1):
            for tier, targets in tiers.items():
                times = time_batches(targets, batch=batch, batches=batches, seed=number)
                if number:
                    seconds = sum(times.ahead_s) + sum(times.bag_s)
                    rates[tier].append(batch * batches / seconds)
                    ahead[tier] += times.ahead_s
                    step[tier] += times.bag_s
                progress.advance()
    micro = {tier: (1e6 * float(np.median(ahead[tier])), 1e6 * float(np.median(step[tier]))) for tier in TIERS}
    size = words_bytes(what, len(index))
    choice = choose_tier("auto", size, device)
    return BenchResult(
        protocol="bench/targets",
        device=f"{device_name(device)}, {cores()} cores",
        inputs={"dataset": opened.fingerprint, "shards": index.fingerprint},
        settings={"batch": batch, "layer": what.name, "grid": list(what.grid), "images": len(index)},
        unit="rows",
        timings=[
            Timing(tier, rates[tier], f"a batch: {micro[tier][0]:.0f} us ahead, {micro[tier][1]:.0f} us in the step")
            for tier in TIERS
        ],
        figures={
            **{f"microseconds_ahead_{tier}": micro[tier][0] for tier in TIERS},
            **{f"microseconds_step_{tier}": micro[tier][1] for tier in TIERS},
        },
        notes=[f"auto takes {choice.tier} here: {size / 1e6:.4g} MB of words, {choice.reason}"],
    )
