"""Feature sets, each taken once: in memory for the length of a command; in the cache if they are large or took long.

A feature set is the taps of one labelled split. Its key is made of all that its numbers depend on, to the last digit.

Legend: N images, d feature width.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial

from bowstore.config import StorageConfig
from bowstore.evaluate.config import FeatureType
from bowstore.evaluate.feature_files import FeatureSet, Shapes, read_features, size_bytes, write_features
from bowstore.evaluate.features import Arrays, Extraction, variation, warn_of_collapse
from bowstore.evaluate.protocol import DataSets, Features, LabelledSplit, SplitFeatures
from bowstore.models.compiled import EAGER, FROZEN

LARGE_BYTES = 64 << 20  # from which on a feature set goes straight to the disk
LONG_SECONDS = 10.0  # one that took longer to take is copied there
_MEMORY_BYTES = 512 << 20  # of all that lie in memory: the oldest go first


class FeatureSets:
    """The feature sets of one command; hand the same to several evaluations, and what they share is taken once."""

    def __init__(self, storage: StorageConfig | None = None, *, files: bool = True) -> None:
        """With the cache that `storage` names; without `files`, in memory alone."""
        self._storage = storage or StorageConfig()
        self._files = files
        self._sets: dict[str, FeatureSet] = {}
        self._bytes: dict[str, int] = {}  # of those that lie in memory

    def take(self, how: Extraction, data: DataSets) -> tuple[Features, str]:
        """Features of all splits, and how the network was run for them; only those that are not kept are extracted.

        Raises:
            DataError: as `Extraction.features`.
            UsageError: compiling was asked for, and is not possible.
        """
        # By the work of all splits, whatever is kept of them: the same evaluation gives the same digits.
        trunk = how.trunk(sum(map(len, data.splits.values())))
        wide, compiled = how.widths(), None
        found = self._find(how, trunk, data, wide)
        if trunk == FROZEN and None in found.values():
            compiled = how.compiled()
            if compiled is None:
                trunk = EAGER
                found = self._find(how, trunk, data, wide)
        splits = {}
        for name, split in data.splits.items():
            what = f"{name} features"
            take = partial(how.features, split, compiled=compiled, what=what)
            one = found[name] or self._new(how.key(split, trunk), _shapes(split, wide), take, what, how.dtype)
            warn_of_collapse(what, {str(how.taps[tap]): share for tap, share in one.variation.items()}, len(split))
            splits[name] = SplitFeatures(
                taps=one.taps,
                variation=one.variation,
                labels=split.labels,
                classes=split.classes,
                key_hash=split.key_hash,
            )
        return Features(splits=splits, device=str(how.device)), trunk

    def _find(
        self, how: Extraction, trunk: str, data: DataSets, wide: Mapping[str, int]
    ) -> dict[str, FeatureSet | None]:
        """What is kept of each split; read from the disk once a command."""
        found = {}
        for name, split in data.splits.items():
            key = how.key(split, trunk)
            if key not in self._sets and self._files:
                if one := read_features(key, list(wide), self._storage):
                    self._sets[key] = one
            found[name] = self._sets.get(key)
        return found

    def _new(self, key: str, shapes: Shapes, take: Callable[..., Arrays], what: str, dtype: FeatureType) -> FeatureSet:
        """Take the features of a key and keep them."""
        keep = partial(write_features, key, shapes, self._storage, what=what, dtype=dtype)
        size, begun = size_bytes(shapes, dtype), time.monotonic()
        one = keep(take) if self._files and size >= LARGE_BYTES else None
        if one is None:
            arrays = take()
            one = FeatureSet(arrays, {tap: variation(values_Nd) for tap, values_Nd in arrays.items()})
            self._bytes[key] = size
            if self._files and size < LARGE_BYTES and time.monotonic() - begun >= LONG_SECONDS:
                keep(partial(_copied, arrays))
        self._sets[key] = one
        while sum(self._bytes.values()) > _MEMORY_BYTES and len(self._bytes) > 1:
            oldest = next(iter(self._bytes))
            del self._bytes[oldest], self._sets[oldest]
        return one


def _copied(arrays: Arrays, *, into: Arrays) -> None:
    """Fill new arrays with those that were taken."""
    for tap, values_Nd in arrays.items():
        into[tap][:] = values_Nd


def _shapes(split: LabelledSplit, wide: Mapping[str, int]) -> Shapes:
    return {tap: (len(split), width) for tap, width in wide.items()}
