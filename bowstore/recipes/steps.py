"""Stages as they will run: settings checked, what each reads and where it writes. Loads no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bowstore import runs
from bowstore.config import Strict, Workspace
from bowstore.errors import BowstoreError
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.protocol import Kind
from bowstore.recipes.file import Recipe
from bowstore.recipes.kinds import ImagesToShards, RenderConfig
from bowstore.train.config import TrainConfig
from bowstore.words.config import EncodeConfig


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage, ready to run.

    Attributes:
        name: the stage's.
        kind: the stage's.
        reads: what it needs, as a user knows it.
        writes: where its results go; no two stages write to one place.
        after: names of the stages that it takes as inputs.
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    after: tuple[str, ...] = ()

    @property
    def known_whole(self) -> bool:
        """Whether all that it was made of is compared without torch, so that it is skipped once done."""
        return True


S = TypeVar("S", bound=Step)


@dataclass(frozen=True, kw_only=True)
class ImagesStep(Step):
    """Images are rendered, or a data set is fetched into `folder`; `out` is what shards are made of."""

    out: Path
    folder: Path
    render: RenderConfig | None = None
    download: str = ""


@dataclass(frozen=True, kw_only=True)
class ShardsStep(Step):
    """Images become shards: `out/SPLIT` of each split; `train` and `test` are what other stages read of them."""

    src: Path
    out: Path
    train: Path
    test: Path
    config: ImagesToShards

    @property
    def known_whole(self) -> bool:
        """Not so: the source has to be listed."""
        return False


@dataclass(frozen=True, kw_only=True)
class TrainStep(Step):
    """A run: its configuration as it will be resolved, and what makes it of the file."""

    run: Path
    config: TrainConfig
    file: Path
    flags: dict[str, Any]
    on: Path


@dataclass(frozen=True, kw_only=True)
class EncodeStep(Step):
    """Layers of a store."""

    config: EncodeConfig
    on: Path
    store: Path

    @property
    def known_whole(self) -> bool:
        """Where the teacher is a run: of another network the weights have to be loaded."""
        return runs.is_finished(Path(self.config.teacher))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One network under one protocol.

    Attributes:
        row: what the table calls the network.
        run: its run.
        kind: the protocol.
        settings: of the protocol, as far as they can be resolved.
        config: which network, and how it runs.
    """

    row: str
    run: Path
    kind: Kind
    settings: Strict
    config: EvalConfig

    @property
    def result(self) -> Path:
        """Where its result lies."""
        folder = runs.results_folder(self.run, random_init=self.config.random)
        return runs.result_path(folder, self.kind.describe(self.settings).id)

    @property
    def data(self) -> dict[str, Path]:
        """Folders of images, by the settings that name them."""
        return {name: value for name, value in self.settings if isinstance(value, Path)}


@dataclass(frozen=True, kw_only=True)
class EvalStep(Step):
    """Evaluations of networks."""

    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Plan:
    """A recipe in a workspace.

    Attributes:
        recipe: the recipe.
        workspace: says what the recipe does not; its runs are those of the recipe.
        steps: by the stages' names, each behind its inputs.
        folder: where relative places lie.
        result: file of the results.
        seed: of the whole recipe; None for those of the configurations.
    """

    recipe: Recipe
    workspace: Workspace
    steps: dict[str, Step]
    folder: Path
    result: Path
    seed: int | None

    def inputs(self, step: Step, kind: type[S]) -> list[S]:
        """The steps of some kind that a step takes as inputs."""
        return [other for name in step.after if isinstance(other := self.steps[name], kind)]


@contextmanager
def in_stage(name: str, recipe: Recipe) -> Iterator[None]:
    """Errors say the stage in which they came up."""
    try:
        yield
    except BowstoreError as error:
        raise type(error)(f"{recipe.path}: stage {name!r}: {error}") from error


def remedy_of(step: Step) -> str:
    """What to do about results of other settings in a stage's place."""
    return f"set it back, or give the stage another {OWN_PLACE[step.kind]}"


OWN_PLACE = {
    "render": "`out:`",
    "download": "`out:`",
    "shards": "`out:`",
    "train": "`name:`",
    "encode": "`store:`",
    "eval": "protocol or network",
}
