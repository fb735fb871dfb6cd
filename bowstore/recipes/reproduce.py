"""Reproduces the paper's tables: runs the stages that a table's rows need, for each seed, and collects the results.

Nothing here knows how a stage runs: a table is a recipe, narrowed to the rows that were asked for. Loads no torch.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bowstore import runs
from bowstore.config import Workspace
from bowstore.data.downloads import DOWNLOADS
from bowstore.errors import BowstoreError, MissingError, UsageError, nearest
from bowstore.evaluate.reproduction import summary
from bowstore.evaluate.results import PaperTable, Result, paper_tables, read_result
from bowstore.files import waiting_lock, write_json
from bowstore.limits import MAX_SEED
from bowstore.progress import say
from bowstore.recipes.datasets import Supply, describe_data, named_data, shard_stages, supply
from bowstore.recipes.evaluate import RANDOM, EvalStage
from bowstore.recipes.file import Recipe, load_recipe
from bowstore.recipes.plan import Plan, make_plan
from bowstore.recipes.run import run_recipe
from bowstore.recipes.stage import in_stage, stage_of
from bowstore.recipes.train import TrainStage

_SEED = "{seed}"


@dataclass(frozen=True)
class Job:
    """A table that can be made.

    Attributes:
        table: its name, table1 to table6.
        whole: its recipe, with the images that were found.
        chosen: the same with the stages alone that the rows asked for need; without any where none can be evaluated.
        workspace: says where things lie that the recipe does not name.
        out: where results lie.
        absent: why rows cannot be made, by row.
    """

    table: str
    whole: Recipe
    chosen: Recipe
    workspace: Workspace
    out: Path
    absent: dict[str, str]

    def plan(self, seed: int, *, whole: bool = False) -> Plan:
        """What is to be done for a seed."""
        recipe = self.whole if whole else self.chosen
        return make_plan(recipe, self.workspace, seed=seed, folder=self.out)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds with commas between them.

    Raises:
        UsageError: none, one that is no whole number within bounds, or one twice.
    """
    seeds: list[int] = []
    for part in map(str.strip, text.split(",")):
        if not re.fullmatch("[0-9]+", part) or int(part) > MAX_SEED:
            raise UsageError(f"--seeds {text!r}: {part!r} is no seed from 0 to {MAX_SEED}; write 0,1,2 for three")
        if int(part) in seeds:
            raise UsageError(f"--seeds {text!r} names {part} twice, which would pass for two runs; name each once")
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
    """Find a table's recipe, the rows that were asked for, and their images, before any other work.

    Args:
        table: its name.
        workspace: says where things lie that the recipe does not name.
        out: where results go.
        small: the sister for two cores.
        rows: names of rows with commas between them; all of the table for none.
        data: shards or images, as NAME=PATH.
        fetch: whether to download images that are not there.

    Raises:
        UsageError: no such table or row.
        MissingError: images that no row can do without; says what to fetch and where to put it.
    """
    if table not in paper_tables():
        raise UsageError(f"no table {table!r} in the paper; {_near(table, list(paper_tables()))}")
    paper, path = paper_tables()[table], Path(f"{table}_small" if small else table)
    recipe = load_recipe(path)
    if _SEED not in str(recipe.file.runs):
        raise UsageError(f"{recipe.path} keeps the runs of all seeds in one place; write {_SEED} into its `runs:`")
    asked = _check_rows(rows, paper, recipe)
    plan, needed = make_plan(recipe, workspace, seed=0, folder=out), _narrowed(recipe, asked.__contains__).stages
    names = shard_stages(plan)
    given = named_data(data, list(names))
    found = {
        stage: supply(plan, name, stage, given.get(name), fetch=fetch and stage in needed)
        for name, stage in names.items()
    }
    recipe = load_recipe(path, [override for it in found.values() for override in it.overrides])
    whole, absent = _with_data(recipe, make_plan(recipe, workspace, seed=0, folder=out), found)
    made = {row for _, row, _ in evaluated(whole)}
    if gone := [row for row in sorted(asked) if row not in made and (rows or not asked & made)]:
        why = dict.fromkeys(absent[row] for row in gone)
        raise MissingError(f"{', '.join(gone[:3])}{' ...' if gone[3:] else ''} cannot be made: {'; and '.join(why)}")
    others = {row: f"{recipe.name} does not evaluate it" for row in paper.rows if row not in {*made, *paper.quoted}}
    absent = {**others, **{row: why for row, why in absent.items() if row not in made}}
    return Job(table, whole, _narrowed(whole, asked.__contains__), workspace, out, absent)


def _near(name: str, names: Sequence[str]) -> str:
    return nearest(name, names) or f"there are {'; '.join(names)}"


def _check_rows(given: Sequence[str], paper: PaperTable, recipe: Recipe) -> set[str]:
    """The rows that are meant; commas part them, unless a row's own name has them."""
    known = list(dict.fromkeys(row for _, row, _ in evaluated(recipe)))
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
    """The paper's row of a stage: "RotNet at 84 px" is RotNet, on other images than those of another stage."""
    return stage.partition(" at ")[0]


def evaluated(recipe: Recipe) -> Iterator[tuple[str, str, set[str]]]:
    """Each stage that evaluates with each row in it, and the stages that this row needs first."""
    for name, stage in recipe.stages.items():
        if isinstance(stage, EvalStage):
            images = {stage_of(images) for images in (stage.train, stage.test) if images}
            if stage.random:
                yield name, RANDOM, images | {stage.random}
            yield from ((name, row_of(network), images | {network}) for network in stage.of)


def _closure(recipe: Recipe, stages: set[str]) -> set[str]:
    """The stages and all that they need."""
    found = set(stages)
    for name, stage in reversed(recipe.stages.items()):  # each stands behind its inputs
        found |= {stage_of(reference) for _, reference in stage.inputs()} if name in found else set()
    return found


def _narrowed(recipe: Recipe, keep: Callable[[str], bool], lost: Collection[str] = ()) -> Recipe:
    """A recipe that evaluates some rows alone, without stages that are lost, and has the stages that these need."""
    stages = {}
    for name, stage in recipe.stages.items():
        if isinstance(stage, EvalStage):
            of = tuple(network for network in stage.of if network not in lost and keep(row_of(network)))
            random = stage.random if keep(RANDOM) and stage.random not in lost else None
            if stage.protocols and (of or random) and name not in lost:
                stages[name] = stage.model_copy(update={"of": of, "random": random})
    needed = _closure(replace(recipe, stages={**recipe.stages, **stages}), set(stages))
    return replace(recipe, stages={k: stages.get(k, v) for k, v in recipe.stages.items() if k in needed})


def _with_data(recipe: Recipe, plan: Plan, found: dict[str, Supply]) -> tuple[Recipe, dict[str, str]]:
    """A recipe without the networks and the protocols whose images are not there, and why, by row and protocol."""
    absent: dict[str, str] = {}
    lost: set[str] = set()

    def lacking(stages: set[str]) -> str:
        return next((found[it].absent for it in _closure(recipe, stages) if it in found and found[it].absent), "")

    for name, row, needs in evaluated(recipe):
        if why := lacking(needs):
            absent[row] = why
            networks = {it for it in needs if lacking({it}) and it not in found}
            lost |= networks or {name}  # a network that is there is evaluated on other images
            stage = recipe.stages[name]
            if not networks and isinstance(stage, EvalStage):
                absent |= {f"eval {it if isinstance(it, str) else next(iter(it))}": why for it in stage.protocols}
    made = [place for stage in plan.stages.values() for place in stage.writes]
    stages = dict(recipe.stages)
    for name, stage in plan.stages.items():
        places = [
            (cell.kind.name, place)
            for cell in (stage.cells if isinstance(stage, EvalStage) else ())
            for folders in cell.data.values()
            for place in folders
        ]
        gone = {kind: p for kind, p in places if not p.exists() and not any(p.is_relative_to(it) for it in made)}
        if gone and isinstance(stage, EvalStage):
            left = [it for it in stage.protocols if not gone.keys() & ({it} if isinstance(it, str) else it.keys())]
            stages[name] = recipe.stages[name].model_copy(update={"eval": left})
            told = {f"eval {kind}": f"{place} is not there; {_fetched(place)}" for kind, place in gone.items()}
            rows = [] if left else [row for evaluation, row, _ in evaluated(recipe) if evaluation == name]
            absent = {**told, **dict.fromkeys(rows, next(iter(told.values()))), **absent}
    return _narrowed(replace(recipe, stages=stages), lambda _row: True, lost), absent


def _fetched(place: Path) -> str:
    """How to come by images that a protocol reads as files."""
    if (name := place.name.lower()) not in DOWNLOADS:
        return "put it there"
    return f"`bowstore data download {name} data` fetches it, or name the devkit in bowstore.yaml: `voc: PATH`"


def reproduce(job: Job, seeds: Sequence[int], *, processes: int = 1) -> dict[str, Any]:
    """Run what is not done for each seed; what came out is written after each, and returned: `summary`, and more.

    Raises:
        MismatchError: results of other settings or images lie there.
        BowstoreError: as the stages.
    """
    plans = {seed: job.plan(seed) for seed in seeds if job.chosen.stages}
    for plan in plans.values():  # the last seed, too, before the first hour of work
        for name, stage in plan.stages.items():
            with in_stage(name, plan.recipe.path):
                stage.check()
    for line in describe_data(job.plan(0))[1] if plans else ():
        say(line)
    for number, (seed, plan) in enumerate(plans.items(), 1):
        run_recipe(plan, processes=processes, label=f"{job.whole.name}, seed {seed} ({number} of {len(seeds)})")
        path = job.out / f"{job.whole.name}.json"
        with waiting_lock(path.with_name(f".{path.name}.lock"), str(path)):  # no older table over another process's
            write_json(path, _outcome(job))
    return _outcome(job)


def _outcome(job: Job) -> dict[str, Any]:
    """The table over all seeds in the folder, whichever command made them."""
    before, _, after = str(job.whole.file.runs).partition(_SEED)
    places = [str(path.relative_to(job.out)) for path in job.out.glob(f"{before}*{after}")]
    numbers = [place.removeprefix(before).removesuffix(after) for place in places]
    measured: dict[int, dict[str, list[Result]]] = {}
    minutes: dict[str, dict[int, float]] = {}
    labels, remarks = describe_data(job.plan(0, whole=True))
    for seed in sorted(int(number) for number in numbers if number.isdecimal()):
        try:
            rows, problems = _results(job.plan(seed, whole=True), seed, minutes)
        except BowstoreError as error:
            rows, problems = {}, {"all rows": str(error)}
        measured |= {seed: rows} if rows else {}
        remarks += [f"seed {seed}, {row}: left out of the table: {problem}" for row, problem in problems.items()]
    each = [f"{row} {sum(took.values()) / len(took):.1f}" for row, took in minutes.items()]
    remarks += [f"minutes of each row's own training, mean over seeds: {'; '.join(each)}"] if each else []
    return {
        "recipe": job.whole.name,
        "here": job.whole.file.title,
        "out": str(job.out),
        **summary(job.table, measured, images=labels, absent=job.absent),
        "training_minutes": {row: {str(seed): took[seed] for seed in took} for row, took in minutes.items()},
        "remarks": remarks,
    }


def _results(
    plan: Plan, seed: int, minutes: dict[str, dict[int, float]]
) -> tuple[dict[str, list[Result]], dict[str, str]]:
    """What is evaluated of a seed, by row, and what is left out, and why; `minutes` is told what each run took.

    A row is of the recipe if its run is, and all that it was made of: an old teacher's words are in the student.
    """
    rows: dict[str, list[Result]] = {}
    problems: dict[str, str] = {}
    trained = {stage.run: name for name, stage in plan.stages.items() if isinstance(stage, TrainStage)}
    states = {name: stage.state() for name, stage in plan.stages.items()}
    for cell in (cell for stage in plan.stages.values() if isinstance(stage, EvalStage) for cell in stage.cells):
        if not cell.is_done():
            continue
        own = {trained[cell.run]}
        behind = own if cell.row == RANDOM else _closure(plan.recipe, own)
        if problem := next((it.problem for name, it in states.items() if name in behind and it.problem), ""):
            problems[cell.row] = problem
            continue
        rows.setdefault(row_of(cell.row), []).append(read_result(cell.result))
        if cell.row != RANDOM and (took := _minutes(cell.run)) is not None:
            minutes.setdefault(cell.row, {})[seed] = took
    return rows, problems


def _minutes(run: Path) -> float | None:
    """What a run took, by the rate that it logged last: whatever lay between its sittings does not count."""
    lines = [line for line in runs.read_metrics(run) if line.get("images_per_second")]
    images = lines[-1]["step"] * runs.read_config(run)["optim"]["batch"] if lines else 0
    return round(images / lines[-1]["images_per_second"] / 60, 2) if images else None
