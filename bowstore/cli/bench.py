"""Commands that measure this machine: bench loader, reader, store, targets, train, assign, encode, kmeans."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bowstore.cli.common import PATH, TEXT, emit
from bowstore.cli.options import Command, fields

_SHARDS = click.option("--shards", type=PATH, help="Indexed shards.  [default: the workspace's]")
_STORE = click.option("--store", type=PATH, help="Word store.  [default: the workspace's]")
_WHICH = "name the one to read by --store"
_LAYER = click.option("--layer", type=TEXT, help="Layer of the store.  [default: its only one]")


@click.group()
def bench() -> None:
    """What each stage can do on this machine, and which one binds; results go to RUNS/bench/NAME.json."""


def _benchmark(model: str, *extra: Any, **how: Any) -> Callable[[Callable[..., None]], click.Command]:
    """A command of `bench`: the options of its configuration, those it has besides, and --json."""

    def decorate(function: Callable[..., None]) -> click.Command:
        json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone.")
        for option in reversed((*extra, fields("given", f"bowstore.benchmarks.config:{model}", **how), json)):
            function = option(function)
        return bench.command(cls=Command)(function)

    return decorate


@_benchmark(
    "LoaderBench",
    click.option("--config", type=PATH, help="Take view and batch from a training configuration."),
    _SHARDS,
    flags={"hw_loads": "--hw-load", "ways": "--decode"},
)
def loader(config: Path | None, shards: Path | None, given: dict[str, Any], as_json: bool) -> None:
    """The train view stage by stage, planning and reading first, and which stage binds."""
    from bowstore.benchmarks.config import LoaderBench
    from bowstore.benchmarks.loader import bench_loader
    from bowstore.config import ViewConfig, load_workspace, validate
    from bowstore.train.config import load_train_config

    workspace, asked = load_workspace(), validate(LoaderBench, given, "bench loader")
    view = ViewConfig(size=asked.size, resize=max(asked.size, 256))
    if config:
        loaded = load_train_config(config)
        view, asked = loaded.view, asked.model_copy(update={"batch": loaded.optim.batch})
    result = bench_loader(shards or workspace.shards, asked, view, workspace.storage)
    _keep(workspace, "loader", result, as_json)


@_benchmark("ReaderBench", _SHARDS)
def reader(shards: Path | None, given: dict[str, Any], as_json: bool) -> None:
    """Encoded bytes of random rows: from memory maps, and by single reads as on a network file system."""
    from bowstore.benchmarks.config import ReaderBench
    from bowstore.benchmarks.reader import bench_reader
    from bowstore.config import load_workspace, validate

    workspace, asked = load_workspace(), validate(ReaderBench, given, "bench reader")
    result = bench_reader(shards or workspace.shards, asked, workspace.storage)
    _keep(workspace, "reader", result, as_json)


@_benchmark("StoreBench", _STORE, _LAYER, _SHARDS)
def store(store: Path | None, layer: str | None, shards: Path | None, given: dict[str, Any], as_json: bool) -> None:
    """A word store: bulk load with every check, and the join of its keys with the shards'."""
    from bowstore.benchmarks.config import StoreBench
    from bowstore.benchmarks.store import bench_store
    from bowstore.config import load_workspace, validate
    from bowstore.workspace import only_store

    workspace = load_workspace()
    place = store or only_store(workspace, _WHICH)
    joined = shards or (workspace.shards if all(folder.exists() for folder in workspace.shards) else None)
    rounds = validate(StoreBench, given, "bench store").rounds
    result = bench_store(place, joined, rounds=rounds, layer=layer, storage=workspace.storage)
    _keep(workspace, "store", result, as_json)


@_benchmark("TargetsBench", _STORE, _LAYER, _SHARDS)
def targets(store: Path | None, layer: str | None, shards: Path | None, given: dict[str, Any], as_json: bool) -> None:
    """Bags of random rows from every tier: words on the device, in host memory, on disk."""
    from bowstore.benchmarks.config import TargetsBench
    from bowstore.benchmarks.targets import bench_targets
    from bowstore.config import load_workspace, validate
    from bowstore.workspace import only_store

    workspace, asked = load_workspace(), validate(TargetsBench, given, "bench targets")
    place = store or only_store(workspace, _WHICH)
    result = bench_targets(place, shards or workspace.shards, layer, asked, workspace.storage)
    _keep(workspace, "targets", result, as_json)


@_benchmark(
    "TrainBench",
    click.option("--config", type=PATH, help="YAML file.  [default: as for `bowstore train`]"),
    click.option(
        "--set", "overrides", type=TEXT, multiple=True, metavar="KEY=VALUE", help="Override, as in optim.batch=64."
    ),
    _SHARDS,
    _STORE,
)
def train(
    config: Path | None,
    overrides: tuple[str, ...],
    shards: Path | None,
    store: Path | None,
    given: dict[str, Any],
    as_json: bool,
) -> None:
    """Training with the loader over the same step on resident data."""
    from bowstore.benchmarks.config import TrainBench
    from bowstore.benchmarks.train import bench_training
    from bowstore.config import load_workspace, validate
    from bowstore.recipes.next import resolve_training

    workspace = load_workspace()
    resolved, _ = resolve_training(workspace, config, overrides, {"shards": shards, "task.store": store})
    result = bench_training(resolved, **dict(validate(TrainBench, given, "bench train")))
    if result:
        _keep(workspace, "train", result, as_json)


@_benchmark("AssignBench", flags={"num_words": "--K"})
def assign(given: dict[str, Any], as_json: bool) -> None:
    """The nearest word of each vector, against the matrix product of the same shape and FAISS's search."""
    from bowstore.benchmarks.assign import bench_assign
    from bowstore.benchmarks.config import AssignBench
    from bowstore.config import load_workspace, validate
    from bowstore.environment import choose_device

    asked = validate(AssignBench, given, "bench assign").model_dump()
    asked["device"] = choose_device(asked["device"])
    _keep(load_workspace(), "assign", bench_assign(**asked), as_json)


@_benchmark(
    "EncodeBench",
    _SHARDS,
    leave_out=("threads", "border", "pca", "whiten", "vocabulary", "seed", "sample_per_word", "iterations"),
    flags={"layers": "--layer", "num_words": "--K", "teacher": "--teacher --arch"},
    otherwise={"teacher": "as for `bowstore encode`, or torchvision:resnet50"},
)
def encode(shards: Path | None, given: dict[str, Any], as_json: bool) -> None:
    """The pass of `bowstore encode` over the slower of the clean view alone and the teacher alone."""
    from bowstore.benchmarks.config import EncodeBench
    from bowstore.benchmarks.encode import bench_encode
    from bowstore.config import load_workspace, validate
    from bowstore.errors import MissingError
    from bowstore.workspace import resolve_teacher

    workspace = load_workspace()
    try:
        teacher = resolve_teacher(workspace, given.get("teacher"))
    except MissingError:
        if "teacher" in given:
            raise
        teacher = "torchvision:resnet50"
    config = validate(EncodeBench, {**given, "teacher": teacher}, "bench encode")
    _keep(workspace, "encode", bench_encode(shards or workspace.shards, config, workspace.storage), as_json)


@_benchmark("KmeansBench", flags={"num_words": "--K", "backends": "--backend"})
def kmeans(given: dict[str, Any], as_json: bool) -> None:
    """k-means by FAISS, by the search of its SuperKMeans, and by our own iteration over a resident sample."""
    from bowstore.benchmarks.config import KmeansBench
    from bowstore.benchmarks.kmeans import bench_kmeans
    from bowstore.config import load_workspace, validate

    _keep(load_workspace(), "kmeans", bench_kmeans(validate(KmeansBench, given, "bench kmeans")), as_json)


def _keep(workspace: Any, name: str, result: Any, as_json: bool) -> None:
    """Write the result file and print the result."""
    from bowstore.files import write_json

    out = workspace.runs / "bench" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result.as_dict())
    emit(result.as_dict(), result.text(), as_json)
