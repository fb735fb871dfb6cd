"""Logistic regression on frozen features, of the network or of layers inside it: logreg/c12."""

from bowstore.config import Workspace
from bowstore.evaluate.protocol import DataSets, Kind, Protocol, layers_in_id
from bowstore.evaluate.splits import check_tenth
from bowstore.evaluate.train_test import ProbeSettings, open_train_test, own_protocol, resolve_train_test

COSTS = tuple(10.0**power for power in range(-6, 6))


def describe(settings: ProbeSettings) -> Protocol:
    """Standardised features are another protocol; so are those of layers, a held-out test split, and fewer images."""
    layers = f"{layers_in_id(settings.layers)}/" if settings.layers else ""
    what = "standardised by the train split" if settings.standardise else "as they are"
    of = f", {', '.join(settings.layers)} averaged over all places" if settings.layers else ", pooled"
    protocol = Protocol(
        id=f"logreg/{layers}c{len(COSTS)}" + "-standardised" * settings.standardise,
        version=1,
        description=f"L2 logistic regression on features {what}{of}; C of {len(COSTS)} by a tenth of the train images",
        headline="top1_best" if settings.layers else "top1",
    )
    return own_protocol(protocol, settings)


def data(settings: ProbeSettings, workspace: Workspace) -> DataSets:
    """Labelled train and test images of the same classes, with two train images of each at least.

    Raises:
        DataError: a class of one train image.
    """
    found = open_train_test(settings, workspace)
    left = " beside the test images, which are held out, too" if settings.held_out else ""
    check_tenth(
        found["train"].labels,
        f"{settings.train}{left}",
        "logreg chooses C on a tenth of each train class, so give it more images by "
        + ("--images" if settings.images else "--train"),
    )
    return found


KIND = Kind(
    name="logreg",
    help="L2 logistic regression on frozen pooled features, its strength chosen on a tenth of the train images.",
    settings=ProbeSettings,
    describe=describe,
    flags={"layers": "--layer"},
    resolve=resolve_train_test,
    data=data,
    taps="bowstore.evaluate.linear:taps",
    score="bowstore.evaluate.logreg:score",
)
