"""The paper's tables made anew: the stages that a table's rows need, for each seed, and what came out of them.

Nothing here knows how a stage runs: a table is a recipe, narrowed to the rows that were asked for. Loads no torch.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bowstore import runs
from bowstore.config import Workspace
from bowstore.data.index import open_index
from bowstore.errors import BowstoreError, MissingError, UsageError
from bowstore.evaluate.reproduction import summary
from bowstore.evaluate.results import PaperTable, Result, paper_tables, read_result
from bowstore.files import write_json
from bowstore.limits import MAX_SEED
from bowstore.progress import say
from bowstore.recipes.datasets import is_dataset, named_data, shard_stages, supply
from bowstore.recipes.evaluate import RANDOM, EvalStage
from bowstore.recipes.file import Recipe, load_recipe
from bowstore.recipes.images import ShardsStage
from bowstore.recipes.plan import Plan, make_plan
from bowstore.recipes.run import run_recipe
from bowstore.recipes.stage import fingerprint, in_stage, stage_of
from bowstore.recipes.train import TrainStage


@dataclass(frozen=True)
class Job:
    """A table that can be made.

    Attributes:
        table: its name, table1 to table6.
        paper: what the paper shows.
        whole: its recipe, with the data that were found.
        chosen: the same with the stages alone that the rows asked for need; none where nothing can be evaluated.
        workspace: says where things lie that the recipe does not name.
        out: where results lie.
        absent: why rows cannot be made, by row.
    """

    table: str
    paper: PaperTable
    whole: Recipe
    chosen: Recipe
    workspace: Workspace
    out: Path
    absent: dict[str, str]

    def plan(self, seed: int) -> Plan:
        """What is to be done for a seed."""
        return make_plan(self.chosen, self.workspace, seed=seed, folder=self.out)

    @property
    def result(self) -> Path:
        """File of what came out."""
        return self.out / f"{self.whole.name}.json"


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds with commas between them.

    Raises:
        UsageError: none, one that is no whole number within bounds, or one twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*[0-9]+\s*", part, re.ASCII) or int(part) > MAX_SEED:
            raise UsageError(
                f"--seeds {text!r}: {part.strip()!r} is no seed from 0 to {MAX_SEED}; write 0,1,2 for three"
            )
        if int(part) in seeds:
            raise UsageError(f"--seeds {text!r} names {int(part)} twice, which would pass for two runs; name each once")
        seeds.append(int(part))
    return tuple(seeds)


def prepare(
    table: str,
    workspace: Workspace,
    out: Path,
    *,
    small: bool = False,
    rows: Sequence[str] = (),
    data: Sequence[str] = (),
    fetch: bool = True,
) -> Job:
    """Find a table's recipe, the rows that were asked for, and their images, before any work.

    Args:
        table: its name.
        workspace: says where things lie that the recipe does not name.
        out: where results go.
        small: the sister for two cores.
        rows: names of rows; all of the table for none.
        data: shards or images, as NAME=PATH.
        fetch: whether to download images that are not there.

    Raises:
        UsageError: no such table or row.
        MissingError: images that no row can do without; says what to fetch and where to put it.
    """
    if table not in paper_tables():
        raise UsageError(f"no table {table!r} in the paper; {_near(table, list(paper_tables()))}")
    paper = paper_tables()[table]
    path = Path(f"{table}_small" if small else table)
    recipe = load_recipe(path)
    plan = make_plan(recipe, workspace, seed=0, folder=out)
    if "{seed}" not in str(recipe.file.runs):
        raise UsageError(f"{recipe.path} keeps the runs of all seeds in one place; write {{seed}} into its `runs:`")
    asked = _check_rows(rows, paper, recipe)
    names = shard_stages(plan)
    given = named_data(data, list(names))
    needed = _narrowed(recipe, lambda row: row_of(row) in asked).stages
    supplies = {
        name: supply(plan, name, stage, given.get(name), fetch=fetch and stage in needed)
        for name, stage in names.items()
    }
    recipe = load_recipe(path, [text for it in supplies.values() for text in it.overrides])
    lacking = {names[name]: it.absent for name, it in supplies.items() if it.absent}
    lost: dict[str, str] = {}  # by stage
    for stage, row in _evaluated(recipe):
        network = "random" if row == RANDOM else None
        inputs = [name for role, name in recipe.stages[stage].inputs() if role in ("train", "test", network)]
        stages = {stage_of(name) for name in (inputs if network else [*inputs, row])}
        if why := next((lacking[name] for name in _closure(recipe, stages) if name in lacking), None):
            lost[row] = why
    whole = _narrowed(recipe, lambda row: row not in lost)
    left = {row_of(row) for _, row in _evaluated(whole)}
    absent = {row_of(row): why for row, why in lost.items() if row_of(row) not in left}
    if gone := [row for row in sorted(asked) if row in absent and (rows or not asked & left)]:
        raise MissingError(f"no images for {', '.join(gone[:3])}{' ...' if gone[3:] else ''}: {absent[gone[0]]}")
    whole = _without_data(whole, workspace, out, absent)
    made = left | absent.keys() | paper.quoted.keys()
    absent |= {row: f"{recipe.name} does not evaluate it" for row in paper.rows if row not in made}
    return Job(table, paper, whole, _narrowed(whole, lambda row: row_of(row) in asked), workspace, out, absent)


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"


def _check_rows(given: Sequence[str], paper: PaperTable, recipe: Recipe) -> set[str]:
    """The rows that are meant; commas part them, unless a row's own name has them."""
    known = list(dict.fromkeys(row_of(row) for _, row in _evaluated(recipe)))
    found: set[str] = set()
    for parts in (text.split(",") for text in given):
        while parts:
            names = [",".join(parts[:end]).strip() for end in range(len(parts), 0, -1)]
            row = next((name for name in names if name in known), names[-1])
            if row in paper.quoted:
                raise UsageError(f"row {row!r} is only quoted ({paper.quoted[row]}), and cannot be run; leave it out")
            if row not in known:
                raise UsageError(f"{recipe.path} has no row {row!r}; {_near(row, known)}")
            found.add(row)
            del parts[: len(parts) - names.index(row)]
    return found or set(known)


def row_of(stage: str) -> str:
    """The paper's row of a stage: "RotNet at 84 px" is RotNet, on other images than those of its other stage."""
    return stage.partition(" at ")[0]


def _evaluated(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Each stage that evaluates, and each network in it."""
    for name, stage in recipe.stages.items():
        if isinstance(stage, EvalStage):
            yield from ((name, row) for row in ([RANDOM] if stage.random else []) + list(stage.of))


def _closure(recipe: Recipe, stages: set[str]) -> set[str]:
    """The stages and all that they need."""
    found = set(stages)
    for name, stage in reversed(recipe.stages.items()):  # each stands behind its inputs
        if name in found:
            found |= {stage_of(reference) for _, reference in stage.inputs()}
    return found


def _narrowed(recipe: Recipe, keep: Callable[[str], bool]) -> Recipe:
    """A recipe with some networks of its evaluations alone, and the stages that these need."""
    stages = dict(recipe.stages)
    for name, stage in recipe.stages.items():
        if isinstance(stage, EvalStage):
            of = tuple(row for row in stage.of if keep(row))
            random = stage.random if keep(RANDOM) else None
            stages[name] = stage.model_copy(update={"of": of, "random": random})
            if not of and not random:
                del stages[name]
    narrowed = replace(recipe, stages=stages)
    needed = _closure(narrowed, {name for name, stage in stages.items() if isinstance(stage, EvalStage)})
    return replace(recipe, stages={name: stage for name, stage in stages.items() if name in needed})


def _without_data(recipe: Recipe, workspace: Workspace, out: Path, absent: dict[str, str]) -> Recipe:
    """A recipe without the protocols whose own images are not there, which `absent` is told.

    Raises:
        MissingError: none is left.
    """
    plan, stages = make_plan(recipe, workspace, seed=0, folder=out), dict(recipe.stages)
    made = [place for stage in plan.stages.values() for place in stage.writes]
    lost: dict[str, str] = {}
    for name, stage in plan.stages.items():
        if not isinstance(stage, EvalStage):
            continue
        places = {
            cell.kind.name: place
            for cell in stage.cells
            for place in cell.data.values()
            if not place.exists() and not any(place.is_relative_to(other) for other in made)
        }
        lost |= {f"eval {kind}": f"{place} is not there; {_fetched(place)}" for kind, place in places.items()}
        left = [item for item in stage.protocols if (item if isinstance(item, str) else next(iter(item))) not in places]
        stages[name] = recipe.stages[name].model_copy(update={"eval": left})
        if not left:
            del stages[name]
    if lost and not any(isinstance(stage, EvalStage) for stage in stages.values()):
        raise MissingError(next(iter(lost.values())))
    absent |= lost
    return _narrowed(replace(recipe, stages=stages), lambda _row: True)


def _fetched(place: Path) -> str:
    """How to come by images that a protocol reads as files."""
    if "VOC" in str(place):
        return "`bowstore data download voc2007 data` fetches it, or name it in bowstore.yaml: `voc: PATH`"
    return "put it there"


def reproduce(job: Job, seeds: Sequence[int], *, processes: int = 1) -> dict[str, Any]:
    """Run what is not done for each seed; what came out is written after each, and returned: `summary`, and more.

    Raises:
        MismatchError: results of other settings or images lie there.
        BowstoreError: as the stages.
    """
    plans = {seed: job.plan(seed) for seed in seeds}
    for plan in plans.values():  # the last seed, too, before the first hour of work
        for name, stage in plan.stages.items():
            with in_stage(name, plan.recipe.path):
                stage.check()
    for number, (seed, plan) in enumerate(plans.items(), 1):
        if plan.stages:
            run_recipe(plan, processes=processes, label=f"{job.whole.name}, seed {seed} ({number} of {len(seeds)})")
            write_json(job.result, _outcome(job))
    return _outcome(job)


def _outcome(job: Job) -> dict[str, Any]:
    """The table over all seeds that lie there, those of other commands too."""
    pattern = str(job.whole.file.runs)
    found = {path: re.fullmatch(re.escape(pattern).replace(r"\{seed\}", r"(\d+)"), str(path)) for path in _places(job)}
    measured: dict[int, dict[str, list[Result]]] = {}
    minutes: dict[str, dict[int, float]] = {}
    plan = None
    for seed in sorted(int(match[1]) for match in found.values() if match):
        try:
            plan = make_plan(job.whole, job.workspace, seed=seed, folder=job.out)
            rows = _results(plan, minutes, seed)
        except BowstoreError as error:
            say(f"seed {seed} is left out: {error}")
            continue
        measured |= {seed: rows} if rows else {}
    images, remarks = _images(plan) if plan else ({}, [])
    return {
        "recipe": job.whole.name,
        "out": str(job.out),
        **summary(job.table, job.paper, measured, images=images, absent=job.absent),
        "training_minutes": minutes,
        "remarks": remarks + _costs(minutes),
    }


def _places(job: Job) -> list[Path]:
    folder = str(job.whole.file.runs).replace("{seed}", "*")
    return sorted(path.relative_to(job.out) for path in job.out.glob(folder))


def _results(plan: Plan, minutes: dict[str, dict[int, float]], seed: int) -> dict[str, list[Result]]:
    """What is evaluated of a seed, by row; `minutes` is told what the rows' runs took."""
    rows: dict[str, list[Result]] = {}
    trained = {stage.run: stage for stage in plan.stages.values() if isinstance(stage, TrainStage)}
    for cell in (cell for stage in plan.stages.values() if isinstance(stage, EvalStage) for cell in stage.cells):
        if not cell.is_done():
            continue
        if problem := trained[cell.run].state().problem:
            say(f"seed {seed}, {cell.row}: left out of the table: {problem}")
            continue
        rows.setdefault(row_of(cell.row), []).append(read_result(cell.result))
        if cell.row != RANDOM and (took := _minutes(cell.run)):
            minutes.setdefault(cell.row, {})[seed] = took
    return rows


def _minutes(run: Path) -> float | None:
    """What a run took by its last rate, whatever lay between its sittings."""
    lines = [line for line in runs.read_metrics(run) if line.get("images_per_second")]
    batch = (runs.read_config(run).get("optim") or {}).get("batch")
    return round(lines[-1]["step"] * batch / lines[-1]["images_per_second"] / 60, 2) if lines and batch else None


def _costs(minutes: dict[str, dict[int, float]]) -> list[str]:
    each = [f"{row} {sum(took.values()) / len(took):.1f}" for row, took in minutes.items()]
    return [f"minutes of each row's own training, mean over seeds: {', '.join(each)}"] if each else []


def _images(plan: Plan) -> tuple[dict[str, str], list[str]]:
    """What test images are, by the name of their column; and what there is to say of each data set."""
    labels, remarks = {}, []
    for name, stage in shard_stages(plan).items():
        shards = plan.stages[stage]
        assert isinstance(shards, ShardsStage)
        whole = {role: folder for role, folder in shards.splits.items() if fingerprint(folder)}
        sizes = {role: len(open_index(folder)) for role, folder in whole.items()}
        known = "train" in whole and is_dataset(name, index := open_index(whole["train"]))
        for folder in whole.values():
            column = str(fingerprint(folder))[:8]
            labels[column] = f"{name} ({column})" if known else f"images that are not {name} ({column})"
        if whole:
            classes = "" if known else f", whose {len(index.classes)} classes are not those of {name}: not this table"
            remarks.append(f"{name}: {' and '.join(f'{n} {role}' for role, n in sizes.items())} images{classes}")
    return labels, remarks
