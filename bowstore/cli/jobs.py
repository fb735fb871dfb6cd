"""The command that trains."""

from pathlib import Path
from typing import Any

import click

from bowstore.cli.common import PATH, TEXT, emit
from bowstore.cli.options import command, fields


@command()
@click.option("--config", type=PATH, help="YAML file.  [default: the workspace's, or its recipe's next stage]")
@click.option(
    "--set", "overrides", type=TEXT, multiple=True, metavar="KEY=VALUE", help="Override, for example optim.lr=0.1."
)
@fields(
    "given",
    "bowstore.train.config:TrainConfig",
    only=("name", "shards", "seed"),
    otherwise=dict.fromkeys(("name", "shards", "seed"), "the configuration's"),
)
@click.option(
    "--store",
    type=PATH,
    multiple=True,
    help="Word store of task words, or several of one vocabulary.  [default: the configuration's]",
)
@click.option("--resume", is_flag=True, help="Go on in a run directory that holds another configuration.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON alone.")
def train(
    config: Path | None,
    overrides: tuple[str, ...],
    given: dict[str, Any],
    store: tuple[Path, ...],
    resume: bool,
    as_json: bool,
) -> None:
    """Train a network: a teacher (task rotation, location), BoWNet (words), or another task; torchrun: on many devices.

    Without a configuration: the next training stage of the workspace's recipe, the teacher first, then BoWNet.
    Given again after an interruption, the same command continues from the newest checkpoint.
    """
    from bowstore.config import load_workspace
    from bowstore.evaluate.probe import probe_of
    from bowstore.recipes.next import resolve_training
    from bowstore.train.loop import train as run_train

    workspace = load_workspace()
    resolved, runs = resolve_training(workspace, config, overrides, {**given, "task.store": store or None})
    report = run_train(resolved, runs, resume=resume, probe=probe_of(resolved, workspace))
    if report.first:
        emit(report.as_dict(), report.text(), as_json)
