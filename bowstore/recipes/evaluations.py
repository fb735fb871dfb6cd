"""What a recipe may set of an evaluation. Loads no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from bowstore.config import Compile, Listed, Place, Seed, Strict, Text, Threads
from bowstore.limits import MAX_BATCH


class EvalSettings(Strict):
    """What every evaluation has."""

    batch: int = Field(128, ge=1, le=MAX_BATCH, description="images a batch")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Compile = "auto"

    @property
    def id(self) -> str:
        """Protocol id."""
        raise NotImplementedError

    def data(self) -> dict[str, Path]:
        """Folders of labelled images by their names in a result's inputs."""
        raise NotImplementedError

    def decisive(self) -> dict[str, object]:
        """Settings that decide the numbers under one id, by the names that a result records."""
        return {}


class LinearSettings(EvalSettings):
    """Of `bowstore eval linear`."""

    train: Place
    test: Place
    held_out: bool = False
    seed: Seed = 0
    standardise: bool = False

    @property
    def id(self) -> str:
        """Protocol id."""
        return f"linear/{'standardised' if self.standardise else 'bownet-cifar'}{'-held-out' if self.held_out else ''}"

    def data(self) -> dict[str, Path]:
        """The shards."""
        return {"train": self.train} if self.held_out else {"train": self.train, "test": self.test}

    def decisive(self) -> dict[str, object]:
        """The seed."""
        return {"seed": self.seed}


class Voc07Settings(EvalSettings):
    """Of `bowstore eval voc07`."""

    voc: Place
    costs: Literal["fair", "vissl", "obow"] = "fair"
    layers: Listed[Text] = ()
    jobs: Threads | None = None

    @property
    def id(self) -> str:
        """Protocol id."""
        return f"voc07-svm/{self.costs}"

    def data(self) -> dict[str, Path]:
        """The devkit."""
        return {"": self.voc}


SETTINGS: Mapping[str, type[EvalSettings]] = {"linear": LinearSettings, "voc07": Voc07Settings}
