"""Rows of a store and rows of an index, joined by their keys: whose words are whose.

Legend: N images, U rows that are asked for.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bowstore.errors import MismatchError
from bowstore.words.store.store import Store

if TYPE_CHECKING:
    from bowstore.data.index import Index

_EXAMPLES = 5
_HASHES = 1 << 20  # of an index's keys, looked at together


def join_rows(store: Store, index: "Index", *, reencoded: bool = False) -> NDArray[np.int64]:
    """The store's row of each row of an index, int64 (N_index,).

    Equal fingerprints: the identity. Otherwise rows are joined by the hashes of their keys, and the images of equal
    keys are compared by their digests; the store may hold more than the index asks for.

    Args:
        store: the words.
        index: the images that ask for them.
        reencoded: the shards hold other encodings of the store's images (resized, compressed anew): keys alone count.

    Raises:
        MismatchError: keys that the store lacks, or holds twice, or under which it holds the words of other images;
            with counts and five examples.
    """
    wanted, have = index.key_hash, store.key_hash()
    if index.fingerprint == store.fingerprint and len(wanted) == len(have):
        return np.arange(len(have), dtype=np.int64)
    have_order, wanted_order = np.argsort(have, kind="stable"), np.argsort(wanted, kind="stable")
    ordered, needles = have[have_order], wanted[wanted_order]
    # Sorted needles are found by walking through memory; in any other order each one is a chain of cache misses.
    first, behind = np.searchsorted(ordered, needles), np.searchsorted(ordered, needles, side="right")
    for wrong, problem in ((behind == first, "missing from"), (behind - first > 1, "more than once in")):
        rows = np.sort(wanted_order[wrong])
        if len(rows):
            raise MismatchError(
                f"{len(rows)} of {len(wanted)} keys of the shards are {problem} word store {store.path}, for "
                f"example {_names(index, rows)}; encode these shards, or train on those that were encoded"
            )
    rows_N = np.empty(len(wanted), np.int64)
    rows_N[wanted_order] = have_order[first]
    if not reencoded:
        check_images(store, index, np.arange(len(rows_N)), rows_N)
    return rows_N


def index_rows(
    store: Store, index: "Index", rows_U: NDArray[np.int64], *, reencoded: bool = False
) -> NDArray[np.int64]:
    """Rows of an index that hold the images of rows of a store, int64 (U,); -1 for images that the shards lack.

    Args:
        store: whose rows they are.
        index: of the shards, which may hold other images too, in another order.
        rows_U: int64.
        reencoded: the shards hold other encodings of the store's images: keys alone count.

    Raises:
        MismatchError: other images lie under the store's keys.
    """
    if index.fingerprint == store.fingerprint and len(index.key_hash) == len(store):
        return rows_U.copy()
    wanted_U, found_U = store.key_hash()[rows_U], np.full(len(rows_U), -1, np.int64)
    order = np.argsort(wanted_U, kind="stable")
    ordered = wanted_U[order]
    for start in range(0, len(index.key_hash) if len(ordered) else 0, _HASHES):
        part = np.asarray(index.key_hash[start : start + _HASHES])
        place = np.minimum(np.searchsorted(ordered, part), len(ordered) - 1)
        hit = np.flatnonzero(ordered[place] == part)
        found_U[order[place[hit]]] = start + hit
    if not reencoded:
        there_U = found_U >= 0
        check_images(store, index, found_U[there_U], rows_U[there_U])
    return found_U


def check_images(store: Store, index: "Index", rows_M: NDArray[np.int64], store_rows_M: NDArray[np.int64]) -> None:
    """Refuse rows whose images are not those that the store's rows were made of.

    Keys are names of files, and the splits of a data set often use the same ones.

    Args:
        store: the words; nothing is known of the images of one in format 2.
        index: the images.
        rows_M: int64, rows of the index.
        store_rows_M: int64, the store's rows with the same keys.

    Raises:
        MismatchError: with the number of such images and five examples.
    """
    digests = store.image_digest()
    if digests is None:
        return
    other = rows_M[np.flatnonzero(digests[store_rows_M] != index.digest[rows_M])]
    if len(other):
        raise MismatchError(
            f"{len(other)} of {len(rows_M)} images of the shards are not those that word store {store.path} was made "
            f"of, though they have their keys, for example {_names(index, other)}; use the shards that were encoded, "
            "encode these into a store of their own, or if they are copies of the same pictures (resized, compressed "
            "anew) say so: --set task.reencoded=true in training, --reencoded elsewhere"
        )


def _names(index: "Index", rows: NDArray[np.int64]) -> str:
    return ", ".join(index.key(row) for row in rows[:_EXAMPLES].tolist())


def rows_of(wanted: NDArray[np.uint64], have: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each hash stands among others, int64; -1 where it does not."""
    order = np.argsort(have, kind="stable")
    ordered = have[order]
    place = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[place] == wanted, order[place], -1)
