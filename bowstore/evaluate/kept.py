"""Feature sets, each taken once: in memory for the length of a command, or in the cache when they are large.

A feature set is the taps of one labelled split. Its key is made of all that its numbers depend on, to the last digit.

Legend: N images, d feature width.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from bowstore.config import Compile, StorageConfig
from bowstore.data.views import CleanView
from bowstore.environment import device_name, library_versions
from bowstore.evaluate.feature_files import Arrays, FeatureSet, Shapes, read_features, write_features
from bowstore.evaluate.features import Tap, compiled_features, extract, tapping, variation, warn_of_collapse, widths
from bowstore.evaluate.protocol import DataSets, Features, LabelledSplit, SplitFeatures
from bowstore.models.backbone import Backbone
from bowstore.models.compiled import EAGER, FROZEN, Compiled, way_of

LARGE_BYTES = 64 << 20  # from which on a feature set goes to the disk
_MEMORY_BYTES = 512 << 20  # of all that lie in memory: the oldest go first


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How features of any images are taken.

    Attributes:
        backbone: the frozen network.
        identity: text that is the same for networks that compute the same: digest of the weights, how it is built.
        view: how it sees images.
        taps: where features are taken, by name.
        batch: images a forward pass.
        device: where the network runs.
        threads: decoding threads; None for one a core.
        compile: run the network compiled; auto decides by the number of images.
    """

    backbone: Backbone
    identity: str
    view: CleanView
    taps: Mapping[str, Tap]
    batch: int
    device: torch.device
    threads: int | None = None
    compile: Compile = "auto"

    def key(self, split: LabelledSplit, trunk: str) -> str:
        """What a feature set is kept under: all that its numbers, to the last digit, depend on."""
        arithmetic = trunk, self.batch, "float32", device_name(self.device), torch.get_num_threads(), library_versions()
        all_of_it = split.key, self.identity, asdict(self.view), dict(self.taps), arithmetic
        return xxhash.xxh3_128_hexdigest(repr(all_of_it).encode())

    def features(
        self,
        split: LabelledSplit,
        compiled: Compiled | None,
        what: str,
        into: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """Features of a split, as `features.extract`."""
        how: dict[str, Any] = {"batch": self.batch, "device": self.device, "threads": self.threads}
        how |= {"compiled": compiled, "what": what, "into": into}
        return extract(self.backbone, split.open(), self.view, split.rows, taps=self.taps, **how)


class FeatureSets:
    """The feature sets of one command; hand the same to several evaluations, and what they share is taken once."""

    def __init__(self, storage: StorageConfig | None = None) -> None:
        """With the cache that `storage` names, for those that are large."""
        self._storage = storage or StorageConfig()
        self._sets: dict[str, FeatureSet] = {}
        self._bytes: dict[str, int] = {}  # of those that lie in memory

    def take(self, how: Extraction, data: DataSets) -> tuple[Features, str]:
        """Features of all splits, and how the network was run for them; only those that are not kept are extracted.

        Raises:
            DataError: as `features.extract`.
            UsageError: compiling was asked for, and is not possible.
        """
        where: dict[str, Any] = {"size": how.view.size, "device": how.device}
        # By the work of all splits, whatever is kept of them: the same evaluation gives the same digits.
        images = sum(map(len, data.splits.values()))
        trunk = way_of(how.compile, how.backbone, tapping(how.taps), images=images, **where)
        wide, compiled = widths(how.backbone, how.taps, **where), None
        found = self._find(how, trunk, data, wide)
        if trunk == FROZEN and None in found.values():
            required = how.compile is True
            compiled = compiled_features(how.backbone, how.taps, required=required, batch=how.batch, **where)
            if compiled is None:
                trunk = EAGER
                found = self._find(how, trunk, data, wide)
        splits = {}
        for name, split in data.splits.items():
            what = f"{name} features"
            take = partial(how.features, split, compiled, what)
            one = found[name] or self._new(how.key(split, trunk), _shapes(split, wide), take, what)
            warn_of_collapse(what, {str(how.taps[tap]): share for tap, share in one.variation.items()}, len(split))
            splits[name] = SplitFeatures(
                taps=one.taps, variation=one.variation, labels=split.labels, classes=split.classes
            )
        return Features(splits=splits, device=str(how.device)), trunk

    def _find(
        self, how: Extraction, trunk: str, data: DataSets, wide: Mapping[str, int]
    ) -> dict[str, FeatureSet | None]:
        """What is kept of each split; read from the disk once a command."""
        found = {}
        for name, split in data.splits.items():
            key = how.key(split, trunk)
            if key not in self._sets and _size_bytes(_shapes(split, wide)) >= LARGE_BYTES:
                if one := read_features(key, list(wide), self._storage):
                    self._sets[key] = one
            found[name] = self._sets.get(key)
        return found

    def _new(self, key: str, shapes: Shapes, take: Callable[..., Arrays], what: str) -> FeatureSet:
        """Take the features of a key and keep them."""
        size_bytes = _size_bytes(shapes)
        one = write_features(key, shapes, self._storage, take, what=what) if size_bytes >= LARGE_BYTES else None
        if one is None:
            arrays = take()
            one = FeatureSet(arrays, {tap: variation(values_Nd) for tap, values_Nd in arrays.items()})
            self._bytes[key] = size_bytes
        self._sets[key] = one
        while sum(self._bytes.values()) > _MEMORY_BYTES and len(self._bytes) > 1:
            oldest = next(iter(self._bytes))
            del self._bytes[oldest], self._sets[oldest]
        return one


def _shapes(split: LabelledSplit, wide: Mapping[str, int]) -> Shapes:
    return {tap: (len(split), width) for tap, width in wide.items()}


def _size_bytes(shapes: Shapes) -> int:
    return sum(4 * images * width for images, width in shapes.values())
