"""A recipe's file: found, read, and its stages checked and put in the order of running. Loads no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from bowstore.config import CONFIGS, Place, Seed, Strict, Text, bundled_configs, find_config, no_such_config, validate
from bowstore.errors import MissingError, UsageError, nearest
from bowstore.overrides import apply_overrides
from bowstore.recipes.encode import EncodeStage
from bowstore.recipes.evaluate import EvalStage
from bowstore.recipes.images import DownloadStage, RenderStage, ShardsStage
from bowstore.recipes.stage import Stage, stage_of
from bowstore.recipes.train import TrainStage
from bowstore.train.config import read_with_base
from bowstore.yaml_file import shown

RECIPES = "recipes"  # the folder, in configs/
KINDS: dict[str, type[Stage]] = {
    stage.kind: stage for stage in (RenderStage, DownloadStage, ShardsStage, TrainStage, EncodeStage, EvalStage)
}


class RecipeFile(Strict):
    """What stands in the file, over what stands in the recipe that it is based on (`read_with_base`)."""

    title: Text | None = Field(None, description="line above the table of results")
    folder: Place | None = Field(None, description="where relative places of results lie; null: the current directory")
    runs: Place | None = Field(None, description="of run directories; null: the workspace's")
    result: Place | None = Field(None, description="file of the results; null: NAME.recipe.json in runs")
    seed: Seed | None = Field(None, description="of all training and encoding; null: what their configurations say")
    stages: dict[str, dict[str, Any]] = Field({}, description="by name")


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked.

    Attributes:
        name: of its file, without the extension.
        path: its file.
        file: what stands there.
        stages: by name, each behind its inputs.
        overrides: those over what stands in the file.
    """

    name: str
    path: Path
    file: RecipeFile
    stages: dict[str, Stage]
    overrides: tuple[str, ...] = ()


def bundled_recipes() -> dict[str, Path]:
    """Recipes that come with bowstore, by name."""
    return {path.stem: path for path in sorted((bundled_configs() / RECIPES).glob("*.yaml"))}


def find_recipe(recipe: Path) -> Path:
    """The file that is meant (`find_config`).

    Raises:
        MissingError: there is none; the message names the nearest that comes with bowstore.
    """
    if not (path := find_config(recipe, RECIPES)).is_file():
        raise MissingError(f"no recipe {recipe}; {no_such_config(recipe, RECIPES)}")
    return path


def recipe_files(recipe: Recipe) -> dict[Path, Path]:
    """The files of a recipe and of its training configurations, by their places in a workspace; its own file first.

    Raises:
        MissingError: a configuration that is not there.
    """
    bundled = recipe.path.is_relative_to(bundled_configs())  # with its own configurations, whatever lies here
    own = CONFIGS / RECIPES / f"{recipe.name}.yaml"
    files = {_place(file, recipe.path, own, RECIPES): file for file in read_with_base(recipe.path, group=RECIPES)[1]}
    for named in (config for stage in recipe.stages.values() for config in stage.configurations):
        source = bundled_configs() / named.name if bundled else find_config(named)
        if not source.is_file():
            raise MissingError(f"{recipe.path} names the configuration {source}, which is not there")
        place = CONFIGS / source.name if named.parent in (Path(), CONFIGS) else named
        if not (place.is_absolute() or ".." in place.parts):
            files |= {_place(file, source, place): file for file in read_with_base(source)[1]}
    return files


def _place(file: Path, source: Path, place: Path, group: str = "") -> Path:
    """Where a copy of a base is found from the copy at `place` of what is based on it: beside it, or in configs/."""
    if file == source:
        return place
    beside = file.is_relative_to(source.parent)
    return place.parent / file.relative_to(source.parent) if beside else CONFIGS / group / file.name


def load_recipe(recipe: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe: stages of known kinds, with inputs that are there, of the right kind, without a circle.

    Args:
        recipe: a file, or the name of one (`find_recipe`).
        overrides: `stages.NAME.KEY=value`, from --set.

    Raises:
        MissingError: no such file.
        UsageError: it is no recipe; the message names the stage.
    """
    path = find_recipe(recipe)
    values, _ = read_with_base(path, group=RECIPES)
    file = validate(RecipeFile, apply_overrides(values, overrides), str(path))
    if not file.stages:
        raise UsageError(f"{path} has no stages; write some below `stages:`")
    stages = {name: _stage(name, values, f"{path}: stage {name!r}") for name, values in file.stages.items()}
    for name, stage in stages.items():
        for role, reference in stage.inputs():
            if problem := _input_problem(reference, stages, stage.takes[role]):
                raise UsageError(f"{path}: stage {name!r}: input `{role}: {reference}`{problem}")
    return Recipe(path.stem, path, file, _in_order(stages, path), tuple(overrides))


def _stage(name: str, values: dict[str, Any], where: str) -> Stage:
    if "/" in name or not name.strip():
        raise UsageError(f"{where}: a stage's name is text without a slash")
    kinds = ["eval"] if "eval" in values else [kind for kind in KINDS if kind in values]  # eval has an input `train`
    if len(kinds) != 1:
        near = "" if kinds else next(filter(None, (nearest(key, KINDS) for key in values)), "")
        hint = near or f"the kinds are {', '.join(KINDS)}"
        what = "is of kinds " + " and ".join(kinds) if kinds else f"with {shown(sorted(values))} is of no known kind"
        raise UsageError(f"{where} {what}; {hint}")
    return validate(KINDS[kinds[0]], {**values, kinds[0]: values[kinds[0]] or {}}, where)


def _input_problem(reference: str, stages: dict[str, Stage], wanted: tuple[str, ...]) -> str | None:
    name = stage_of(reference)
    if name not in stages:
        return f": no stage {name!r}; " + (nearest(name, stages) or f"they are {', '.join(stages)}")
    if (kind := stages[name].kind) not in wanted:
        return f" is a stage of kind {kind}, and must be one of kind {' or '.join(wanted)}"
    return f": only shards have splits; write {name!r}" if "/" in reference and kind != "shards" else None


def _in_order(stages: dict[str, Stage], path: Path) -> dict[str, Stage]:
    """Each stage behind its inputs, else in the order of the file."""
    ordered: dict[str, Stage] = {}

    def visit(name: str, behind: tuple[str, ...]) -> None:
        if name in behind:
            circle = " -> ".join((*behind[behind.index(name) :], name))
            raise UsageError(f"{path}: stages wait for each other in a circle: {circle}; take one input out")
        if name not in ordered:
            for _, reference in stages[name].inputs():
                visit(stage_of(reference), (*behind, name))
            ordered[name] = stages[name]

    for name in stages:
        visit(name, ())
    return ordered
