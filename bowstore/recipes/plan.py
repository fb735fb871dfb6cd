"""A recipe in a workspace: its stages with their settings checked, and how far they are. Loads no torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bowstore.config import Workspace
from bowstore.errors import BowstoreError, UsageError
from bowstore.recipes.file import Recipe
from bowstore.recipes.stage import DONE, Here, Stage, in_stage
from bowstore.remote import is_remote, local_only, url_of


@dataclass(frozen=True)
class Plan(Here):
    """A recipe in a workspace."""

    recipe: Recipe

    @property
    def result(self) -> Path:
        """File of the results."""
        named = self.recipe.file.result
        return self.place(named) if named else self.workspace.runs / f"{self.recipe.name}.recipe.json"

    def as_it_is_now(self) -> "Plan":
        """The same plan anew: what a protocol is asked may follow from images that were not there before."""
        return make_plan(self.recipe, self.workspace, seed=self.seed, folder=self.folder)

    def named(self, name: str) -> Stage:
        """A stage by name.

        Raises:
            UsageError: there is none.
        """
        if name not in self.stages:
            raise UsageError(f"{self.recipe.path} has no stage {name!r}; its stages are {', '.join(self.stages)}")
        return self.stages[name]

    def overview(self, only: str | None = None) -> list[dict[str, Any]]:
        """All stages, or one, in the order of running, as plain values: what each reads and writes, how far it is."""
        shown = []
        for name, stage in {only: self.named(only)}.items() if only else self.stages.items():
            with in_stage(name, self.recipe.path):
                state, problem = stage.state(), ""
                try:
                    stage.check()
                except BowstoreError as error:
                    problem = str(error)
                shown.append(
                    {
                        "stage": name,
                        "kind": stage.kind,
                        "state": state.so_far if state == DONE or stage.needed else "not needed",
                        "problem": problem,
                        "reads": [_shown(place) for place in stage.reads],
                        "writes": [_shown(place) for place in stage.writes],
                    }
                )
        return shown

    def text(self, only: str | None = None) -> str:
        """The overview for people, a few lines for each stage."""
        lines = [f"{self.recipe.path}{'' if self.seed is None else f', seed {self.seed}'}"]
        for stage in self.overview(only):
            lines += ["", f"{stage['stage']} ({stage['kind']}): {stage['state']}"]
            lines += [f"  refused: {stage['problem']}"] if stage["problem"] else []
            lines += [f"  {what:<6} {place}" for what in ("reads", "writes") for place in stage[what]]
        return "\n".join(lines)


def _shown(place: Path | str) -> str:
    return url_of(place) if is_remote(place) else str(place)


def make_plan(recipe: Recipe, workspace: Workspace, *, seed: int | None = None, folder: Path | None = None) -> Plan:
    """Put a recipe's stages into a workspace; nothing is written, and no data is looked at.

    Args:
        recipe: checked.
        workspace: says where things lie that the recipe does not name.
        seed: of all training and encoding; None for the recipe's.
        folder: where relative places of results lie; None for the recipe's.

    Raises:
        MissingError: a configuration that is not there.
        UsageError: settings that cannot be used, two stages that write to one place, or a folder on another machine.
    """
    file = recipe.file
    if folder:
        local_only(folder, "give a local --out, then copy what lies there")
    here = Here(workspace, folder or file.folder or Path(), file.seed if seed is None else seed, {})
    own = workspace.model_copy(update={"runs": here.place(file.runs)} if file.runs else {})
    plan = Plan(own, here.folder, here.seed, {}, recipe)
    writers: dict[str, str] = {}
    for name, stage in recipe.stages.items():
        plan.stages[name] = stage.put(plan)
        with in_stage(name, recipe.path):
            plan.stages[name].check_settings()
            writes = plan.stages[name].writes
        for place in writes:
            other = writers.setdefault(os.path.normpath(place), name)
            if other != name or list(writes).count(place) > 1:
                both = f"stages {other!r} and {name!r} both write {place}"
                who = both if other != name else f"stage {name!r} writes {place} twice"
                raise UsageError(f"{recipe.path}: {who}; give one of them another {stage.own_place}")
    return plan
