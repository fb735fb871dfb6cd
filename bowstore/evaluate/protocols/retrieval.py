"""Retrieval of train images by test images of the same class, on frozen, pooled features."""

from bowstore.config import Workspace
from bowstore.errors import UsageError
from bowstore.evaluate.protocol import DataSets, Kind, Protocol
from bowstore.evaluate.train_test import TrainTestSettings, held_out_protocol, open_train_test, resolve_train_test

RECALLS = (1, 5, 10)


class RetrievalSettings(TrainTestSettings):
    """Which images; all else is the protocol's."""


def describe(settings: RetrievalSettings) -> Protocol:
    """The id says whether the test split was held out."""
    protocol = Protocol(
        id="retrieval/cosine",
        version=1,
        description="test images query train images by the cosine of pooled features: recall and mAP",
        headline="map",
    )
    return held_out_protocol(protocol) if settings.held_out else protocol


def data(settings: RetrievalSettings, workspace: Workspace) -> DataSets:
    """Labelled train and test images of the same classes, with as many train images as the widest recall looks at.

    Raises:
        UsageError: there are fewer.
    """
    found = open_train_test(settings, workspace)
    if (images := len(found["train"])) < RECALLS[-1]:
        raise UsageError(
            f"recall at {RECALLS[-1]} needs as many train images, and {settings.train} gives {images}; name shards of "
            "more images by --train"
        )
    return found


KIND = Kind(
    name="retrieval",
    help="Test images query train images by cosine on frozen pooled features: recall at 1, 5, 10 and mAP.",
    settings=RetrievalSettings,
    describe=describe,
    resolve=resolve_train_test,
    data=data,
    score="bowstore.evaluate.retrieval:score",
)
