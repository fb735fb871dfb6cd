"""The training step on one resident batch: eager, compiled, tuned, and with the teacher in the loop.

What a run costs without its loader (`bench train` compares the two), and what the word store saves it: a teacher in
the loop sees every image once more, and its maps are assigned in every step.
"""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_made_up import LAYER, made_up_index, made_up_store
from torch import Tensor

from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.benchmarks.rounds import Way, interleaved, seconds_of
from bowstore.config import validate
from bowstore.data.index import open_index
from bowstore.data.plan import plans
from bowstore.data.views import Batch
from bowstore.environment import cores, device_name
from bowstore.models.opened import open_network
from bowstore.train.compiling import compiles, compiles_here
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import World
from bowstore.train.loop import data_schedule, placed_network
from bowstore.train.step import build_objective, build_optimizer, train_step, tuned
from bowstore.train.tasks.settings import WordsSettings
from bowstore.train.tasks.task import Task, build_task
from bowstore.words.assign.assign import assign, prepare_words
from bowstore.words.encode.teacher import freeze_teacher


@dataclass(frozen=True)
class StepSettings:
    """What is timed.

    Attributes:
        arch: of the network, and of the teacher.
        size: side of the images, pixels.
        batch: images a step.
        num_words: K.
        grid: cells of a word map, along a side.
        steps: a round.
        rounds: interleaved, after one to warm up.
        device: where it runs.
    """

    arch: str
    size: int
    batch: int
    num_words: int
    grid: int
    steps: int
    rounds: int
    device: torch.device


class StepWay(NamedTuple):
    """One way to run the step.

    Attributes:
        name: in the table.
        runtime: settings of the configuration's `runtime` that differ.
        tuned: whether a GPU is set as training sets it (`bowstore.train.step.tuned`).
    """

    name: str
    runtime: dict[str, Any]
    tuned: bool = False


TEACHER = "teacher in the loop"
_TARGETS = "targets alone"
_PRODUCTS = 4  # of 8192 x 8192 in float32, about 22 ms each on an H100: longer than the host takes for 20 launches


def bench_step(
    settings: StepSettings, ways: Sequence[StepWay], folder: Path, *, teacher_layer: str | None = None
) -> BenchResult:
    """Images/s of each way, and the share of a step that look-up and mixing of the targets take.

    Args:
        settings: sizes.
        ways: what is compared.
        folder: for made-up shards and words.
        teacher_layer: the last way is run with a teacher in the loop, too, and this layer of it is assigned.
    """
    config, batch = _made_up(settings, folder)
    timed: dict[str, Way] = {}
    for way in ways:
        task, step = _stepper(config, way, batch, settings.device)
        timed[way.name] = _repeated(step, settings.steps, way, settings.device)
    if teacher_layer:
        teach = _teacher(teacher_layer, settings, batch.images_BCHW)
        timed[TEACHER] = _repeated(lambda: (teach(), step()), settings.steps, way, settings.device)
    seconds = interleaved("bench step", timed, settings.rounds, settings.device)
    prepared = _repeated(lambda: task.prepare(batch), settings.steps, way, settings.device)
    seconds[_TARGETS] = [_behind_work(prepared, settings.device) for _ in range(settings.rounds + 1)][1:]
    images = settings.batch * settings.steps
    fastest = min((way.name for way in ways), key=lambda name: statistics.median(seconds[name]))
    figures = {"share_targets": _ratio(seconds[_TARGETS], seconds[fastest])}
    if teacher_layer:
        figures["ratio_over_teacher_in_the_loop"] = _ratio(seconds[TEACHER], seconds[ways[-1].name])
    return BenchResult(
        protocol="bench/step",
        device=f"{device_name(settings.device)}, {cores()} cores",
        inputs={},
        settings={name: getattr(settings, name) for name in ("arch", "size", "batch", "num_words", "grid", "steps")},
        unit="images",
        timings=[
            Timing(name, [images / spent for spent in values], f"{1e3 * _step(values, settings):.3g} ms a step")
            for name, values in seconds.items()
        ],
        figures=figures,
        notes=[f"on one resident batch; the targets' share is of the device's time of a step that is {fastest}"],
    )


def _made_up(settings: StepSettings, folder: Path) -> tuple[TrainConfig, Batch]:
    """The configuration, and a batch of noise as the graph would give it, on the device."""
    index = made_up_index(folder / "shards", 2 * settings.batch)
    store = made_up_store(folder / "words.zarr", index, num_words=settings.num_words, grid=settings.grid)
    config = validate(
        TrainConfig,
        {
            "name": "bench",
            "task": WordsSettings(store=store, layer=LAYER),
            "shards": str(index.root),
            "view": {"size": settings.size, "resize": settings.size, "cutmix": True},
            "model": {"arch": settings.arch},
            "optim": {"batch": settings.batch, "epochs": 1, "milestones": [], "warmup_epochs": 0},
        },
        "bench step",
    )
    plan = next(plans(data_schedule(config, index, _alone(settings.device)), index, config.view, start=0, stop=1))
    half = torch.float16 if settings.device.type == "cuda" else torch.float32
    images_BCHW = torch.randn(settings.batch, 3, settings.size, settings.size, device=settings.device, dtype=half)
    return config, Batch(images_BCHW.contiguous(memory_format=torch.channels_last), plan)


def _stepper(config: TrainConfig, way: StepWay, batch: Batch, device: torch.device) -> tuple[Task, Way]:
    """The task, and one step of it, as `bowstore train` makes them."""
    config = config.model_copy(update={"runtime": config.runtime.model_copy(update=way.runtime)})
    assert config.shards is not None, "made up"
    world = _alone(device)
    task = build_task(config, open_index(config.shards), world)
    network = placed_network(task, config, world)
    compiled = compiles_here(compiles(config, task, 1, device), world)
    optimizer, model = build_optimizer(network, config.optim), build_objective(task, config, world, compiled=compiled)
    return task, lambda: train_step(model, optimizer, task, batch, 1e-4)


def _teacher(layer: str, settings: StepSettings, images_BCHW: Tensor) -> Way:
    """Maps and words of a batch, in bfloat16 on a GPU, as anyone would run a teacher in the loop."""
    teacher = freeze_teacher(
        open_network(settings.arch, size=settings.size), [layer], settings.device, size=settings.size,
        precision="bfloat16" if settings.device.type == "cuda" else "float32",
    )  # fmt: skip
    clean_BCHW = images_BCHW.float()
    vectors_ND = _vectors(teacher.maps(clean_BCHW))
    draw = torch.Generator().manual_seed(0)
    some_K = torch.randint(len(vectors_ND), (settings.num_words,), generator=draw).to(settings.device)
    words = prepare_words(vectors_ND[some_K])

    def teach() -> Tensor:
        return assign(_vectors(teacher.maps(clean_BCHW)), words)

    return teach


def _vectors(maps: Mapping[str, Tensor]) -> Tensor:
    (map_Bchw,) = maps.values()
    return map_Bchw.permute(0, 2, 3, 1).flatten(0, 2)


def _repeated(step: Way, steps: int, way: StepWay, device: torch.device) -> Way:
    def run() -> None:
        with tuned(device, amp=True) if way.tuned else nullcontext():
            for _ in range(steps):
                step()

    return run


def _behind_work(way: Way, device: torch.device) -> float:
    """Seconds that a way takes of the device where its launches wait behind other work, as a step's do.

    Alone, the short kernels of the targets wait for the host, which in training is a step ahead.
    """
    if device.type != "cuda":
        return seconds_of(way, device)
    side_SS = torch.ones(8192, 8192, device=device)
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for _ in range(_PRODUCTS):
        torch.mm(side_SS, side_SS)
    begun.record()  # type: ignore[no-untyped-call]
    way()
    ended.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    return float(begun.elapsed_time(ended)) / 1e3  # type: ignore[no-untyped-call]


def _alone(device: torch.device) -> World:
    return World(0, 1, device)


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Median over the rounds."""
    return statistics.median(ours / theirs for ours, theirs in zip(seconds, others, strict=True))


def _step(seconds: Sequence[float], settings: StepSettings) -> float:
    return statistics.median(seconds) / settings.steps
