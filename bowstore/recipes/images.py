"""Stages that end in shards: images are rendered or fetched, and written as shards."""

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Self, TypeVar, cast

from pydantic import Field, field_validator, model_validator

from bowstore.config import WORKSPACE_FILE, Place, Places, Seed, Strict, Text, Workspace, places
from bowstore.data.config import ShardsConfig
from bowstore.data.downloads import DOWNLOADS, fetch
from bowstore.data.records import PARTS_FOLDER, PLAN_FILE, read_manifest
from bowstore.data.shards import make_shards
from bowstore.data.synthetic import MARKER, write_images
from bowstore.data.table import INDEX_FILE
from bowstore.errors import BusyError, MissingError, UsageError
from bowstore.files import read_json
from bowstore.progress import say
from bowstore.recipes.stage import BEGUN, DONE, TO_DO, Here, Stage, State, stage_of
from bowstore.remote import is_remote, url_of
from bowstore.workspace import val_shards

T = TypeVar("T")


class ImagesStage(Stage):
    """Images, which need not be there once they have become shards."""

    out: Place

    @property
    def writes(self) -> tuple[Path, ...]:
        """The images."""
        return (self._here.place(self.out),)

    @property
    def needed(self) -> bool:
        """Whether there are shards to be made of them, or the recipe makes none at all."""
        shards = [stage for stage in self._here.stages.values() if isinstance(stage, ShardsStage)]
        states = [stage.state() for stage in shards if stage.source in self.writes]
        return not shards or any(state.so_far != "done" for state in states)


_Images = Annotated[int, Field(ge=10, le=10**6)]  # one a class; files are numbered with six digits


class RenderConfig(Strict):
    """The embedded data set (`bowstore.data.synthetic`)."""

    train: _Images = 10_000
    val: _Images = 2_500
    size: int = Field(32, ge=16, le=1024, description="pixels")
    seed: Seed = 0


class RenderStage(ImagesStage):
    """Images that are rendered."""

    kind = "render"

    render: RenderConfig
    out: Place = Path("data/images")

    def state(self) -> State:
        """By the marker that rendering leaves."""
        (out,) = self.writes
        try:
            marker = read_json(out / MARKER)
        except MissingError:
            return TO_DO
        for name, value in self.render:
            if marker.get(name) != value:
                return State("done", f"{out} holds images of {name} {marker.get(name)}, not {value}")
        return DONE if marker.get("complete") else BEGUN

    def make(self) -> list[str]:
        """Render them."""
        write_images(self.writes[0], **dict(self.render))
        return []


class DownloadStage(ImagesStage):
    """A public data set; `bowstore data` lists their names."""

    kind = "download"

    download: Text
    out: Place = Path("data")

    @field_validator("download")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DOWNLOADS:
            raise ValueError(f"no download {name!r}; there are {', '.join(DOWNLOADS)}")
        return name

    @property
    def writes(self) -> tuple[Path, ...]:
        """The images: the only file or folder, or that of them all."""
        results, folder = DOWNLOADS[self.download].results, self._here.place(self.out)
        return (folder / results[0] if len(results) == 1 else folder,)

    def state(self) -> State:
        """Whether it is there."""
        return DONE if self.writes[0].exists() else TO_DO

    def make(self) -> list[str]:
        """Fetch it."""
        _once_free(lambda: fetch(self.download, self._here.place(self.out)))
        return []


def _once_free(make: Callable[[], T]) -> T:
    """What `make` gives, as soon as no other process (that of another seed) makes the same."""
    told = False
    while True:
        try:
            return make()
        except BusyError as error:
            if not told:
                say(f"waiting: {str(error).partition(';')[0]}")
            told = True
            time.sleep(0.5)


class ImagesToShards(ShardsConfig):
    """Images to shards, as `bowstore shards` has it."""

    src: Place | None = Field(None, description="file or folder with the images; null: the stage's input")


class ShardsStage(Stage):
    """Images to shards."""

    kind = "shards"
    takes = {"images": ("render", "download")}  # noqa: RUF012 - pydantic keeps it out of the fields

    shards: ImagesToShards
    images: Text | None = Field(None, description="the images; or shards.src")
    out: Place | None = Field(None, description="folder of the splits; null: the workspace's shards")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.images is None) == (self.shards.src is None):
            raise ValueError("name the images once: by `images: STAGE`, or by `src` under `shards`")
        return self

    @property
    def source(self) -> Path:
        """The images."""
        return self.shards.src or self._here.stages[str(self.images)].writes[0]

    @property
    def reads(self) -> tuple[Path | str, ...]:
        """The images."""
        return (self.source,)

    @property
    def writes(self) -> tuple[Path, ...]:
        """The folder of all splits."""
        shards = self._here.workspace.shards
        if not self.out and len(shards) > 1:
            raise UsageError(
                f"{WORKSPACE_FILE} names {len(shards)} folders of shards, {shards}; name the one that this stage "
                f"makes, as in `out: {shards[0].parent}`"
            )
        return (self._here.place(self.out) if self.out else shards[0].parent,)

    @cached_property
    def splits(self) -> dict[str, Path]:
        """What other stages read of them, by "train" and "test"."""
        workspace, (out,) = self._here.workspace, self.writes
        if self.out:
            workspace = workspace.model_copy(update={"shards": places(out / "train"), "val_shards": None})
        return {"train": workspace.shards[0], "test": _test_of(workspace)}

    @property
    def known_whole(self) -> bool:
        """Not so: the source has to be listed."""
        return False

    def state(self) -> State:
        """By the splits' manifests, or the index of shards that others made."""
        if is_remote(self.writes[0]):
            return DONE
        begun = False
        for folder in (self.writes[0] / split for split in ("train", "val", "test")):
            manifest = read_manifest(folder) if folder.is_dir() else None
            if manifest is None:
                begun |= (folder / PARTS_FOLDER / PLAN_FILE).exists()
                continue
            made = manifest.settings
            for name in ("seed", "per_shard"):
                if made[name] != (value := getattr(self.shards, name)):
                    return State("done", f"{folder} was made with {name} {made[name]}, not {value}")
        if begun:
            return BEGUN
        return DONE if (self.splits["train"] / INDEX_FILE).exists() else TO_DO

    def make(self) -> list[str]:
        """Write them, or compare them with the images that they were made of, if these are still there."""
        (out,) = self.writes
        if is_remote(out):
            return [f"{url_of(out)}: taken as it is"]
        if self.state() == DONE and not self.source.exists():
            return [f"{out}: complete; {self.source}, of which it was made, is not there to be compared"]
        reports = _once_free(lambda: make_shards(self.source, out, self.shards))
        return [report.summary() for report in reports]


def shards_of(reference: str | None, role: str, here: Here) -> Places:
    """The shards that an input means: those of a stage, perhaps of a split that it names, or the workspace's.

    Args:
        reference: as in the file; None for the workspace's.
        role: "test" for the split to test on, "train" for that to train on.
        here: where the stages are.
    """
    if reference is None:
        workspace = here.workspace
        return places(_test_of(workspace) if role == "test" else workspace.shards)
    stage, split = cast(ShardsStage, here.stages[stage_of(reference)]), reference.partition("/")[2]
    return places(stage.writes[0] / split if split else stage.splits[role])


def _test_of(workspace: Workspace) -> Path:
    """The workspace's split to test on, which need not be there yet."""
    try:
        return val_shards(workspace)
    except MissingError:
        return workspace.shards[0].parent / "val"
