"""The command that trains."""

from pathlib import Path

import click

from bowstore.cli.common import PATH, SEED, TEXT, emit


@click.command()
@click.option("--config", type=PATH, help="YAML file.  [default: the workspace's, or the teacher's student]")
@click.option(
    "--set", "overrides", type=TEXT, multiple=True, metavar="KEY=VALUE", help="Override, for example optim.lr=0.1."
)
@click.option("--name", type=TEXT, help="Name of the run directory.  [default: the configuration's]")
@click.option("--shards", "shards_dir", type=PATH, help="Shards to train on.")
@click.option("--store", type=PATH, help="Word store to train on.")
@click.option("--seed", type=SEED, help="Seed of weights, order and augmentation.")
@click.option("--resume", is_flag=True, help="Go on in a run directory that holds another configuration.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON alone.")
def train(
    config: Path | None,
    overrides: tuple[str, ...],
    name: str | None,
    shards_dir: Path | None,
    store: Path | None,
    seed: int | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Train a teacher (task rotation) or BoWNet (task words); under torchrun, on many devices.

    A run that was interrupted goes on from its newest checkpoint when the same command is given again.
    """
    from bowstore.config import load_workspace
    from bowstore.train.loop import train as run_train
    from bowstore.workspace import resolve_train

    workspace = load_workspace()
    flags = {"name": name, "shards": shards_dir, "words.store": store, "seed": seed}
    report = run_train(resolve_train(workspace, config, overrides, flags), workspace.runs, resume=resume)
    if report.first:
        emit(report.as_dict(), report.text(), as_json)
