"""The command that puts runs side by side."""

import click

from bowstore.cli.common import TEXT, emit


@click.command()
@click.argument("runs", type=TEXT, nargs=-1, metavar="[RUN]...")
@click.option("--json", "shown", flag_value="json", help="Print the comparison as JSON alone.")
@click.option("--csv", "shown", flag_value="csv", help="Print a line for each figure, as CSV.")
@click.option("--markdown", "shown", flag_value="markdown", help="Print the tables as Markdown.")
def compare(runs: tuple[str, ...], shown: str | None) -> None:
    """Put what was measured of each RUN side by side, and say which differences exceed their 95 % intervals.

    RUN is a run or a network of the workspace, by name or path, or a checkpoint or .safetensors that was evaluated.
    [default: all of the workspace]

    \b
    bowstore compare runs/a runs/b --markdown
    bowstore compare runs/a runs/a/random            the same network before training
    bowstore compare runs/a networks/NAME            with a network that is no run (bowstore eval ... --arch)

    Only figures of one protocol, version and set of test images are compared; differences are to the first RUN.
    """  # noqa: D301 - click reads the backspace as "do not wrap"
    from bowstore.config import load_workspace
    from bowstore.evaluate import comparison
    from bowstore.evaluate.results import results_of
    from bowstore.workspace import find_results

    found = find_results(load_workspace(), runs)
    value = comparison.side_by_side({name: results_of(paths) for name, paths in found.items()})
    show = {"csv": comparison.as_csv, "markdown": comparison.markdown}.get(str(shown), comparison.text)
    emit(value, show(value), shown == "json")
