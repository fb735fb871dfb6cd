"""Rows of stores for rows of an index, by key; and several stores of one data set as one.

A data set grows by another folder of shards and another store under the same vocabulary: the rows of one store follow
those of another, as those of the folders do in an index (`bowstore.data.index.joined`).

Legend: N rows of an index, M images of which it and a store both have the key.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bowstore.config import places
from bowstore.data.table import joint_fingerprint
from bowstore.errors import MismatchError
from bowstore.words.store.layer import VOCABULARY_SETTINGS, Layer, made_with
from bowstore.words.store.store import Store

if TYPE_CHECKING:
    from bowstore.data.index import Index

_EXAMPLES = 5
_OWN = ("vocabulary taken from", *VOCABULARY_SETTINGS)  # of `made_with`, where words may mean the same


class JoinedLayer:
    """A layer of several stores, whose words mean the same, read as one.

    Attributes:
        name, attributes, grid, num_words, border, lineage: those of the first.
        images: rows of all stores.
        chunk_rows: of the largest chunk.

    Raises:
        MismatchError: they differ in vocabulary, teacher or view; names the first difference.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        first = layers[0]
        for other in layers[1:]:
            made, asked = made_with(other.attributes), made_with(first.attributes)
            if name := next((name for name in asked if name not in _OWN and made[name] != asked[name]), None):
                raise MismatchError(
                    f"layer {first.name!r} of word stores {first.path} and {other.path} cannot be joined: {name} is "
                    f"{asked[name]} in the first and {made[name]} in the second; encode the second's images with "
                    f"--vocabulary {first.path}, by the same teacher"
                )
        self._layers = tuple(layers)
        self.name, self.attributes, self.grid = first.name, first.attributes, first.grid
        self.num_words, self.border, self.lineage = first.num_words, first.border, first.lineage
        starts = accumulate((layer.images for layer in layers), initial=0)
        self._chunks = [
            (layer, chunk, start) for layer, start in zip(layers, starts, strict=False) for chunk in range(layer.chunks)
        ]
        self.images = sum(layer.images for layer in layers)
        self.chunk_rows = max(layer.chunk_rows for layer in layers)

    def rows(self, chunk: int) -> slice:
        """The rows of a chunk, counted through all stores."""
        layer, own, start = self._chunks[chunk]
        rows = layer.rows(own)
        return slice(start + rows.start, start + rows.stop)

    def chunk_digests(self) -> NDArray[np.uint64]:
        """As of a layer, uint64 (chunks,)."""
        return np.concatenate([layer.chunk_digests() for layer in self._layers])

    def read_chunk(self, chunk: int, digest: int) -> NDArray[np.uint16]:
        """As of a layer."""
        layer, own, _ = self._chunks[chunk]
        return layer.read_chunk(own, digest)


def layer_of(stores: Sequence[Store], name: str | None = None) -> Layer | JoinedLayer:
    """A complete layer of all stores by name, or the only one of the first; errors as of `Store.layer`."""
    first = stores[0].layer(name)
    layers = [first, *(store.layer(first.name) for store in stores[1:])]
    return first if len(stores) == 1 else JoinedLayer(layers)


def _rows_of_all(stores: Sequence[Store], name: str) -> NDArray[np.uint64]:
    return np.concatenate([store.read_array(name) for store in stores])


def join_rows(stores: Sequence[Store], index: "Index", *, reencoded: bool = False) -> NDArray[np.int64]:
    """The row of each row of an index in a store, or in several whose rows follow each other, int64 (N_index,).

    Equal fingerprints: the identity. Otherwise rows are joined by the hashes of their keys, and the images of equal
    keys are compared by their digests; the store may hold more than the index asks for.

    Args:
        stores: the words, in the order of the index's folders where it has several.
        index: the images that ask for them.
        reencoded: the shards hold other encodings of the store's images (resized, compressed anew): keys alone count.

    Raises:
        MismatchError: keys that the store lacks, or holds twice, or under which it holds the words of other images;
            with counts and five examples.
    """
    fingerprint, images = joint_fingerprint([store.fingerprint for store in stores]), len(index.key_hash)
    if index.fingerprint == fingerprint and images == sum(map(len, stores)):
        return np.arange(images, dtype=np.int64)
    rows_N = rows_of(index.key_hash, _rows_of_all(stores, "key_hash"))
    for problem in join_problems(stores, index, rows_N, reencoded=reencoded):
        raise MismatchError(problem)
    return rows_N


def join_problems(
    stores: Sequence[Store], index: "Index", rows_N: NDArray[np.int64], *, reencoded: bool
) -> Iterator[str]:
    """Why the store's rows (int64, as of `rows_of`) cannot be those of an index, a line for each reason."""
    wanted_N, place = index.key_hash, places([store.path for store in stores])
    values, counts = np.unique(_rows_of_all(stores, "key_hash"), return_counts=True)
    for wrong_N, problem, remedy in (
        (rows_N < 0, "missing from", "encode these shards, or train on those that were encoded"),
        (
            np.isin(wanted_N, values[counts > 1]),
            "more than once in",
            "encode these shards into one store, or name stores of other keys",
        ),
    ):
        if wrong_N.any():
            yield (
                f"{int(wrong_N.sum())} of {len(wanted_N)} keys of the shards are {problem} word store {place}, "
                f"for example {listed(map(index.key, np.flatnonzero(wrong_N).tolist()))}; {remedy}"
            )
    if not reencoded and (others := other_images(stores, index, np.arange(len(rows_N)), rows_N)):
        yield others


def other_images(
    stores: Sequence[Store], index: "Index", rows_M: NDArray[np.int64], store_rows_M: NDArray[np.int64]
) -> str | None:
    """What is wrong where the images of rows are not those that the store's rows were made of; None if all are.

    Keys are names of files, and the splits of a data set often use the same ones. Rows are int64; -1 is none.
    """
    both_M = (rows_M >= 0) & (store_rows_M >= 0)
    rows_M, digest_M = rows_M[both_M], _rows_of_all(stores, "image_digest")[store_rows_M[both_M]]
    other = rows_M[digest_M != index.digest[rows_M]]
    if not len(other):
        return None
    place = places([store.path for store in stores])
    return (
        f"{len(other)} of {len(rows_M)} images of the shards are not those that word store {place} was made of, "
        f"though they have their keys, for example {listed(map(index.key, other.tolist()))}; use the shards that were "
        "encoded, encode these into a store of their own, or if they are copies of the same pictures (resized, "
        "compressed anew) say so: --set task.reencoded=true in training, --reencoded elsewhere"
    )


def listed(examples: Iterable[object]) -> str:
    """The first few, for a message."""
    return ", ".join(map(str, islice(examples, _EXAMPLES)))


def rows_of(wanted: NDArray[np.uint64], have: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each hash stands among others, int64; -1 where it does not."""
    have_order, wanted_order = np.argsort(have, kind="stable"), np.argsort(wanted, kind="stable")
    ordered, needles = have[have_order], wanted[wanted_order]
    # Sorted needles are found by walking through memory; in any other order each one is a chain of cache misses.
    place = np.minimum(np.searchsorted(ordered, needles), len(ordered) - 1)
    rows = np.empty(len(wanted), np.int64)
    rows[wanted_order] = np.where(ordered[place] == needles, have_order[place], -1)
    return rows
