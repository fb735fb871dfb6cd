"""Linear classification on frozen, pooled features (paper 4.1.2): linear/bownet-cifar, linear/standardised."""

from pydantic import Field

from bowstore.config import Seed
from bowstore.evaluate.protocol import Kind, Protocol
from bowstore.evaluate.train_test import TrainTestSettings, held_out_protocol, open_train_test, resolve_train_test


class LinearSettings(TrainTestSettings):
    """What a user sets of the linear probe; all else is the protocol's."""

    seed: Seed = Field(0, description="of the order of training")
    standardise: bool = Field(False, description="standardise features (another protocol id)")


def describe(settings: LinearSettings) -> Protocol:
    """Standardised features are another protocol, and so is a test split that was held out."""
    if settings.standardise:
        name, what = "standardised", "as linear/bownet-cifar, on features standardised by the train split"
    else:
        name, what = "bownet-cifar", "linear classifier on pooled features, the paper's for CIFAR-100 and MiniImageNet"
    protocol = Protocol(id=f"linear/{name}", version=1, description=what, headline="top1")
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
