"""Commands that evaluate a frozen representation: eval linear, eval voc07."""

from pathlib import Path
from typing import Any

import click

from bowstore.cli.common import BATCH, COMPILE, DEVICES, PATH, SEED, TEXT, THREADS, emit


@click.group(name="eval")
def evaluate() -> None:
    """Evaluate a frozen representation; results go to RUN/eval/PROTOCOL.json."""


def _run_options(command: Any) -> Any:
    """Options that every evaluation has."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone."),
        COMPILE,
        click.option("--device", type=DEVICES, default="auto", show_default=True),
        click.option("--batch", type=BATCH, default=128, show_default=True, help="Images a batch."),
        click.option("--random", is_flag=True, help="The run's network at its random initialisation."),
        click.option("--run", type=TEXT, help="Run, checkpoint or .safetensors.  [default: newest finished run]"),
    ):
        command = option(command)
    return command


@evaluate.command()
@_run_options
@click.option("--train", type=PATH, help="Labelled train shards.  [default: the workspace's]")
@click.option("--test", type=PATH, help="Labelled test shards.  [default: the workspace's]")
@click.option("--held-out", is_flag=True, help="Test on a tenth of each train class (another protocol id).")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the order of training.")
@click.option("--standardise", is_flag=True, help="Standardise features (another protocol id).")
def linear(
    train: Path | None, test: Path | None, held_out: bool, seed: int, standardise: bool, as_json: bool, **config: Any
) -> None:
    """Linear classifier on frozen pooled features (the paper's CIFAR-100 and MiniImageNet protocol)."""
    settings = {"train": train, "test": test, "held_out": held_out, "seed": seed, "standardise": standardise}
    _evaluate("linear", settings, config, as_json)


@evaluate.command()
@_run_options
@click.option("--voc", type=PATH, help="VOC devkit folder (VOC2007).  [default: the workspace's]")
@click.option("--costs", type=click.Choice(["fair", "vissl", "obow"]), default="fair", show_default=True)
@click.option("--layer", "layers", type=TEXT, multiple=True, help="Layers.  [default: the last two stages]")
@click.option("--jobs", type=THREADS, help="Parallel SVM fits.  [default: one a core]")
def voc07(
    voc: Path | None, costs: str, layers: tuple[str, ...], jobs: int | None, as_json: bool, **config: Any
) -> None:
    """Linear SVMs on frozen features of VOC2007, 20 classes, mean average precision (the paper's Table 4)."""
    _evaluate("voc07", {"voc": voc, "costs": costs, "layers": layers, "jobs": jobs}, config, as_json)


def _evaluate(name: str, settings: dict[str, Any], config: dict[str, Any], as_json: bool) -> None:
    from bowstore.config import load_workspace, validate
    from bowstore.evaluate.config import EvalConfig
    from bowstore.evaluate.protocols import PROTOCOLS
    from bowstore.evaluate.runner import evaluate

    workspace = load_workspace()
    kind = PROTOCOLS.get(name)
    origin = f"eval {name}"
    result = evaluate(kind, validate(kind.settings, settings, origin), validate(EvalConfig, config, origin), workspace)
    emit(result.as_dict(), result.text(), as_json)
