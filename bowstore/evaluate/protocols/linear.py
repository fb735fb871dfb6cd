"""Linear classification on frozen, pooled features (paper 4.1.2), of the network or of layers inside it."""

from dataclasses import replace

from pydantic import Field

from bowstore.config import Seed
from bowstore.evaluate.protocol import Kind, Protocol, layers_in_id
from bowstore.evaluate.train_test import ProbeSettings, open_train_test, own_protocol, resolve_train_test


class LinearSettings(ProbeSettings):
    """What a user sets of the linear probe; all else is the protocol's."""

    seed: Seed = Field(0, description="of the order of training")


def describe(settings: LinearSettings) -> Protocol:
    """Standardised features are another protocol; so are those of layers, a held-out test split, and fewer images."""
    if settings.standardise:
        name, what = "standardised", "as linear/bownet-cifar, on features standardised by the train split"
    else:
        name, what = "bownet-cifar", "linear classifier on pooled features, the paper's for CIFAR-100 and MiniImageNet"
    protocol = Protocol(id=f"linear/{name}", version=1, description=what, headline="top1")
    if settings.layers:
        protocol = replace(
            protocol,
            # The layers come first: ids that begin with linear/bownet-cifar are those that compare with the paper's.
            id=f"linear/{layers_in_id(settings.layers)}/{name}",
            description=f"{what}; of {', '.join(settings.layers)}, each averaged over all places",
            headline="top1_best",
        )
    return own_protocol(protocol, settings)


KIND = Kind(
    name="linear",
    help="Linear classifier on frozen pooled features (the paper's CIFAR-100 and MiniImageNet protocol).",
    settings=LinearSettings,
    describe=describe,
    flags={"layers": "--layer"},
    resolve=resolve_train_test,
    data=open_train_test,
    taps="bowstore.evaluate.linear:taps",
    score="bowstore.evaluate.linear:score",
)
