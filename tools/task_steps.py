"""bowstore's training step of a task against the same step written by hand in plain PyTorch, in interleaved rounds.

    python tools/task_steps.py --task location
    python tools/task_steps.py --task location --config mine.yaml --shards data/shards/train --json
    python tools/task_steps.py --task location --processor       # where others use the machine, too

Both begin with the same weights and see the same batches, which lie in memory: images of noise, or with --shards those
of the loader. The losses of the first step must agree. What counts is the median of the rounds' ratios.

Another task takes a function in `BY_HAND`, what a user would write without bowstore, and its settings in `SETTINGS`.
"""

import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F
from gpu_made_up import LAYER, made_up_index, made_up_store
from torch import Tensor

from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.benchmarks.rounds import Way, in_rounds, seconds_of
from bowstore.config import places, validate
from bowstore.data.index import open_index
from bowstore.data.pipeline import train_batches
from bowstore.data.plan import plans
from bowstore.data.reader import ShardReader
from bowstore.data.views import Batch
from bowstore.environment import cores, device_name
from bowstore.errors import BowstoreError, UsageError
from bowstore.overrides import apply_overrides
from bowstore.train.config import TrainConfig, load_train_config
from bowstore.train.distributed import World
from bowstore.train.loop import data_schedule, placed_network
from bowstore.train.step import build_objective, build_optimizer, train_step, tuned
from bowstore.train.tasks.location import corners
from bowstore.train.tasks.task import Network, Task, build_task
from bowstore.words.store.join import join_rows
from bowstore.words.store.store import open_store

_BATCHES = 4  # in memory, taken in turn
_RATE = 1e-4  # so low that both stay where they are: what is timed does not depend on it
_CLOSE = 1e-3  # of the first losses


class Made(NamedTuple):
    """What a hand-written step is made of.

    Attributes:
        config: of the run.
        task: the product's, for sizes and tables of targets; its network is trained by the product.
        network: a copy of that network, to train.
        format: how weights and maps of both lie in memory.
    """

    config: TrainConfig
    task: Task
    network: Network
    format: torch.memory_format


Loss = Callable[[Batch], Tensor]


def location(made: Made) -> Loss:
    """Patches cut by slices, standardised, pooled and paired with the centre; one cross-entropy."""
    settings: Any = made.config.task
    trunk, head, side = made.network.backbone, made.network.head, settings.patch
    around = [0, 1, 2, 3, 5, 6, 7, 8]

    def loss(batch: Batch) -> Tensor:
        patches = [
            image[:, top : top + side, left : left + side]
            for image, corner_P2 in zip(batch.images_BCHW, corners(batch.plan, settings).tolist(), strict=True)
            for top, left in corner_P2
        ]
        inputs = torch.stack(patches).to(memory_format=made.format).float()
        variance, mean = torch.var_mean(inputs, (1, 2, 3), correction=0, keepdim=True)
        feature_NC = trunk.trunk((inputs - mean) / (variance + 1e-10).sqrt()).mean((2, 3))
        feature_BPC = feature_NC.view(-1, 9, feature_NC.shape[1])
        pairs = torch.cat([feature_BPC[:, around], feature_BPC[:, 4:5].expand(-1, 8, -1)], 2).flatten(0, 1)
        logits = head.linear(F.relu(head.norm(head.hidden(pairs))))
        return F.cross_entropy(logits, torch.arange(8, device=logits.device).repeat(len(feature_BPC)))

    return loss


def words(made: Made) -> Loss:
    """A pyramid's dense targets: each cell's histogram, mirrored and mixed; a cosine head and a cross-entropy each."""
    settings: Any = made.config.task
    store, index = open_store(settings.store[0]), open_index(made.config.shards)
    table_Nhw = torch.from_numpy(store.load_words(settings.layer)[join_rows([store], index)].astype(np.int64))
    num_words, side = store.layer(settings.layer).num_words, table_Nhw.shape[1]

    def loss(batch: Batch) -> Tensor:
        plan, device = batch.plan, batch.images_BCHW.device
        words_Bhw = table_Nhw[torch.from_numpy(plan.rows)].to(device)
        mirror_B = torch.from_numpy(plan.mirror != 0).to(device)
        words_Bhw = torch.where(mirror_B[:, None, None], words_Bhw.flip(2), words_Bhw)
        partner_B = torch.from_numpy(plan.partner.astype(np.int64)).to(device)
        feature_BC = made.network.backbone(batch.images_BCHW.to(memory_format=made.format).float()).float()
        heads, losses = iter(made.network.head), []
        for grid in settings.grids:
            kept_BP, step = torch.from_numpy(plan.kept_in((grid, grid))).to(device), side // grid
            for cell in range(grid * grid):
                top, left = step * (cell // grid), step * (cell % grid)
                words_Bm = words_Bhw[:, top : top + step, left : left + step].flatten(1)
                target_BK = F.one_hot(words_Bm, num_words).float().mean(1)
                kept_B1 = kept_BP[:, cell, None]
                target_BK = kept_B1 * target_BK + (1 - kept_B1) * target_BK[partner_B]
                head = next(heads)
                logits_BK = head.gamma * F.linear(feature_BC, F.normalize(head.weight, dim=1))
                losses.append(F.cross_entropy(logits_BK, target_BK))
        return torch.stack(losses).mean()

    return loss


def clusters(made: Made) -> Loss:
    """All images in four rotations, pooled once; their clusters as dense targets, mixed as they are, and rotations."""
    settings, trunk, (head, rotations) = made.config.task, made.network.backbone, made.network.head
    table: Any = made.task.renewal
    cluster_N = torch.from_numpy(table.cluster_N)

    def loss(batch: Batch) -> Tensor:
        images, plan, number = batch.images_BCHW.float(), batch.plan, settings.clusters
        inputs = torch.cat([torch.rot90(images, quarter, (2, 3)) for quarter in range(4)])
        feature_BC = trunk.trunk(inputs.to(memory_format=made.format)).mean((2, 3))
        target_BK = F.one_hot(cluster_N[torch.from_numpy(plan.rows)], number).float().to(images.device)
        if plan.mixed:
            kept_B1 = torch.from_numpy(plan.kept)[:, None].to(images.device)
            target_BK = kept_B1 * target_BK + (1 - kept_B1) * target_BK[torch.from_numpy(plan.partner).long()]
        logits_BK = head.gamma * F.linear(feature_BC, F.normalize(head.weight))
        quarter_B = torch.arange(4, device=images.device).repeat_interleave(len(images))
        return F.cross_entropy(logits_BK, target_BK.repeat(4, 1)) + F.cross_entropy(rotations(feature_BC), quarter_B)

    return loss


def linear(made: Made) -> Loss:
    """The maps of all stages and the pooled output, without gradients; batch norm and a linear layer for each."""
    trunk, heads, labels = made.network.backbone, list(made.network.head), open_index(made.config.shards).label

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            map_BChw, pooled = batch.images_BCHW.to(memory_format=made.format).float(), []
            for stage in trunk.stages.values():
                map_BChw = stage(map_BChw)
                side = min(math.isqrt(9216 // map_BChw.shape[1]), map_BChw.shape[2])
                pooled.append(F.adaptive_avg_pool2d(map_BChw, side).flatten(2))
            pooled.append(map_BChw.mean((2, 3))[:, :, None])
        label_B = torch.from_numpy(labels[batch.plan.rows].astype(np.int64)).to(map_BChw.device)
        logits = [head.linear(head.norm(one).flatten(1)) for head, one in zip(heads, pooled, strict=True)]
        return sum(F.cross_entropy(logits_BK, label_B) for logits_BK in logits)

    return loss


BY_HAND: dict[str, Callable[[Made], Loss]] = {
    "location": location, "words": words, "clusters": clusters, "linear": linear,
}  # fmt: skip

# Of a step that takes two cores a second or less, where no configuration is named; each task's own below.
_SMALL: dict[str, dict[str, Any]] = {
    "view": {"size": 32, "resize": None, "cutmix": True},
    "model": {"arch": "wrn-10-1", "strides": [2, 2, 1]},
    "optim": {"batch": 64, "epochs": 1},
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "words": {"task": {"form": "pyramid"}},
    "clusters": {"task": {"clusters": 16}, "optim": {"batch": 16}},
    "linear": {"view": {"cutmix": False}},
    "location": {
        "task": {"patch": 21, "jitter": 7},
        "view": {"size": 84, "cutmix": False},
        "model": {"strides": [2, 2, 2]},
    },
}


def compare(
    config: TrainConfig,
    shards: Path | None,
    folder: Path,
    *,
    steps: int,
    rounds: int,
    device: torch.device,
    processor: bool = False,
) -> BenchResult:
    """Time both.

    Args:
        config: of the task; without shards and store where these are made up.
        shards: real ones, None for noise.
        folder: for what is made up.
        steps: a round.
        rounds: interleaved, after one that warms up.
        device: where they run.
        processor: count seconds of one core, which a crowded machine does not stretch, instead of time.

    Raises:
        UsageError: the two steps do not compute the same loss.
    """
    world = World(0, 1, device)
    config = _with_data(config, shards, folder)
    task = build_task(config, open_index(config.shards), world)
    network = placed_network(task, config, world)
    batches = _batches(config, world, made_up=shards is None)
    ours = _product(config, task, network, world)
    theirs = _hand(Made(config, task, copy.deepcopy(network), network.memory_format(device)), world)
    first = [step(batches[0]) for step in (ours, theirs)]
    if not math.isclose(*first, rel_tol=_CLOSE):
        raise UsageError(f"the losses of the first step are {first[0]:.6g} and {first[1]:.6g}: not the same step")
    turns = {name: cycle(batches) for name in ("bowstore", "by hand")}
    ways = {
        name: lambda step=step, turn=turns[name]: [step(next(turn)) for _ in range(steps)]
        for name, step in (("bowstore", ours), ("by hand", theirs))
    }
    clock = _processor_seconds if processor else partial(seconds_of, device=device)
    timed = {name: partial(clock, way) for name, way in ways.items()}
    with tuned(device, amp=config.runtime.amp):
        seconds = in_rounds(f"steps of {config.task.name}", timed, rounds, lambda spent: f"{1e3 * spent:.1f} ms")
    images = steps * config.optim.batch
    ratios = [a / b for a, b in zip(seconds["bowstore"], seconds["by hand"], strict=True)]
    return BenchResult(
        protocol="bench/task_steps",
        device=f"{device_name(device)}, {cores()} cores",
        inputs=task.inputs,
        settings={
            "task": config.task.name,
            "arch": config.model.arch,
            "batch": config.optim.batch,
            "steps": steps,
            "processor": processor,
        },
        unit="images",
        timings=[
            Timing(name, [images / value for value in values], f"{1e3 * median(values) / steps:.4g} ms a step")
            for name, values in seconds.items()
        ],
        figures={"time_over_by_hand": median(ratios), "least": min(ratios), "most": max(ratios)},
    )


def _processor_seconds(way: Way) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # those that wait for others count as working
    try:
        begun = time.process_time()
        way()
        return time.process_time() - begun
    finally:
        torch.set_num_threads(threads)


def _product(config: TrainConfig, task: Task, network: Network, world: World) -> Callable[[Batch], float]:
    optimizer, model = build_optimizer(network, config.optim), build_objective(task, config, world, compiled=False)
    return lambda batch: train_step(model, optimizer, task, batch, _RATE).means["loss"]


def _hand(made: Made, world: World) -> Callable[[Batch], Tensor]:
    """The step of any training loop around the loss."""
    made.task.modes(made.network)
    loss_of, optim = BY_HAND[made.config.task.name](made), made.config.optim
    trained = [parameter for parameter in made.network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=_RATE, momentum=optim.momentum, nesterov=optim.nesterov, weight_decay=optim.weight_decay, fused=True
    )
    half = world.device.type == "cuda" and made.config.runtime.amp

    def step(batch: Batch) -> Tensor:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=half):
            loss = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _with_data(config: TrainConfig, shards: Path | None, folder: Path) -> TrainConfig:
    """The configuration with its shards, and for tasks that have one, with a store of random words."""
    index = open_index(shards) if shards else made_up_index(folder / "shards", _BATCHES * config.optim.batch, side=256)
    task = config.task
    if "store" in type(task).model_fields and getattr(task, "store", None) is None:
        store = made_up_store(folder / "words.zarr", index, num_words=256, grid=8)
        task = task.model_copy(update={"store": places(store), "layer": LAYER})
    return config.model_copy(update={"shards": places(index.root), "task": task})


def _batches(config: TrainConfig, world: World, *, made_up: bool) -> list[Batch]:
    index = open_index(config.shards)
    steps = list(plans(data_schedule(config, index, world), index, config.view, start=0, stop=_BATCHES))
    if not made_up:
        loaded = train_batches(ShardReader(index), config.view, steps, batch=config.optim.batch, device=world.device)
        return [Batch(batch.images_BCHW.clone(memory_format=torch.preserve_format), batch.plan) for batch in loaded]
    shape, kind = (config.optim.batch, 3, config.view.size, config.view.size), world.device.type
    noise = [torch.randn(shape, device=world.device, dtype=torch.float16 if kind == "cuda" else None) for _ in steps]
    return [
        Batch(images_BCHW.contiguous(memory_format=torch.channels_last), plan)
        for images_BCHW, plan in zip(noise, steps, strict=True)
    ]


def settings_of(task: str, path: Path | None, overrides: tuple[str, ...]) -> TrainConfig:
    """The configuration of a file, or a small one of the task."""
    if path:
        return load_train_config(path, overrides)
    own = SETTINGS.get(task, {})
    values: dict[str, Any] = {key: _SMALL.get(key, {}) | own.get(key, {}) for key in (*_SMALL, "task")}
    values = {**values, "name": "steps", "task": {"name": task, **values["task"]}}
    return validate(TrainConfig, apply_overrides(values, overrides), "task_steps")


@click.command()
@click.option("--task", type=click.Choice(sorted(BY_HAND)), required=True)
@click.option("--config", "path", type=click.Path(path_type=Path), help="Of a run of the task.  [default: a small one]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, for example optim.batch=128.")
@click.option("--shards", type=click.Path(path_type=Path), help="Images of these shards.  [default: noise]")
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Steps of each a round.")
@click.option("--rounds", type=click.IntRange(1), default=11, show_default=True)
@click.option("--processor", is_flag=True, help="Count seconds of one core instead of time, on a CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone.")
def main(
    task: str,
    path: Path | None,
    overrides: tuple[str, ...],
    shards: Path | None,
    steps: int,
    rounds: int,
    processor: bool,
    as_json: bool,
) -> None:
    """The product's step of a task against the same step by hand."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = settings_of(task, path, overrides)
        if config.task.name != task:
            raise UsageError(f"{path} is of task {config.task.name}; name it by --task, or another file")
        with tempfile.TemporaryDirectory() as folder:
            result = compare(
                config, shards, Path(folder), steps=steps, rounds=rounds, device=device, processor=processor
            )
    except BowstoreError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(json.dumps(result.as_dict(), indent=2) if as_json else result.text())


if __name__ == "__main__":
    main()
