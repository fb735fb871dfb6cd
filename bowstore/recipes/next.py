"""Which stage of the workspace's recipe `bowstore train` and `bowstore encode` take. Loads no torch."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bowstore import runs
from bowstore.config import WORKSPACE_FILE, Workspace
from bowstore.errors import MissingError
from bowstore.progress import say
from bowstore.recipes.datasets import placed
from bowstore.recipes.encode import EncodeStage, complete_layer
from bowstore.recipes.plan import Plan
from bowstore.recipes.stage import fingerprint
from bowstore.recipes.train import TrainStage
from bowstore.remote import is_remote
from bowstore.torchrun import ranks
from bowstore.train.config import TrainConfig, key_of_today
from bowstore.workspace import resolve_train

S = TypeVar("S", TrainStage, EncodeStage)


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
    stage = next_training(plan, given)
    set_here = {key_of_today(override.partition("=")[0].strip(), stage.config.task.name) for override in overrides}
    said = {name: value for name, value in stage.flags.items() if name not in set_here}
    return resolve_train(plan.workspace, stage.file, overrides, {**said, **given}), plan.workspace.runs


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
    return placed(workspace.recipe, workspace)


def next_training(plan: Plan, given: Collection[str] = ()) -> TrainStage:
    """The first training stage whose run is not finished and whose inputs are there; the last if all are finished.

    Args:
        plan: the recipe.
        given: keys that flags set, `shards` and `task.store` for two: what is given need not be there by the recipe.

    Raises:
        MissingError: none has its inputs; the message says what the first one lacks.
    """
    stages = {name: stage for name, stage in plan.stages.items() if isinstance(stage, TrainStage)}
    stage = _first_ready(plan, stages, given)
    if stage.encoding and (problem := stage.encoding.state().problem) and ranks().first:
        say(f"{problem}, as stage {stage.words!r} says; it is trained on as it is")
    return stage


def next_encoding(plan: Plan) -> EncodeStage:
    """The first stage of words that are not complete and whose inputs are there; the last if all are complete.

    Raises:
        MissingError: none has its inputs; the message says what the first one lacks.
    """
    return _first_ready(plan, {name: s for name, s in plan.stages.items() if isinstance(s, EncodeStage)}, ())


def _first_ready(plan: Plan, stages: Mapping[str, S], given: Collection[str]) -> S:
    if not stages:
        raise MissingError(f"{plan.recipe.path} has no such stage")
    left = [name for name, stage in stages.items() if stage.state().so_far != "done"] or list(stages)[-1:]
    lacking = {name: _lacking(stages[name], given) for name in left}
    name = next((name for name in left if not lacking[name]), None)
    if name is None:
        raise MissingError(
            f"{plan.recipe.path}: stage {left[0]!r} waits for {lacking[left[0]]}, or `bowstore run` all of it"
        )
    if ranks().first:
        say(f"{plan.recipe.path}: stage {name!r}")
    return stages[name]


def _lacking(stage: TrainStage | EncodeStage, given: Collection[str]) -> str:
    """What a stage lacks first, and the command that makes it; nothing if it is ready."""
    for folder in () if "shards" in given else stage.shards:
        if not is_remote(folder) and fingerprint(folder) is None:
            return f"shards in {folder}: make them, `bowstore shards IMAGES {folder.parent}`"
    if isinstance(stage, EncodeStage):
        return _unfinished(Path(stage.given["teacher"])) if stage.teacher else ""
    if stage.start and "task.start" not in given and (lacking := _unfinished(stage.flags["task.start"])):
        return lacking
    words = stage.encoding
    if not words or "task.store" in given or is_remote(words.place):
        return ""
    layer = next((layer for layer in stage.layers if not complete_layer(words.place, layer)), "")
    return layer and f"layer {layer} of word store {words.place}: make it, `bowstore encode`"


def _unfinished(run: Path | str) -> str:
    return "" if runs.is_finished(Path(run)) else f"the run {run}: finish it, `bowstore train`"
