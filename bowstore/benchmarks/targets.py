"""How long each tier of targets takes for a batch: its part in the reading thread, and its part in the step."""

import time
from pathlib import Path

import numpy as np
import torch

from bowstore.benchmarks.config import TargetsBench
from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.config import SomePaths, StorageConfig
from bowstore.data.index import open_index
from bowstore.environment import choose_device, cores, device_name
from bowstore.progress import Progress
from bowstore.remote import fetch_store
from bowstore.words.store.join import join_rows
from bowstore.words.store.store import open_store
from bowstore.words.targets.bags import bag_of, unpacked, words_bytes
from bowstore.words.targets.tiers import TIERS, Targets, choose_tier


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
    what, store_row_N = opened.layer(layer), join_rows([opened], index)
    tiers = {tier: Targets(tier, what, store_row_N, device, storage=storage) for tier in TIERS}
    rates: dict[str, list[float]] = {tier: [] for tier in TIERS}
    ahead: dict[str, list[float]] = {tier: [] for tier in TIERS}
    step: dict[str, list[float]] = {tier: [] for tier in TIERS}
    with Progress("bench targets", (rounds + 1) * len(tiers), "timings") as progress:
        for number in range(rounds + 1):
            for tier, targets in tiers.items():
                ahead_s, step_s = time_batches(targets, batch=batch, batches=batches, seed=number)
                if number:
                    rates[tier].append(batch * batches / (sum(ahead_s) + sum(step_s)))
                    ahead[tier] += ahead_s
                    step[tier] += step_s
                progress.advance()
    micro = {tier: (1e6 * float(np.median(ahead[tier])), 1e6 * float(np.median(step[tier]))) for tier in TIERS}
    size = words_bytes(len(index), what.grid)
    chosen, reason = choose_tier("auto", size, device)
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
        notes=[f"auto takes {chosen} here: {size / 1e6:.4g} MB of words, {reason}"],
    )


def time_batches(targets: Targets, *, batch: int, batches: int, seed: int) -> tuple[list[float], list[float]]:
    """Seconds of the host's part of random batches, and of the device's, one after another, without reading ahead."""
    draw, ahead_s, step_s = np.random.default_rng(seed), list[float](), list[float]()
    for _ in range(batches):
        rows_B = draw.integers(0, len(targets), batch)
        begun = time.perf_counter()
        ahead = targets.ahead(rows_B)
        gathered = time.perf_counter()
        bag_of(unpacked(targets.words(rows_B, ahead)), "count")
        if targets.device.type == "cuda":
            torch.cuda.synchronize(targets.device)
        ahead_s.append(gathered - begun)
        step_s.append(time.perf_counter() - gathered)
    return ahead_s, step_s
