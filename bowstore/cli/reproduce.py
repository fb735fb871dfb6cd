"""The command that reproduces the paper's tables."""

from pathlib import Path

import click

from bowstore.cli.common import PATH, TEXT, THREADS, emit, interrupt_on_sigterm


@click.command()
@click.argument("table", type=TEXT, metavar="table1|...|table6")
@click.option("--small", is_flag=True, help="Smaller images and networks, for two cores.")
@click.option("--seeds", type=TEXT, default="0", show_default=True, help="Seeds of training, as in 0,1,2.")
@click.option("--rows", type=TEXT, multiple=True, help="Only these rows, separated by commas.  [default: all]")
@click.option("--data", type=TEXT, multiple=True, metavar="[NAME=]PATH", help="Shards or images.  [default: data/NAME]")
@click.option("--out", type=PATH, default=Path("reproduce"), show_default=True, help="Where results lie.")
@click.option("--dry-run", is_flag=True, help="Show the stages for each seed, and which are done.")
@click.option("--processes", type=THREADS, default=1, show_default=True, help="GPUs that train and encode.")
@click.option("--json", "shown", flag_value="json", help="Print the result as JSON alone.")
@click.option("--csv", "shown", flag_value="csv", help="Print a line for each figure, as CSV.")
@click.option("--markdown", "shown", flag_value="markdown", help="Print the table as Markdown.")
def reproduce(
    table: str,
    small: bool,
    seeds: str,
    rows: tuple[str, ...],
    data: tuple[str, ...],
    out: Path,
    dry_run: bool,
    processes: int,
    shown: str | None,
) -> None:
    """Reproduce a table of the paper: train and evaluate its rows, and show the paper's figures beside them.

    \b
    bowstore reproduce table1 --small                      on two cores
    bowstore reproduce table1 --small --seeds 0,1,2        with intervals, so that claims can be decided
    bowstore reproduce table3 --small --rows "RelLoc,RelLoc to BoWNet"
    taskset -c 0 bowstore reproduce table1 --small --seeds 1     beside another process, of another seed

    For each ordering that the paper states, the table says whether it holds here: yes, no, or not decided. It covers
    all seeds that lie in --out, where it is also written as TABLE.json or TABLE_small.json. Interrupted or killed, the
    same command continues.
    """  # noqa: D301 - click reads the backspace as "do not wrap"
    from bowstore.config import load_workspace
    from bowstore.evaluate import reproduction
    from bowstore.recipes.reproduce import parse_seeds, prepare
    from bowstore.recipes.reproduce import reproduce as make

    asked = parse_seeds(seeds)
    job = prepare(table, load_workspace(), out, small=small, rows=rows, data=data, fetch=not dry_run)
    if dry_run:
        plans = {seed: job.plan(seed) for seed in asked}
        overview = {str(seed): plan.overview() for seed, plan in plans.items()}
        emit(overview, "\n\n".join(plan.text() for plan in plans.values()), shown == "json")
        return
    interrupt_on_sigterm()
    value = make(job, asked, processes=processes)
    show = {"csv": reproduction.as_csv, "markdown": reproduction.markdown}.get(str(shown), reproduction.text)
    emit(value, show(value), shown == "json")
