"""Retrieval of train images by test images of the same class, on frozen, pooled features."""

from bowstore.config import Workspace
from bowstore.errors import UsageError
from bowstore.evaluate.protocol import DataSets, Kind, Protocol
from bowstore.evaluate.train_test import SampleSettings, open_train_test, own_protocol, resolve_train_test

RECALLS = (1, 5, 10)


def describe(settings: SampleSettings) -> Protocol:
    """The id says whether the test split was held out, and how many images there are at most."""
    protocol = Protocol(
        id="retrieval/cosine",
        version=1,
        description="test images query train images by the cosine of pooled features: recall and mAP",
        headline="map",
    )
    return own_protocol(protocol, settings)


def data(settings: SampleSettings, workspace: Workspace) -> DataSets:
    """Labelled train and test images of the same classes, with as many train images as the widest recall looks at.

    Raises:
        UsageError: there are fewer.
    """
    found = open_train_test(settings, workspace)
    if (images := len(found["train"])) < RECALLS[-1]:
        raise UsageError(
            f"recall at {RECALLS[-1]} needs as many train images, and {settings.train} gives {images}; name shards of "
            "more images by --train, or give more --images"
        )
    return found


KIND = Kind(
    name="retrieval",
    help="Test images query train images by cosine on frozen pooled features: recall at 1, 5, 10 and mAP.",
    settings=SampleSettings,
    describe=describe,
    resolve=resolve_train_test,
    data=data,
    score="bowstore.evaluate.retrieval:score",
)
