"""What a stage of a recipe is: its fields are what the file says, its methods what that means in a workspace. No torch.

Each kind is a class in a module beside this one; the product's own function makes its results, imported to be called.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self, TypeVar

from bowstore.config import SomePaths, Strict, Workspace, places
from bowstore.data.table import INDEX_FILE, TableHeader, joint_fingerprint, read_header
from bowstore.errors import BowstoreError, MismatchError, MissingError
from bowstore.models.record import NetworkRecord
from bowstore.remote import is_remote

T = TypeVar("T")


class State(NamedTuple):
    """How far a stage is.

    Attributes:
        so_far: done, begun, or neither.
        problem: what lies there is of other settings or inputs: what differs; empty if nothing.
    """

    so_far: Literal["done", "begun", "to do"]
    problem: str = ""


TO_DO, BEGUN, DONE = State("to do"), State("begun"), State("done")


class Stage(Strict, ABC):
    """A stage: under its kind the settings, beside it inputs, and where it writes.

    The file gives the fields; all below `inputs` is of a stage that was `put` into a workspace, writes nothing but for
    `make`, and raises `BowstoreError` for settings or files that cannot be used.

    Attributes:
        kind: its name in the file.
        takes: its inputs, and the kinds of stages that each may be.
        own_place: what gives its results another place, for messages.
        distributed: whether torchrun may run it in many processes.
    """

    kind: ClassVar[str]
    takes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    own_place: ClassVar[str] = "`out:`"
    distributed: ClassVar[bool] = False
    _here: "Here"

    def inputs(self) -> list[tuple[str, str]]:
        """Each input that is given, and the stage; one of shards perhaps with a split, as in data/test."""
        given = [(role, getattr(self, role)) for role in self.takes]
        return [(role, name) for role, value in given for name in ((value,) if isinstance(value, str) else value or ())]

    @property
    def configurations(self) -> tuple[Path, ...]:
        """The training configurations that it names, as the file does."""
        return ()

    def put(self, here: "Here") -> Self:
        """The same stage in a workspace."""
        stage = self.model_copy()
        stage._here = here
        return stage

    @property
    def reads(self) -> tuple[Path | str, ...]:
        """What it needs: places as paths, anything else as text."""
        return ()

    @property
    @abstractmethod
    def writes(self) -> tuple[Path, ...]:
        """Where its results go; no two stages write to one place."""

    @property
    def known_whole(self) -> bool:
        """Whether `state` compares all that it was made of, so that it is skipped once done."""
        return True

    @property
    def needed(self) -> bool:
        """Whether anybody needs what it makes."""
        return True

    @abstractmethod
    def state(self) -> State:
        """How far it is, by what lies on the disk."""

    @abstractmethod
    def make(self) -> list[str]:
        """Make its results, or go on with them; returns lines that report on it."""

    @property
    def network(self) -> NetworkRecord | None:
        """The network that it trains; None of other kinds."""
        return None

    def check_settings(self) -> None:
        """Refuse, as the recipe is planned, what cannot be whatever the data are.

        Raises:
            UsageError: settings that do not go together, or not with those of its inputs.
        """

    def check(self) -> None:
        """Refuse what is known before anything runs: results of other settings, and inputs that nobody will make.

        Raises:
            MismatchError: what lies in its place is of other settings or inputs.
            MissingError: something that it reads is not there, and no stage makes it.
        """
        state = self.state()
        if state.problem:
            raise MismatchError(f"{state.problem}; set it back, or give the stage another {self.own_place}")
        made = [place for other in self._here.stages.values() for place in other.writes]
        for place in self.reads if state != DONE else ():
            if not isinstance(place, Path) or is_remote(place) or place.exists():
                continue
            if not any(place.is_relative_to(other) or other.is_relative_to(place) for other in made):
                raise MissingError(f"{place} is not there, and no stage makes it; name another, or put it there")


@dataclass(frozen=True)
class Here:
    """Where stages are.

    Attributes:
        workspace: says what the recipe does not; its runs are those of the recipe.
        folder: where relative places of results lie.
        seed: of the whole recipe; None for those of the configurations.
        stages: by name, each behind its inputs.
    """

    workspace: Workspace
    folder: Path
    seed: int | None
    stages: dict[str, Stage]

    def place(self, path: Path) -> Path:
        """A place of the recipe, with the seed filled in."""
        named = Path(str(path).replace("{seed}", str(self.seed or 0)))
        return named if is_remote(named) else self.folder / named


def stage_of(reference: str) -> str:
    """The stage that an input names, without a split."""
    return reference.partition("/")[0]


@contextmanager
def in_stage(name: str, recipe: Path) -> Iterator[None]:
    """Errors say the recipe and the stage in which they came up."""
    try:
        yield
    except BowstoreError as error:
        raise type(error)(f"{recipe}: stage {name!r}: {error}") from error


def fingerprint(shards: SomePaths) -> str | None:
    """The fingerprint in an index, or of several as one; None where there is none here, or it cannot be read."""
    parts = [_of_index(folder, lambda header: str(header.meta["fingerprint"])) for folder in places(shards)]
    known = [part for part in parts if part is not None]
    return joint_fingerprint(known) if len(known) == len(parts) else None


def images_in(shards: Sequence[Path]) -> int | None:
    """How many images indexes have; None where there is none here, or it cannot be read."""
    parts = [_of_index(folder, lambda header: header.rows) for folder in shards]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _of_index(shards: Path, ask: Callable[[TableHeader], T]) -> T | None:
    if is_remote(shards):
        return None
    try:
        return ask(read_header(shards / INDEX_FILE))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
