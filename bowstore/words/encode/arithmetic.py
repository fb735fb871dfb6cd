"""How words are computed: a layer records it, and an unfinished layer is continued in the same way.

Words computed in two ways differ only where two centroids are almost equally near, so complete layers and
vocabularies are equally good whichever way they were made. But what a layer holds must not depend on who was
interrupted when.
"""

from collections.abc import Mapping

from bowstore.errors import MismatchError
from bowstore.models.compiled import EAGER
from bowstore.progress import say
from bowstore.torchrun import ranks
from bowstore.words.store.layer import Layer

Arithmetic = Mapping[str, str]
# Of layers that were written before these were recorded.
_BEFORE: Arithmetic = {"trunk": EAGER, "decoder": "CPU", "resize": "DALI"}


def recorded(layer: Layer) -> Arithmetic:
    """How a layer's words were computed."""
    return {**_BEFORE, **(layer.attributes.get("arithmetic") or {})}


def in_words(arithmetic: Arithmetic) -> str:
    """For messages."""
    return ", ".join(f"{what} {way}" for what, way in arithmetic.items())


def check_same(layer: Layer, now: Arithmetic) -> None:
    """Refuse to continue an unfinished layer in another way.

    Raises:
        MismatchError: names the first way that differs.
    """
    then = recorded(layer)
    for what in then.keys() | now.keys():
        if then.get(what) != now.get(what):
            raise MismatchError(
                f"layer {layer.name!r} of word store {layer.path} is not complete and was begun with {what} "
                f"{then.get(what)!r}, now it would be {now.get(what)!r}; encode into a new store: --vocabulary "
                f"{layer.path} --store NEW keeps its words"
            )


def tell_difference(layer: Layer, now: Arithmetic) -> None:
    """Say that images get words of a complete layer's vocabulary in another way than the layer's own images did."""
    then = recorded(layer)
    if dict(then) != dict(now) and ranks().first:
        say(
            f"layer {layer.name!r} of word store {layer.path} was made with {in_words(then)}; these images are encoded "
            f"with {in_words(now)}: their words differ from its way's only where two words are all but equally near"
        )
