"""Votes of the nearest train images on frozen, pooled features."""

from pydantic import Field

from bowstore.config import Count, Workspace
from bowstore.errors import UsageError
from bowstore.evaluate.protocol import DataSets, Kind, Protocol
from bowstore.evaluate.train_test import SampleSettings, open_train_test, own_protocol, resolve_train_test


class KnnSettings(SampleSettings):
    """What a user sets of the votes."""

    k: Count = Field(200, description="nearest train images (in the protocol id)")
    temperature: float = Field(0.1, ge=1e-6, le=1e6, description="of the votes (in the protocol id)")


def describe(settings: KnnSettings) -> Protocol:
    """The id says k and temperature, whether the test split was held out, and how many images there are at most."""
    protocol = Protocol(
        id=f"knn/k{settings.k}-t{settings.temperature}",
        version=1,
        description=f"votes of the {settings.k} nearest train images on pooled features of length 1",
        headline="top1",
    )
    return own_protocol(protocol, settings)


def data(settings: KnnSettings, workspace: Workspace) -> DataSets:
    """Labelled train and test images of the same classes, with k train images at least.

    Raises:
        UsageError: there are fewer.
    """
    found = open_train_test(settings, workspace)
    if (images := len(found["train"])) < settings.k:
        raise UsageError(
            f"k {settings.k} is more than the {images} train images of {settings.train}; give --k {images} or fewer"
        )
    return found


KIND = Kind(
    name="knn",
    help="Votes of the k nearest train images on frozen pooled features.",
    settings=KnnSettings,
    describe=describe,
    resolve=resolve_train_test,
    data=data,
    score="bowstore.evaluate.neighbours:score",
)
