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
        click.option("--random", "random_init", is_flag=True, help="The run's network at its random initialisation."),
        click.option(
            "--run", "name", type=TEXT, help="Run, checkpoint or .safetensors.  [default: newest finished run]"
        ),
    ):
        command = option(command)
    return command


@evaluate.command()
@_run_options
@click.option("--train", "train_shards", type=PATH, help="Labelled train shards.  [default: the workspace's]")
@click.option("--test", "test_shards", type=PATH, help="Labelled test shards.  [default: the workspace's]")
@click.option("--held-out", is_flag=True, help="Test on a tenth of each train class (another protocol id).")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the order of training.")
@click.option("--standardise", is_flag=True, help="Standardise features (another protocol id).")
def linear(
    name: str | None,
    random_init: bool,
    train_shards: Path | None,
    test_shards: Path | None,
    held_out: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Linear classifier on frozen pooled features (the paper's CIFAR-100 and MiniImageNet protocol)."""
    from bowstore.config import load_workspace
    from bowstore.errors import UsageError
    from bowstore.evaluate.run import evaluate_run_linear
    from bowstore.workspace import val_shards

    if held_out and test_shards:
        raise UsageError(f"--held-out tests on train images, --test on {test_shards}; leave one of them out")
    workspace = load_workspace()
    result = evaluate_run_linear(
        _run_path(workspace, name),
        train=train_shards or workspace.shards,
        test=None if held_out else test_shards or val_shards(workspace),
        by_default=test_shards is None,
        random_init=random_init,
        storage=workspace.storage,
        **how,
    )
    emit(result.as_dict(), result.text(), as_json)


@evaluate.command()
@_run_options
@click.option("--voc", type=PATH, help="VOC devkit folder (VOC2007).  [default: the workspace's]")
@click.option("--costs", type=click.Choice(["fair", "vissl", "obow"]), default="fair", show_default=True)
@click.option("--layer", "layers", type=TEXT, multiple=True, help="Layers.  [default: the last two stages]")
@click.option("--jobs", type=THREADS, help="Parallel SVM fits.  [default: one a core]")
def voc07(name: str | None, random_init: bool, voc: Path | None, as_json: bool, **how: Any) -> None:
    """Linear SVMs on frozen features of VOC2007, 20 classes, mean average precision (the paper's Table 4)."""
    from bowstore.config import load_workspace
    from bowstore.evaluate.run import evaluate_run_voc07

    workspace = load_workspace()
    result = evaluate_run_voc07(_run_path(workspace, name), voc=voc or workspace.voc, random_init=random_init, **how)
    emit(result.as_dict(), result.text(), as_json)


def _run_path(workspace: Any, name: str | None) -> Path:
    from bowstore.workspace import find_run, newest_run

    return find_run(workspace, name) if name else newest_run(workspace)
