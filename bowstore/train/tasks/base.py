"""What a training task is to the rest: its name, its settings, and where its code is. Loads no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from bowstore.config import Place, Strict, ViewConfig, Workspace
from bowstore.plugins import Plugin

if TYPE_CHECKING:  # with torch
    from bowstore.train.tasks.task import Job, Task


class TaskSettings(Strict):
    """Settings of a task; each kind has its own below this."""

    name: str

    def check_view(self, view: ViewConfig) -> None:
        """Raise a ValueError that says why the task cannot be trained on a view, and what to set; most take any."""

    def check_images(self, images: int) -> None:
        """Raise a UsageError that says why the task cannot be trained on so many images; most take any number."""

    def check_map(self, layer: str, grid: tuple[int, int]) -> None:
        """Raise a UsageError that says why the task cannot learn words of a layer on a grid (h, w); most learn any."""

    def input_side(self, view: ViewConfig) -> int:
        """Side of the network's inputs, pixels: the view's, where the task does not cut it up."""
        return view.size


class StartedSettings(TaskSettings):
    """Settings of a task whose network may begin with the backbone of another run (`bowstore.train.start`)."""

    start: Place | None = Field(
        None, description="run, checkpoint or exported network that the network starts from; null: random weights"
    )


@dataclass(frozen=True, kw_only=True)
class Kind(Plugin):
    """A training task.

    Attributes:
        name: in a configuration, as in `task: {name: words}`; a plugin is a module that holds such a value.
        settings: the model of what else stands there.
        build: makes the task of its settings and a job; as "module:name" it is imported only to be called.
        teacher: whether the newest finished run of this task makes words where nobody names a teacher.
        mixes: whether an image with a part of another pasted into it (CutMix) has a target.
        resolve: fills in what the settings leave to the workspace, whose storage is the run's own; None for nothing.
    """

    settings: type[TaskSettings]
    build: "str | Callable[[Any, Job], Task]"
    teacher: bool = True
    mixes: bool
    resolve: str | Callable[[Any, Workspace], TaskSettings] | None = None
