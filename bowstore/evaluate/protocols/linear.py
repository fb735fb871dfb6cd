"""Linear classification on frozen, pooled features (paper 4.1.2): linear/bownet-cifar, linear/standardised."""

from pydantic import Field

from bowstore.config import Seed
from bowstore.evaluate.protocol import Kind, Protocol
from bowstore.evaluate.train_test import TrainTestSettings, held_out_protocol, open_train_test, resolve_train_test

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


class LinearSettings(TrainTestSettings):
    """What a user sets of the linear probe; all else is the protocol's."""

    seed: Seed = Field(0, description="of the order of training")
    standardise: bool = Field(False, description="standardise features (another protocol id)")


def describe(settings: LinearSettings) -> Protocol:
    """Standardised features are another protocol, and so is a test split that was held out."""
    name = "linear/standardised" if settings.standardise else "linear/bownet-cifar"
    what = (
        "as linear/bownet-cifar, on features standardised by the train split"
        if settings.standardise
        else "linear classifier on pooled features, the paper's for CIFAR-100 and MiniImageNet"
    )
    protocol = Protocol(
        id=name,
        version=1,
        description=what,
        headline="top1",
        stated=_STATED,
        chosen=_CHOSEN | (_STANDARDISED if settings.standardise else {}),
    )
    return held_out_protocol(protocol) if settings.held_out else protocol


KIND = Kind(
    name="linear",
    help="Linear classifier on frozen pooled features (the paper's CIFAR-100 and MiniImageNet protocol).",
    settings=LinearSettings,
    describe=describe,
    resolve=resolve_train_test,
    data=open_train_test,
    score="bowstore.evaluate.linear:score",
)
