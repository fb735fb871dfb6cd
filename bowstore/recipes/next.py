"""Which stage of the workspace's recipe `bowstore train` and `bowstore encode` take. Loads no torch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bowstore import runs
from bowstore.config import WORKSPACE_FILE, Workspace
from bowstore.errors import MissingError
from bowstore.progress import say
from bowstore.recipes.file import load_recipe
from bowstore.recipes.plan import make_plan
from bowstore.recipes.state import fingerprint, layer_of, state_of
from bowstore.recipes.steps import EncodeStep, Plan, Step, TrainStep
from bowstore.remote import is_remote
from bowstore.torchrun import ranks
from bowstore.train.config import TrainConfig, key_of_today
from bowstore.workspace import resolve_train

S = TypeVar("S", bound=Step)


def resolve_training(
    workspace: Workspace, config: Path | None, overrides: Sequence[str], flags: Mapping[str, Any]
) -> tuple[TrainConfig, Path]:
    """What `bowstore train` trains, and the folder of runs: as named, as the workspace says, or the recipe's next.

    Args:
        workspace: names a configuration or a recipe, perhaps.
        config: file, or the name of one; None if none was named.
        overrides: `a.b=value`, from --set; they win over what the recipe says.
        flags: values of other flags by key; None counts as not given. They win, too.

    Raises:
        MissingError: nothing is named anywhere, or no training stage has its inputs.
        UsageError: a key or value that cannot be used.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if named := config or workspace.config:
        return resolve_train(workspace, named, overrides, given), workspace.runs
    plan = workspace_plan(workspace, "--config CONFIG")
    step = next_training(plan, given)
    set_here = {key_of_today(override.partition("=")[0].strip(), step.config.task.name) for override in overrides}
    said = {name: value for name, value in step.flags.items() if name not in set_here}
    return resolve_train(plan.workspace, step.file, overrides, {**said, **given}), plan.workspace.runs


def workspace_plan(workspace: Workspace, flag: str) -> Plan:
    """The workspace's recipe.

    Raises:
        MissingError: it names none; the message names the flag that does without.
    """
    if workspace.recipe is None:
        raise MissingError(
            f"the workspace names no recipe to say what comes next; give {flag}, or write `recipe: NAME` into "
            f"{WORKSPACE_FILE} (`bowstore init --recipe NAME` does)"
        )
    return make_plan(load_recipe(workspace.recipe), workspace)


def next_training(plan: Plan, given: Iterable[str] = ()) -> TrainStep:
    """The first training stage whose run is not finished and whose inputs are there; the last if all are finished.

    Args:
        plan: the recipe.
        given: keys that flags set, `shards` and `task.store` for two: what is given need not be there by the recipe.

    Raises:
        MissingError: none has its inputs; the message says what the first one lacks.
    """
    steps = [step for step in plan.steps.values() if isinstance(step, TrainStep)]
    left = [step for step in steps if not runs.is_finished(step.run)]
    step = _first_ready(plan, left or steps[-1:], given)
    for words in plan.inputs(step, EncodeStep):
        if (problem := state_of(words).problem) and ranks().first:
            say(f"{problem}, as stage {words.name!r} says; it is trained on as it is")
    return step


def next_encoding(plan: Plan) -> EncodeStep:
    """The first stage of words that are not complete and whose inputs are there; the last if all are complete.

    Raises:
        MissingError: none has its inputs; the message says what the first one lacks.
    """
    steps = [step for step in plan.steps.values() if isinstance(step, EncodeStep)]
    return _first_ready(plan, [step for step in steps if state_of(step).so_far != "done"] or steps[-1:], ())


def _first_ready(plan: Plan, steps: Sequence[S], given: Iterable[str]) -> S:
    if not steps:
        raise MissingError(f"{plan.recipe.path} has no such stage")
    lacking = {step.name: next(_missing(step, plan, set(given)), None) for step in steps}
    for step in steps:
        if lacking[step.name] is None:
            if ranks().first:
                say(f"{plan.recipe.path}: stage {step.name!r}")
            return step
    first = steps[0].name
    raise MissingError(f"{plan.recipe.path}: stage {first!r} waits for {lacking[first]}, or `bowstore run` all of it")


def _missing(step: Step, plan: Plan, given: set[str]) -> Iterator[str]:
    """What a stage lacks, and the command that makes it."""
    assert isinstance(step, TrainStep | EncodeStep)
    if "shards" not in given and not is_remote(step.on) and fingerprint(step.on) is None:
        yield f"shards in {step.on}: make them, `bowstore shards IMAGES {step.on.parent}`"
    for words in plan.inputs(step, EncodeStep) if "task.store" not in given else ():
        layer = getattr(step.config.task, "layer", None) if isinstance(step, TrainStep) else None
        if not is_remote(words.store) and not layer_of(words.store, layer):
            yield (
                f"layer {layer} of word store {words.store}: make it, `bowstore encode --layer {layer} "
                f"--K {words.config.num_words[0] if words.config.num_words else 'K'}`"
            )
    for teacher in plan.inputs(step, TrainStep):
        if not runs.is_finished(teacher.run):
            yield f"the run {teacher.run}: finish it, `bowstore train`"
