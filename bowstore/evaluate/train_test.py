"""Settings of protocols that learn from labelled train images and are scored on test images of the same classes."""

from dataclasses import replace
from pathlib import Path
from typing import Self, TypeVar

from pydantic import Field, model_validator

from bowstore.config import Count, Listed, ListedPlaces, Place, Strict, Text, Workspace
from bowstore.data.index import open_index
from bowstore.errors import MissingError
from bowstore.evaluate.protocol import DataSets, Protocol
from bowstore.evaluate.splits import open_splits, share_no_class
from bowstore.progress import say_once
from bowstore.workspace import val_shards


class TrainTestSettings(Strict):
    """Which images; all else is the protocol's."""

    train: ListedPlaces | None = Field(
        None, description="labelled train shards, of one folder or several; null: the workspace's"
    )
    test: Place | None = Field(None, description="labelled test shards; null: the workspace's")
    held_out: bool = Field(False, description="test on a tenth of each train class (another protocol id)")

    @model_validator(mode="after")
    def _one_test(self) -> Self:
        if self.held_out and self.test:
            raise ValueError(f"held_out tests on train images, test on {self.test}; leave one of them out")
        return self


class SampleSettings(TrainTestSettings):
    """Which images, perhaps some of them alone."""

    images: Count | None = Field(
        None, description="at most so many of each split, as many of each class (another protocol id); null: all"
    )


class ProbeSettings(SampleSettings):
    """Which images, and which features of them; all else is the protocol's."""

    standardise: bool = Field(False, description="standardise features (another protocol id)")
    layers: Listed[Text] = Field(
        (), description="layer whose map is averaged, more than once for several (another id); null: the pooled output"
    )


S = TypeVar("S", bound=TrainTestSettings)


def resolve_train_test(settings: S, workspace: Workspace) -> S:
    """The workspace's shards where none are named; where these hold other classes for test, a tenth is held out.

    `images` that leave none out are no setting.
    """
    train = settings.train or workspace.shards
    test = None if settings.held_out else settings.test or _shards_to_test_on(workspace)
    if test and not settings.test:
        if share_no_class(*(open_index(path, workspace.storage) for path in (train, test))):
            say_once(
                f"{test} holds other classes than {train}: a tenth of each train class is held out and tested on, "
                "under a protocol id of its own; --test names a test split of the same classes"
            )
            test = None
    resolved = settings.model_copy(update={"train": train, "test": test, "held_out": test is None})
    if not (images := _images(resolved)):
        return resolved
    of_all = resolved.model_copy(update={"images": None})
    return of_all if max(map(len, open_train_test(of_all, workspace).splits.values())) <= images else resolved


def _images(settings: TrainTestSettings) -> int | None:
    return settings.images if isinstance(settings, SampleSettings) else None


def _shards_to_test_on(workspace: Workspace) -> Path:
    try:
        return val_shards(workspace)
    except MissingError as error:
        raise MissingError(f"{error}, or --held-out to test on a tenth of each train class") from error


def open_train_test(settings: TrainTestSettings, workspace: Workspace) -> DataSets:
    """Labelled train and test images of the same classes.

    Raises:
        MismatchError, DataError: as `open_splits`.
    """
    assert settings.train is not None, "resolved"
    return open_splits(settings.train, settings.test, workspace.storage, images=_images(settings))


def held_out_protocol(protocol: Protocol) -> Protocol:
    """The protocol, tested on a tenth of each train class: under an id of its own."""
    return replace(
        protocol,
        id=f"{protocol.id}-held-out",
        description=f"as {protocol.id}, tested on a tenth of each train class that is held out",
    )


def own_protocol(protocol: Protocol, settings: SampleSettings) -> Protocol:
    """The protocol under the id that its images ask for: a held-out test split, and some of the images alone."""
    if settings.held_out:
        protocol = held_out_protocol(protocol)
    if settings.images is None:
        return protocol
    return replace(
        protocol,
        id=f"{protocol.id}-{settings.images}-images",
        description=f"{protocol.description}; of at most {settings.images} images of each split",
    )
