"""Linear classification on frozen, pooled features (paper 4.1.2): linear/bownet-cifar, linear/standardised."""

from typing import Self

from pydantic import Field, model_validator

from bowstore.config import Place, Seed, Strict, Workspace
from bowstore.data.index import open_index
from bowstore.evaluate.protocol import DataSets, Kind, Protocol
from bowstore.evaluate.splits import open_splits, share_no_class
from bowstore.progress import say
from bowstore.workspace import val_shards

_STATED = {
    "features": "frozen, global average pool of the last block (paper 4.1.2)",
    "classifier": "linear layer, SGD, 60 epochs, lr 0.1, x0.3 every 10, weight decay 1e-3 (paper 4.1.2)",
}
_CHOSEN = {
    "momentum": "0.9, Nesterov",
    "batch": "128; the last batch of an epoch may be smaller",
    "images": "train and test images un-augmented, features computed once",
    "start": "weights and bias zero (the problem is convex); weight decay on both",
}
_STANDARDISED = {"features": "(x - mean) / deviation a dimension, of the train split"}
_HELD_OUT = {"test images": "a tenth of each class (at least one), those of the least key hashes"}


class LinearSettings(Strict):
    """What a user sets of the linear probe; all else is the protocol's."""

    train: Place | None = Field(None, description="labelled train shards; null: the workspace's")
    test: Place | None = Field(None, description="labelled test shards; null: the workspace's")
    held_out: bool = Field(False, description="test on a tenth of each train class (another protocol id)")
    seed: Seed = Field(0, description="of the order of training")
    standardise: bool = Field(False, description="standardise features (another protocol id)")

    @model_validator(mode="after")
    def _one_test(self) -> Self:
        if self.held_out and self.test:
            raise ValueError(f"held_out tests on train images, test on {self.test}; leave one of them out")
        return self


def describe(settings: LinearSettings) -> Protocol:
    """Standardised features are another protocol, and so is a test split that was held out."""
    name = "linear/standardised" if settings.standardise else "linear/bownet-cifar"
    what = (
        "as linear/bownet-cifar, on features standardised by the train split"
        if settings.standardise
        else "linear classifier on pooled features, the paper's for CIFAR-100 and MiniImageNet"
    )
    return Protocol(
        id=f"{name}-held-out" if settings.held_out else name,
        version=1,
        description=f"as {name}, tested on a tenth of each train class that is held out" if settings.held_out else what,
        headline="top1",
        stated=_STATED,
        chosen=_CHOSEN | (_STANDARDISED if settings.standardise else {}) | (_HELD_OUT if settings.held_out else {}),
    )


def resolve(settings: LinearSettings, workspace: Workspace) -> LinearSettings:
    """The workspace's shards where none are named; where these hold other classes for test, a tenth is held out."""
    train = settings.train or workspace.shards
    test = None if settings.held_out else settings.test or val_shards(workspace)
    if test and not settings.test:
        if share_no_class(*(open_index(path, workspace.storage) for path in (train, test))):
            say(
                f"{test} holds other classes than {train}: a tenth of each train class is held out and tested on, "
                "under a protocol id of its own; --test names a test split of the same classes"
            )
            test = None
    return settings.model_copy(update={"train": train, "test": test, "held_out": test is None})


def data(settings: LinearSettings, workspace: Workspace) -> DataSets:
    """Labelled train and test images of the same classes."""
    assert settings.train is not None, "resolved"
    return open_splits(settings.train, settings.test, workspace.storage)


KIND = Kind(
    name="linear",
    help="Linear classifier on frozen pooled features (the paper's CIFAR-100 and MiniImageNet protocol).",
    settings=LinearSettings,
    describe=describe,
    resolve=resolve,
    data=data,
    score="bowstore.evaluate.linear:score",
)
