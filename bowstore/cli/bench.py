"""Commands that measure this machine: bench loader, reader, store, targets, train, assign, encode, kmeans."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from bowstore.cli.common import BATCH, COMPILE, COUNT, DEVICES, PATH, SHARE, SIZE, TEXT, THREADS, emit
from bowstore.limits import MAX_BATCH

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def bench() -> None:
    """What each stage can do on this machine, and which one binds; results go to RUNS/bench/NAME.json."""


def _options(*extra: Callable[[F], F]) -> Callable[[F], F]:
    """Options that the benchmarks of stages share, and a command's own."""
    common: tuple[Callable[[F], F], ...] = (
        click.option("--shards", "shards_dir", type=PATH, help="Indexed shards.  [default: the workspace's]"),
        click.option("--rounds", type=COUNT, default=5, show_default=True, help="Interleaved rounds."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone."),
    )

    def decorate(command: F) -> F:
        for option in reversed((*extra, *common)):
            command = option(command)
        return command

    return decorate


_BATCH = click.option(
    "--batch", type=click.IntRange(4, MAX_BATCH), default=64, show_default=True, help="Images a batch."
)
_STORE = click.option("--store", type=PATH, help="Word store.  [default: the workspace's]")
_LAYER = click.option("--layer", type=TEXT, help="Layer of the store.  [default: its only one]")


@bench.command()
@_options(
    click.option("--config", type=PATH, help="Take view and batch from a training configuration."),
    click.option("--size", type=SIZE, default=224, show_default=True, help="Side of the view, pixels."),
    _BATCH,
    click.option("--batches", type=COUNT, default=12, show_default=True, help="Timed batches a round."),
    click.option("--threads", type=THREADS, help="Decoding threads.  [default: one a core]"),
    click.option("--device", type=DEVICES, default="auto", show_default=True),
    click.option("--hw-load", "hw_loads", type=SHARE, multiple=True, help="GPU: sweep these shares."),
    click.option(
        "--decode",
        "ways",
        type=click.Choice(["slice", "image"]),
        multiple=True,
        help="Sweep: windows alone, whole images that are then cut.",
    ),
)
def loader(
    config: Path | None,
    size: int,
    batch: int,
    batches: int,
    threads: int | None,
    device: str,
    hw_loads: tuple[float, ...],
    ways: tuple[Any, ...],
    shards_dir: Path | None,
    rounds: int,
    as_json: bool,
) -> None:
    """The train view stage by stage, planning and reading first, and which stage binds."""
    from bowstore.benchmarks.loader import LoaderSettings, bench_loader
    from bowstore.config import ViewConfig, load_workspace
    from bowstore.environment import choose_device, cores_per_rank
    from bowstore.train.config import load_train_config

    workspace = load_workspace()
    view = ViewConfig(size=size, resize=max(size, 256))
    if config:
        loaded = load_train_config(config)
        view, batch = loaded.view, loaded.optim.batch
    settings = LoaderSettings(
        view, batch, threads or cores_per_rank(), choose_device(device), batches, rounds, hw_loads, ways
    )
    result = bench_loader(shards_dir or workspace.shards, settings, workspace.storage)
    _keep(workspace, "loader", result, as_json)


@bench.command()
@_options(
    _BATCH,
    click.option("--batches", type=COUNT, default=200, show_default=True, help="Timed batches a round."),
)
def reader(batch: int, batches: int, shards_dir: Path | None, rounds: int, as_json: bool) -> None:
    """Encoded bytes of random rows: from memory maps, and by single reads as on a network file system."""
    from bowstore.benchmarks.reader import bench_reader
    from bowstore.config import load_workspace

    workspace = load_workspace()
    shards = shards_dir or workspace.shards
    result = bench_reader(shards, batch=batch, batches=batches, rounds=rounds, storage=workspace.storage)
    _keep(workspace, "reader", result, as_json)


@bench.command()
@_options(_STORE, _LAYER)
def store(store: Path | None, layer: str | None, shards_dir: Path | None, rounds: int, as_json: bool) -> None:
    """A word store: bulk load with every check, and the join of its keys with the shards'."""
    from bowstore.benchmarks.store import bench_store
    from bowstore.config import load_workspace

    workspace = load_workspace()
    shards = shards_dir or (workspace.shards if workspace.shards.exists() else None)
    result = bench_store(store or workspace.store, shards, rounds=rounds, layer=layer, storage=workspace.storage)
    _keep(workspace, "store", result, as_json)


@bench.command()
@_options(
    _STORE,
    _LAYER,
    click.option("--batch", type=BATCH, default=256, show_default=True, help="Rows a batch."),
    click.option("--batches", type=COUNT, default=200, show_default=True, help="Timed batches a round."),
    click.option("--device", type=DEVICES, default="auto", show_default=True),
)
def targets(
    store: Path | None,
    layer: str | None,
    batch: int,
    batches: int,
    device: str,
    shards_dir: Path | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Bags of random rows from every tier: words on the device, in host memory, on disk."""
    from bowstore.benchmarks.targets import bench_targets
    from bowstore.config import load_workspace
    from bowstore.environment import choose_device

    workspace = load_workspace()
    result = bench_targets(
        store or workspace.store,
        shards_dir or workspace.shards,
        layer=layer,
        batch=batch,
        batches=batches,
        rounds=rounds,
        device=choose_device(device),
        storage=workspace.storage,
    )
    _keep(workspace, "targets", result, as_json)


@bench.command()
@click.option("--config", type=PATH, help="YAML file.  [default: as for `bowstore train`]")
@click.option(
    "--set", "overrides", type=TEXT, multiple=True, metavar="KEY=VALUE", help="Override, for example optim.batch=64."
)
@_options(
    click.option("--store", type=PATH, help="Word store."),
    click.option("--steps", type=click.IntRange(5), default=30, show_default=True, help="Timed steps a round."),
)
def train(
    config: Path | None,
    overrides: tuple[str, ...],
    store: Path | None,
    steps: int,
    shards_dir: Path | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Training with the loader over the same step on resident data."""
    from bowstore.benchmarks.train import bench_training
    from bowstore.config import load_workspace
    from bowstore.workspace import resolve_train

    workspace = load_workspace()
    resolved = resolve_train(workspace, config, overrides, {"shards": shards_dir, "words.store": store})
    result = bench_training(resolved, steps=steps, rounds=rounds)
    if result:
        _keep(workspace, "train", result, as_json)


@bench.command()
@click.option("--images", type=COUNT, default=32, show_default=True, help="Images a round.")
@click.option("--positions", type=COUNT, default=196, show_default=True, help="Vectors an image.")
@click.option("--dimensions", type=COUNT, default=1024, show_default=True)
@click.option("--K", "words", type=COUNT, default=20000, show_default=True, help="Number of words.")
@click.option("--rounds", type=COUNT, default=5, show_default=True, help="Interleaved rounds.")
@click.option("--device", type=DEVICES, default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone.")
def assign(images: int, positions: int, dimensions: int, words: int, rounds: int, device: str, as_json: bool) -> None:
    """The nearest word of each vector, against the matrix product of the same shape and FAISS's search."""
    from bowstore.benchmarks.assign import bench_assign
    from bowstore.config import load_workspace
    from bowstore.environment import choose_device

    result = bench_assign(
        images=images,
        positions=positions,
        dimensions=dimensions,
        words=words,
        rounds=rounds,
        device=choose_device(device),
    )
    _keep(load_workspace(), "assign", result, as_json)


@bench.command()
@_options(
    click.option(
        "--teacher", type=TEXT, help="As for `bowstore encode`.  [default: the workspace's, or torchvision:resnet50]"
    ),
    click.option("--weights", type=PATH, help="Weights file of a timm or torchvision teacher."),
    click.option(
        "--layer", "layers", type=TEXT, multiple=True, default=["conv4"], show_default=True, help="Several in one pass."
    ),
    click.option("--K", "num_words", type=COUNT, multiple=True, default=[2000], show_default=True),
    click.option("--size", type=SIZE, help="Side of the clean view, pixels."),
    click.option("--resize", type=click.IntRange(8), help="Short side before the crop, pixels."),
    click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True),
    click.option("--batch", type=BATCH, help="Images a batch.  [default: 16, 256 on a GPU]"),
    click.option("--images", type=COUNT, default=256, show_default=True, help="Images a round."),
    COMPILE,
    click.option("--device", type=DEVICES, default="auto", show_default=True),
)
def encode(
    teacher: str | None, images: int, device: str, shards_dir: Path | None, rounds: int, as_json: bool, **values: Any
) -> None:
    """The pass of `bowstore encode` over the slower of the clean view alone and the teacher alone."""
    from bowstore.benchmarks.encode import bench_encode
    from bowstore.config import load_workspace, validate
    from bowstore.environment import choose_device
    from bowstore.errors import MissingError
    from bowstore.words.config import EncodeConfig
    from bowstore.workspace import resolve_teacher

    workspace = load_workspace()
    try:
        values["teacher"] = resolve_teacher(workspace, teacher)
    except MissingError:
        if teacher:
            raise
        values["teacher"] = "torchvision:resnet50"
    result = bench_encode(
        shards_dir or workspace.shards,
        validate(EncodeConfig, values, "bench encode"),
        images=images,
        rounds=rounds,
        device=choose_device(device),
        storage=workspace.storage,
    )
    _keep(workspace, "encode", result, as_json)


@bench.command()
@click.option("--vectors", type=COUNT, default=51200, show_default=True, help="Of the sample.")
@click.option("--dimensions", type=COUNT, default=1024, show_default=True)
@click.option("--K", "words", type=COUNT, default=200, show_default=True, help="Number of words.")
@click.option("--iterations", type=COUNT, default=25, show_default=True, help="Of a vocabulary.")
@click.option("--rounds", type=COUNT, default=5, show_default=True, help="Timed iterations.")
@click.option(
    "--backend",
    "backends",
    type=click.Choice(["faiss", "super", "torch"]),
    multiple=True,
    help="Only these.  [default: all on a CPU; on a GPU what encode takes]",
)
@click.option("--device", type=DEVICES, default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone.")
def kmeans(device: str, as_json: bool, backends: tuple[Any, ...], **values: int) -> None:
    """k-means by FAISS, by the search of its SuperKMeans, and by our own iteration over a resident sample."""
    from bowstore.benchmarks.kmeans import bench_kmeans
    from bowstore.config import load_workspace
    from bowstore.environment import choose_device

    _keep(load_workspace(), "kmeans", bench_kmeans(**values, backends=backends, device=choose_device(device)), as_json)


def _keep(workspace: Any, name: str, result: Any, as_json: bool) -> None:
    """Write the result file and print the result."""
    from bowstore.files import write_json

    out = workspace.runs / "bench" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result.as_dict())
    emit(result.as_dict(), result.text(), as_json)
