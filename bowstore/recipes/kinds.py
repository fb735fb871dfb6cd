"""What a recipe's file may say of a stage: one model for each kind of stage. Loads no torch.

Under a stage's kind stand the settings, those of the command of that name; beside it its inputs, which are names of
other stages, and where it writes.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from bowstore.config import Count, Listed, Place, Seed, Strict, Text
from bowstore.data.config import ShardsConfig

Kinds = tuple[str, ...]
IMAGES: Kinds = ("render", "download")


class Spec(Strict):
    """A stage as its file has it.

    Attributes:
        takes: its inputs, and the kinds of stages that each may be.
    """

    takes: ClassVar[dict[str, Kinds]] = {}

    def inputs(self) -> list[tuple[str, str]]:
        """Each input that is given, and the stage; one of shards perhaps with a split, as in data/test."""
        given = [(role, getattr(self, role)) for role in self.takes]
        return [(role, name) for role, value in given for name in ((value,) if isinstance(value, str) else value or ())]


class RenderConfig(Strict):
    """The embedded data set (`bowstore.data.synthetic`)."""

    train: Count = 10_000
    val: Count = 2_500
    size: Count = Field(32, description="pixels")
    seed: Seed = 0


class RenderSpec(Spec):
    """Images that are rendered."""

    render: RenderConfig
    out: Place = Path("data/images")


class DownloadSpec(Spec):
    """A public data set; `bowstore data` lists their names."""

    download: Text
    out: Place = Path("data")


class ImagesToShards(ShardsConfig):
    """Images to shards, as `bowstore shards` has it."""

    src: Place | None = Field(None, description="file or folder with the images; null: the stage's input")


class ShardsSpec(Spec):
    """Images to shards."""

    takes = {"images": IMAGES}  # noqa: RUF012 - pydantic keeps it out of the fields

    shards: ImagesToShards
    images: Text | None = Field(None, description="the images; or shards.src")
    out: Place | None = Field(None, description="folder of the splits; null: the workspace's shards")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.images is None) == (self.shards.src is None):
            raise ValueError("name the images once: by `images: STAGE`, or by `src` under `shards`")
        return self


class TrainSpec(Spec):
    """A training run."""

    takes = {"on": ("shards",), "words": ("encode",)}  # noqa: RUF012

    train: Place = Field(description="configuration, by its path or name")
    set: dict[str, Any] = Field({}, description="values over those of the configuration, as in {optim.lr: 0.1}")
    name: Text | None = Field(None, description="of the run; null: the configuration's")
    on: Text | None = Field(None, description="shards; null: the workspace's")
    words: Text | None = Field(None, description="the words that it learns")


class EncodeSpec(Spec):
    """A teacher's words of all images."""

    takes = {"on": ("shards",), "teacher": ("train",)}  # noqa: RUF012

    encode: dict[str, Any] = Field(description="as `bowstore encode` has them")
    on: Text | None = Field(None, description="shards; null: the workspace's")
    teacher: Text | None = Field(None, description="the run; or encode.teacher")
    store: Place | None = Field(None, description="null: the workspace's")


class EvalSpec(Spec):
    """Evaluations of some networks: each protocol of each of them, in one table."""

    takes = {"of": ("train",), "random": ("train",), "train": ("shards",), "test": ("shards",)}  # noqa: RUF012

    eval: Any = Field(description="NAME, {NAME: settings}, or a list of these")
    of: Listed[Text] = Field((), description="the runs")
    random: Text | None = Field(None, description="a run whose network is evaluated as it was initialised, too")
    train: Text | None = Field(None, description="labelled shards; null: the workspace's")
    test: Text | None = Field(None, description="labelled shards; null: the workspace's")

    @model_validator(mode="after")
    def _some_network(self) -> Self:
        if not self.of and not self.random:
            raise ValueError("name the networks: `of: [STAGE, ...]`")
        return self

    def protocols(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and settings of each protocol.

        Raises:
            ValueError: something else stands there.
        """
        found = []
        for item in self.eval if isinstance(self.eval, list) else [self.eval]:
            name, settings = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, {})
            if not isinstance(name, str) or not isinstance(settings, dict | None):
                raise ValueError(f"{item!r} is no protocol; write its name, or {{NAME: {{SETTING: VALUE}}}}")
            found.append((name, settings or {}))
        return found


KINDS: dict[str, type[Spec]] = {
    "render": RenderSpec,
    "download": DownloadSpec,
    "shards": ShardsSpec,
    "train": TrainSpec,
    "encode": EncodeSpec,
    "eval": EvalSpec,
}
