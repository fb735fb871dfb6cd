"""Running a recipe: stage after stage by the product's own functions, and one table at the end."""

import resource
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from bowstore.config import Workspace
from bowstore.data.downloads import fetch
from bowstore.data.shards import make_shards
from bowstore.data.synthetic import write_images
from bowstore.errors import MismatchError
from bowstore.evaluate.kept import FeatureSets
from bowstore.evaluate.results import Result, comparison_table, read_result
from bowstore.evaluate.runner import evaluate
from bowstore.files import make_folder, write_json
from bowstore.progress import format_seconds, say, timed
from bowstore.recipes.plan import again
from bowstore.recipes.state import DONE, cell_is_done, is_wanted, state_of
from bowstore.recipes.steps import (
    EncodeStep,
    EvalStep,
    ImagesStep,
    Plan,
    ShardsStep,
    Step,
    TrainStep,
    in_stage,
    remedy_of,
)
from bowstore.train.loop import train
from bowstore.words.encode import encode
from bowstore.workspace import resolve_train


@dataclass(frozen=True)
class RecipeResult:
    """What came out of a recipe.

    Attributes:
        plan: what was run.
        rows: results of each network, by its name in the table.
        seconds: wall-clock seconds of this sitting by stage.
        peak_memory_bytes: of the largest process.
    """

    plan: Plan
    rows: dict[str, list[Result]]
    seconds: dict[str, float]
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "recipe": self.plan.recipe.name,
            "seed": self.plan.seed,
            "results": {
                row: {f"{result.protocol} v{result.protocol_version}": result.metrics for result in results}
                for row, results in self.rows.items()
            },
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "out": str(self.plan.folder),
        }

    def text(self) -> str:
        """The table."""
        stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        title = self.plan.recipe.file.title or f"Recipe {self.plan.recipe.name}"
        table = f"\n{title}\n\n{comparison_table(self.rows)}\n\n" if self.rows else ""
        return (
            f"{table}{format_seconds(sum(self.seconds.values()))} in all ({stages}), "
            f"peak memory {self.peak_memory_bytes / 1e9:.1f} GB; everything lies in {self.plan.folder}/"
        )


def run_recipe(plan: Plan) -> RecipeResult:
    """Run the stages that are not done, one after the other; what is done is skipped.

    Killed at any moment, the same call goes on: each stage does so by itself.

    Raises:
        MismatchError: the results of a stage lie there, of other settings or inputs.
        BowstoreError: as the stage's own command; the message says which stage.
    """
    seconds: dict[str, float] = {}
    for name, planned in plan.steps.items():
        with in_stage(name, plan.recipe), timed(seconds, name):
            step = again(plan).steps[name] if isinstance(planned, EvalStep) else planned
            state = state_of(step)
            if state.problem:
                raise MismatchError(f"{state.problem}; {remedy_of(step)}")
            if state == DONE and step.known_whole:
                say(f"{name}: done already")
            elif is_wanted(step, plan):
                run_step(step, plan.workspace)
    rows: dict[str, list[Result]] = {}
    for step in again(plan).steps.values():
        for cell in step.cells if isinstance(step, EvalStep) else ():
            rows.setdefault(cell.row, []).append(read_result(cell.result))
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    result = RecipeResult(plan, rows, seconds, 1024 * max(usage))
    make_folder(plan.result.parent)
    write_json(plan.result, result.as_dict())
    return result


@singledispatch
def run_step(step: Step, workspace: Workspace) -> None:
    """Run one stage, or go on with it."""
    raise NotImplementedError(step.kind)


@run_step.register
def _(step: ImagesStep, workspace: Workspace) -> None:
    if step.render:
        write_images(step.out, **dict(step.render))
    else:
        fetch(step.download, step.folder)


@run_step.register
def _(step: ShardsStep, workspace: Workspace) -> None:
    if state_of(step) == DONE and not step.src.exists():
        say(f"{step.out}: complete; {step.src}, of which it was made, is not there to be compared")
        return
    for report in make_shards(step.src, step.out, step.config):
        say(report.summary())


@run_step.register
def _(step: TrainStep, workspace: Workspace) -> None:
    config = resolve_train(workspace, step.file, flags=step.flags)
    say(train(config, workspace.runs).text())


@run_step.register
def _(step: EncodeStep, workspace: Workspace) -> None:
    say(encode(step.config, shards=step.on, store=step.store, storage=workspace.storage).text())


@run_step.register
def _(step: EvalStep, workspace: Workspace) -> None:
    kept = FeatureSets(workspace.storage)
    for cell in step.cells:
        if not cell_is_done(cell):
            evaluate(cell.kind, cell.settings, cell.config, workspace, kept=kept)
