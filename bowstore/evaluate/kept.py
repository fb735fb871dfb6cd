"""Feature sets, each taken once: in memory for the length of a command, or in the cache when they are large.

A feature set is the taps of one labelled split. Its key is made of all that its numbers depend on, to the last digit.

Legend: N images, d feature width.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from bowstore.config import Compile, StorageConfig
from bowstore.data.views import CleanView
from bowstore.environment import device_name, library_versions
from bowstore.evaluate.feature_files import FeatureSet, read_features, write_features
from bowstore.evaluate.features import Tap, compiled_features, extract, trunk_of, variation, warn_of_collapse, widths
from bowstore.evaluate.protocol import DataSets, Features, LabelledSplit, SplitFeatures
from bowstore.models.backbone import Backbone
from bowstore.models.compiled import EAGER, FROZEN, Compiled

LARGE_BYTES = 64 << 20  # from which on a feature set goes to the disk
_MEMORY_BYTES = 512 << 20  # of all that lie in memory: the oldest go first


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How features of any images are taken.

    Attributes:
        backbone: the frozen network.
        weights: `weights_sha256` of it.
        view: how it sees images.
        taps: where features are taken, by name.
        batch: images a forward pass.
        device: where the network runs.
        threads: decoding threads; None for one a core.
        compile: run the network compiled; auto decides by the number of images.
    """

    backbone: Backbone
    weights: str
    view: CleanView
    taps: Mapping[str, Tap]
    batch: int
    device: torch.device
    threads: int | None = None
    compile: Compile = "auto"

    def key(self, split: LabelledSplit, trunk: str) -> str:
        """What a feature set is kept under: all that its numbers, to the last digit, depend on."""
        taps = {name: str(tap) for name, tap in self.taps.items()}
        network = (self.weights, self.backbone.arch, asdict(self.view), taps)
        arithmetic = (trunk, self.batch, "float32", device_name(self.device), library_versions())
        return xxhash.xxh3_128_hexdigest(repr((split.key, network, arithmetic)).encode())


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
        # By the work of all splits, whatever is kept of them: the same evaluation gives the same digits.
        images, size = sum(map(len, data.splits.values())), how.view.size
        trunk = trunk_of(how.backbone, how.taps, how.compile, images=images, size=size, device=how.device)
        wide = widths(how.backbone, how.taps, size=size, device=how.device)
        found = {name: self._kept(how, trunk, split, wide) for name, split in data.splits.items()}
        compiled = None
        if trunk == FROZEN and None in found.values():
            required = how.compile is True
            compiled = compiled_features(
                how.backbone, how.taps, required=required, size=size, batch=how.batch, device=how.device
            )
            if compiled is None:
                trunk = EAGER
                found = {name: self._kept(how, trunk, split, wide) for name, split in data.splits.items()}
        splits = {}
        for name, split in data.splits.items():
            what = f"{name} features"
            one = found[name] or self._new(how, trunk, compiled, what, split, wide)
            warn_of_collapse(what, {str(how.taps[tap]): share for tap, share in one.variation.items()}, len(split))
            splits[name] = SplitFeatures(
                taps=one.taps, labels=split.labels, classes=split.classes, variation=one.variation
            )
        return Features(splits=splits, device=str(how.device)), trunk

    def _kept(self, how: Extraction, trunk: str, split: LabelledSplit, wide: Mapping[str, int]) -> FeatureSet | None:
        """What is kept of a split; read from the disk once a command."""
        key = how.key(split, trunk)
        if key not in self._sets and _size_bytes(split, wide) >= LARGE_BYTES:
            if found := read_features(key, list(wide), self._storage):
                self._sets[key] = found
        return self._sets.get(key)

    def _new(
        self,
        how: Extraction,
        trunk: str,
        compiled: Compiled | None,
        what: str,
        split: LabelledSplit,
        wide: Mapping[str, int],
    ) -> FeatureSet:
        """Take the features of a split and keep them."""
        key = how.key(split, trunk)
        take = partial(_extracted, how, compiled, what, split)
        found = None
        if (size_bytes := _size_bytes(split, wide)) >= LARGE_BYTES:
            shapes = {tap: (len(split), width) for tap, width in wide.items()}
            found = write_features(key, shapes, self._storage, take, what=what)
        if found is None:
            arrays = take()
            found = FeatureSet(arrays, {tap: variation(values_Nd) for tap, values_Nd in arrays.items()})
            self._bytes[key] = size_bytes
        self._sets[key] = found
        while sum(self._bytes.values()) > _MEMORY_BYTES and len(self._bytes) > 1:
            oldest = next(iter(self._bytes))
            del self._bytes[oldest], self._sets[oldest]
        return found


def _size_bytes(split: LabelledSplit, wide: Mapping[str, int]) -> int:
    return 4 * len(split) * sum(wide.values())


def _extracted(
    how: Extraction,
    compiled: Compiled | None,
    what: str,
    split: LabelledSplit,
    into: Mapping[str, NDArray[np.float32]] | None = None,
) -> dict[str, NDArray[np.float32]]:
    return extract(
        how.backbone,
        split.open(),
        how.view,
        split.rows,
        taps=how.taps,
        batch=how.batch,
        device=how.device,
        threads=how.threads,
        compiled=compiled,
        what=what,
        into=into,
    )
