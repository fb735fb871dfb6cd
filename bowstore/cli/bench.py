"""Commands that measure this machine: bench train."""

from pathlib import Path

import click

from bowstore.cli.common import PATH, emit


@click.group()
def bench() -> None:
    """What each stage can do on this machine."""


@bench.command(name="train")
@click.option("--config", type=PATH, help="YAML file.  [default: as for `bowstore train`]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, for example optim.batch=64.")
@click.option("--store", type=PATH, help="Word store.")
@click.option("--steps", type=click.IntRange(5), default=30, show_default=True, help="Timed steps a round.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Interleaved rounds.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone.")
def bench_train(
    config: Path | None, overrides: tuple[str, ...], store: Path | None, steps: int, rounds: int, as_json: bool
) -> None:
    """Training with the loader over the same step on resident data, interleaved; written to RUNS/bench/train.json."""
    from bowstore.bench import bench_training
    from bowstore.config import load_workspace
    from bowstore.workspace import resolve_train

    workspace = load_workspace()
    resolved = resolve_train(workspace, config, overrides, store=store)
    result = bench_training(resolved, workspace.runs / "bench" / "train.json", steps=steps, rounds=rounds)
    emit(result.as_dict(), result.text(), as_json)
