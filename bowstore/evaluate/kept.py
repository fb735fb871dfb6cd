"""Feature sets, each taken once: the taps of one labelled split.

Legend: N images, d feature width.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from bowstore.config import Compile
from bowstore.data.views import CleanView
from bowstore.environment import device_name, library_versions
from bowstore.evaluate.features import Tap, compiled_features, extract, trunk_of, variation, warn_of_collapse
from bowstore.evaluate.protocol import DataSets, Features, LabelledSplit, SplitFeatures
from bowstore.models.backbone import Backbone
from bowstore.models.compiled import EAGER, FROZEN, Compiled
from bowstore.models.weights import weights_sha256


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How features of any images are taken.

    Attributes:
        backbone: the frozen network.
        view: how it sees images.
        taps: where features are taken, by name.
        batch: images a forward pass.
        device: where the network runs.
        threads: decoding threads; None for one a core.
        compile: run the network compiled; auto decides by the number of images.
    """

    backbone: Backbone
    view: CleanView
    taps: Mapping[str, Tap]
    batch: int
    device: torch.device
    threads: int | None = None
    compile: Compile = "auto"

    @cached_property
    def weights(self) -> str:
        """Digest of the network's weights."""
        return weights_sha256(self.backbone.state_dict())

    def key(self, split: LabelledSplit, trunk: str) -> str:
        """What a feature set is kept under: all that its numbers, to the last digit, depend on."""
        taps = {name: str(tap) for name, tap in self.taps.items()}
        network = (self.weights, self.backbone.arch, asdict(self.view), taps)
        arithmetic = (trunk, self.batch, "float32", device_name(self.device), library_versions())
        return xxhash.xxh3_128_hexdigest(repr((split.key, network, arithmetic)).encode())


@dataclass(frozen=True)
class _FeatureSet:
    """Features (N, d) by tap, and how much they vary."""

    taps: Mapping[str, NDArray[np.float32]]
    variation: Mapping[str, float]


class FeatureSets:
    """The feature sets of one command, by their keys."""

    def __init__(self) -> None:
        self._sets: dict[str, _FeatureSet] = {}

    def take(self, how: Extraction, data: DataSets) -> tuple[Features, str]:
        """Features of all splits, and how the network was run for them; only those that are not kept are extracted.

        Raises:
            DataError: as `features.extract`.
            UsageError: compiling was asked for, and is not possible.
        """
        images = sum(map(len, data.splits.values()))
        size, device = how.view.size, how.device
        # By the work of all splits, whatever is kept of them: the same evaluation gives the same digits.
        trunk = trunk_of(how.backbone, how.taps, how.compile, images=images, size=size, device=device)
        compiled = None
        if trunk == FROZEN and not all(how.key(split, trunk) in self._sets for split in data.splits.values()):
            required = how.compile is True
            compiled = compiled_features(
                how.backbone, how.taps, required=required, size=size, batch=how.batch, device=device
            )
            trunk = FROZEN if compiled else EAGER
        taken = {name: self._one(how, trunk, compiled, name, split) for name, split in data.splits.items()}
        return Features(splits=taken, device=str(device)), trunk

    def _one(
        self, how: Extraction, trunk: str, compiled: Compiled | None, name: str, split: LabelledSplit
    ) -> SplitFeatures:
        """The features of a split, from what is kept or from its images."""
        key, what = how.key(split, trunk), f"{name} features"
        found = self._sets.get(key)
        if found is None:
            found = self._sets[key] = _extracted(how, compiled, what, split)
        warn_of_collapse(what, {str(how.taps[tap]): share for tap, share in found.variation.items()}, len(split))
        return SplitFeatures(taps=found.taps, labels=split.labels, classes=split.classes, variation=found.variation)


def _extracted(how: Extraction, compiled: Compiled | None, what: str, split: LabelledSplit) -> _FeatureSet:
    taps = extract(
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
    )
    return _FeatureSet(taps, {name: variation(values_Nd) for name, values_Nd in taps.items()})
