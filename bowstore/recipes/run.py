"""Running a recipe: stage after stage by the product's own functions, and one table at the end."""

import resource
import subprocess
import sys
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from bowstore.config import Workspace
from bowstore.data.downloads import fetch
from bowstore.data.shards import make_shards
from bowstore.data.synthetic import write_images
from bowstore.errors import BowstoreError, UsageError
from bowstore.evaluate.kept import FeatureSets
from bowstore.evaluate.results import Result, comparison_table, read_result
from bowstore.evaluate.runner import evaluate
from bowstore.files import make_folder, write_json
from bowstore.progress import format_seconds, say, timed
from bowstore.recipes.plan import again
from bowstore.recipes.state import DONE, cell_is_done, check_before, is_wanted, state_of
from bowstore.recipes.steps import (
    EncodeStep,
    EvalStep,
    ImagesStep,
    Plan,
    ShardsStep,
    Step,
    TrainStep,
    in_stage,
)
from bowstore.torchrun import ranks
from bowstore.train.distributed import beside_others
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


def run_recipe(plan: Plan, *, processes: int = 1) -> RecipeResult:
    """Run the stages that are not done, one after the other; what is done is skipped.

    Killed at any moment, the same call goes on: each stage does so by itself.

    Args:
        plan: the recipe.
        processes: torchrun starts so many on this machine for each stage that trains or encodes.

    Raises:
        UsageError: torchrun started this process itself.
        MismatchError: the results of a stage lie there, of other settings or inputs.
        BowstoreError: as the stage's own command; the message says which stage.
    """
    if (size := ranks().size) > 1:
        raise UsageError(
            f"`bowstore run` is for one process, and torchrun started {size}; give it --processes {ranks().local_size} "
            f"without torchrun, or run one stage: torchrun ... -m bowstore run {plan.recipe.path} --stage NAME"
        )
    for name, step in plan.steps.items():  # before the first hour of work, not after it
        with in_stage(name, plan.recipe):
            check_before(step, plan)
    seconds: dict[str, float] = {}
    for name, step in plan.steps.items():
        with timed(seconds, name):
            if processes > 1 and isinstance(step, TrainStep | EncodeStep):
                _start(step, plan, processes)
            else:
                run_stage(plan, name)
    rows: dict[str, list[Result]] = {}
    for step in again(plan).steps.values():
        for cell in step.cells if isinstance(step, EvalStep) else ():
            rows.setdefault(cell.row, []).append(read_result(cell.result))
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    result = RecipeResult(plan, rows, seconds, 1024 * max(usage))
    make_folder(plan.result.parent)
    write_json(plan.result, result.as_dict())
    return result


def run_stage(plan: Plan, name: str) -> None:
    """Run one stage, or go on with it, or skip what is done; under torchrun, by all its processes.

    Raises:
        UsageError: no such stage, or one for a single process.
        MismatchError: its results lie there, of other settings or inputs.
        BowstoreError: as the stage's own command; the message says which stage.
    """
    if name not in plan.steps:
        raise UsageError(f"{plan.recipe.path} has no stage {name!r}; its stages are {', '.join(plan.steps)}")
    with in_stage(name, plan.recipe):
        step = again(plan).steps[name]
        if ranks().size > 1 and not isinstance(step, TrainStep | EncodeStep):
            raise UsageError(f"it is of kind {step.kind}, for one process; start it without torchrun")
        check_before(step, plan)
        if state_of(step) == DONE and step.known_whole:
            _tell(f"{name}: done already")
        elif is_wanted(step, plan):
            run_step(step, plan.workspace)


def _start(step: Step, plan: Plan, processes: int) -> None:
    """Run a stage by torchrun, unless it is done."""
    if state_of(step) == DONE:
        run_stage(plan, step.name)
        return
    arguments = ["run", str(plan.recipe.path), "--stage", step.name, "--out", str(plan.folder)]
    arguments += [] if plan.seed is None else ["--seed", str(plan.seed)]
    arguments += [part for override in plan.recipe.overrides for part in ("--set", override)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with subprocess.Popen([*torchrun, "-m", "bowstore", *arguments]) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # or SIGTERM, of which torchrun knows nothing
            process.terminate()
            process.wait()
            raise
    if code:
        raise BowstoreError(f"stage {step.name!r} ended with exit code {code}; its own lines above say why")


def _tell(line: str) -> None:
    if ranks().first:
        say(line)


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
    report = train(config, workspace.runs)
    _tell(report.text())


@run_step.register
def _(step: EncodeStep, workspace: Workspace) -> None:
    with beside_others():
        report = encode(step.config, shards=step.on, store=step.store, storage=workspace.storage)
    _tell(report.text())


@run_step.register
def _(step: EvalStep, workspace: Workspace) -> None:
    kept = FeatureSets(workspace.storage)
    for cell in step.cells:
        if not cell_is_done(cell):
            evaluate(cell.kind, cell.settings, cell.config, workspace, kept=kept)
