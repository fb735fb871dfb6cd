"""Running a recipe: stage after stage by the product's own functions, and one table at the end."""

import resource
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from bowstore import runs
from bowstore.errors import BowstoreError, UsageError
from bowstore.evaluate.results import Result, comparison_table, read_result
from bowstore.files import make_folder, write_json
from bowstore.progress import format_seconds, say, timed
from bowstore.recipes.evaluate import EvalStage
from bowstore.recipes.plan import Plan
from bowstore.recipes.stage import DONE, in_stage
from bowstore.torchrun import ranks


@dataclass(frozen=True)
class RecipeResult:
    """What came out of a recipe.

    Attributes:
        plan: what was run.
        rows: results of each network, by its name in the table.
        lineage: how each trained network came about (`bowstore.runs.descent`), by the same names.
        seconds: wall-clock seconds of this sitting by stage.
        peak_memory_bytes: of the largest process.
    """

    plan: Plan
    rows: dict[str, list[Result]]
    lineage: dict[str, tuple[str, ...]]
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
            "lineage": self.lineage,
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


def run_recipe(plan: Plan, *, processes: int = 1, label: str = "") -> RecipeResult:
    """Run the stages that are not done, one after the other; what is done is skipped.

    Killed at any moment, the same call goes on: each stage does so by itself.

    Args:
        plan: the recipe.
        processes: torchrun starts so many on this machine for each stage that trains or encodes.
        label: what lines on the progress call it; none are printed without.

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
    for name, stage in plan.stages.items():  # before the first hour of work, not after it
        with in_stage(name, plan.recipe.path):
            stage.check()
    make_folder(plan.result.parent)
    seconds: dict[str, float] = {}
    for number, (name, stage) in enumerate(plan.stages.items(), 1):
        if label and stage.needed and stage.state() != DONE:
            say(f"{label}: {name} (stage {number} of {len(plan.stages)})")
        with timed(seconds, name):
            if processes > 1 and stage.distributed and stage.state() != DONE:
                _start(name, plan, processes)
            else:
                run_stage(plan, name)
    rows: dict[str, list[Result]] = {}
    lineage: dict[str, tuple[str, ...]] = {}
    for stage in plan.as_it_is_now().stages.values():
        for cell in stage.cells if isinstance(stage, EvalStage) else ():
            rows.setdefault(cell.row, []).append(read_result(cell.result))
            if not cell.config.random and (recorded := runs.read_lineage(cell.run)):
                lineage[cell.row] = runs.descent(recorded)
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    result = RecipeResult(plan, rows, lineage, seconds, 1024 * max(usage))
    write_json(plan.result, result.as_dict())
    return result


def run_stage(plan: Plan, name: str) -> None:
    """Run one stage, or go on with it, or skip what is done; under torchrun, by all its processes.

    Raises:
        UsageError: no such stage, or one for a single process.
        MismatchError: its results lie there, of other settings or inputs.
        BowstoreError: as the stage's own command; the message says which stage.
    """
    stage = plan.as_it_is_now().named(name)
    with in_stage(name, plan.recipe.path):
        if ranks().size > 1 and not stage.distributed:
            raise UsageError(f"it is of kind {stage.kind}, for one process; start it without torchrun")
        stage.check()
        lines = []
        if stage.known_whole and stage.state() == DONE:
            lines = [f"{name}: done already"]
        elif stage.needed:
            lines = stage.make()
    for line in lines if ranks().first else ():
        say(line)


def _start(stage: str, plan: Plan, processes: int) -> None:
    """Run a stage by torchrun."""
    arguments = ["run", str(plan.recipe.path), "--stage", stage, "--out", str(plan.folder)]
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
        raise BowstoreError(f"stage {stage!r} ended with exit code {code}; its own lines above say why")
