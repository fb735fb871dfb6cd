"""Commands that go by a recipe: run, demo; and init, which writes one."""

from pathlib import Path

import click

from bowstore.cli.common import PATH, SEED, TEXT, THREADS, emit, interrupt_on_sigterm


@click.command()
@click.argument("recipe", type=PATH, required=False)
@click.option("--dry-run", is_flag=True, help="Show the stages, what each reads and writes, and which are done.")
@click.option(
    "--seed", type=SEED, help="Of all training and encoding.  [default: the recipe's, or the configurations']"
)
@click.option("--out", type=PATH, help="Folder of the recipe's relative places.  [default: the recipe's]")
@click.option(
    "--set", "overrides", type=TEXT, multiple=True, metavar="KEY=VALUE", help="As in stages.data.shards.src=IMAGES."
)
@click.option("--stage", type=TEXT, help="Run this stage alone; under torchrun, by all its processes.")
@click.option(
    "--processes", type=THREADS, default=1, show_default=True, help="GPUs of this machine that train and encode."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone.")
def run(
    recipe: Path | None,
    dry_run: bool,
    seed: int | None,
    out: Path | None,
    overrides: tuple[str, ...],
    stage: str | None,
    processes: int,
    as_json: bool,
) -> None:
    """Run the stages of RECIPE that are not done; a file, or the name of one, by default the workspace's.

    \b
    bowstore run cifar10 --dry-run       what there is to do
    bowstore run cifar10                 download, shards, teacher, words, BoWNet, evaluations
    bowstore run --processes 8           of the workspace's recipe, on 8 GPUs
    torchrun --nnodes 2 --nproc-per-node 8 ... -m bowstore run --stage rotnet

    Interrupted or killed, the same command goes on. What was made with other settings is refused, never mixed.
    """  # noqa: D301 - click reads the backspace as "do not wrap"
    from bowstore.config import load_workspace
    from bowstore.errors import MissingError
    from bowstore.recipes.datasets import placed
    from bowstore.torchrun import ranks

    workspace = load_workspace()
    named = recipe or workspace.recipe
    if named is None:
        raise MissingError("no recipe was named; `bowstore run RECIPE`, or `recipe: RECIPE` in bowstore.yaml")
    plan = placed(named, workspace, overrides, seed=seed, folder=out)
    if dry_run:
        emit(plan.overview(stage), plan.text(stage), as_json)
        return
    from bowstore.recipes.run import run_recipe, run_stage

    interrupt_on_sigterm()
    if stage:
        run_stage(plan, stage)
        if ranks().first:
            (done,) = plan.overview(stage)
            emit(done, f"{stage}: {done['state']}", as_json)
        return
    result = run_recipe(plan, processes=processes)
    emit(result.as_dict(), result.text(), as_json)


@click.command()
@click.option("--out", type=PATH, default=Path("demo"), show_default=True, help="Folder of the demo's workspace.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON alone.")
def demo(out: Path, seed: int, as_json: bool) -> None:
    """The whole job on rendered images: random, RotNet and BoWNet side by side, in minutes on two cores."""
    from bowstore.config import Workspace
    from bowstore.recipes.file import bundled_recipes, load_recipe
    from bowstore.recipes.plan import make_plan
    from bowstore.recipes.run import run_recipe

    result = run_recipe(make_plan(load_recipe(bundled_recipes()["demo"]), Workspace(), seed=seed, folder=out))
    emit(result.as_dict(), result.text(), as_json)


@click.command()
@click.argument("folder", type=PATH, default=Path())
@click.option("--recipe", type=PATH, help="Copy a recipe and its configurations too: cifar10, table1_small...")
def init(folder: Path, recipe: Path | None) -> None:
    """Write bowstore.yaml (paths and defaults of a workspace) into FOLDER."""
    from bowstore.recipes.file import load_recipe, recipe_files
    from bowstore.workspace import init_workspace

    files = recipe_files(load_recipe(recipe)) if recipe else {}
    written = [str(path) for path in init_workspace(folder, files)]
    emit(written, "\n".join(written), as_json=False)
