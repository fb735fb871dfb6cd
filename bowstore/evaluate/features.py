"""Frozen features of images: the network's pooled output, or average-pooled maps of its layers.

Legend: B batch, C H W of the images, c channels, h w places of a map, N images, d feature width.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from bowstore.config import Compile
from bowstore.data.pipeline import clean_batches
from bowstore.data.views import CleanView
from bowstore.environment import device_name, library_versions
from bowstore.errors import DataError, MismatchError, UsageError
from bowstore.evaluate.config import FeatureType
from bowstore.evaluate.protocol import LabelledSplit
from bowstore.exact import exact_float32
from bowstore.models.backbone import Backbone, evaluating
from bowstore.models.compiled import CannotCompileError, Compiled, Use, compile_frozen, tell_fallback, way_of
from bowstore.models.memory import FROZEN_FORMAT
from bowstore.models.pooling import POOLED, Tap, tapped
from bowstore.progress import Progress, say

COLLAPSED = 1e-3  # variation below which features tell no images apart; those of random networks vary by 0.05 and more
_BATCH, _CPU_BATCH, _CPU_PIXELS = 128, 16, 1 << 20  # images, on a CPU the fewest, and about how many pixels together
_SLICE, _SLICE_VALUES = 1024, 1 << 24  # images, and values, at a time at most: sums in float64 need little memory
Feature = NDArray[np.float32] | NDArray[np.float16]  # (N, d)
Arrays = Mapping[str, Feature]  # by tap
Batches = Iterable[tuple[NDArray[np.int64], Tensor]]


def pooled_output(_backbone: Backbone, _settings: Any, _size: int) -> Mapping[str, Tap]:
    """The one tap of most protocols: "pooled", the network's output."""
    return POOLED


def usual_batch(size: int, device: torch.device) -> int:
    """Images a batch where nobody says: 128, on a CPU a power of two that is a megapixel.

    On a CPU the maps of a large batch are new pages of memory each time, which the kernel has to clear first.

    Args:
        size: side of the images, pixels.
        device: where the network runs.
    """
    if device.type != "cpu":
        return _BATCH
    fit = max(_CPU_PIXELS // size**2, _CPU_BATCH)
    return min(1 << fit.bit_length() - 1, _BATCH)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How features of any images are taken.

    The backbone is moved to `device`, its weights are laid out as images come, and it runs in eval mode without
    gradients, in full float32 (no TF32, no autocast): its batch-norm statistics stay as they are, and it gets its modes
    back.

    Attributes:
        backbone: the network.
        view: how it sees images: geometry and normalisation.
        taps: where features are taken, by name.
        batch: images a forward pass.
        device: where the network runs.
        threads: decoding threads; None for one a core.
        compile: run the network compiled; auto decides by the number of images.
        dtype: features are rounded to it, wherever they are kept.
        identity: text that is the same for networks that compute the same: digest of the weights, how it is built.
    """

    backbone: Backbone
    view: CleanView
    taps: Mapping[str, Tap]
    batch: int
    device: torch.device
    threads: int | None = None
    compile: Compile = "auto"
    dtype: FeatureType = "float32"
    identity: str = ""

    def key(self, split: LabelledSplit, trunk: str) -> str:
        """What a feature set is kept under: all that its numbers, to the last digit, depend on."""
        device = device_name(self.device), torch.get_num_threads()
        arithmetic = trunk, self.batch, self.dtype, *device, library_versions()
        all_of_it = split.key, self.identity, self.view.recorded(), dict(self.taps), arithmetic
        return xxhash.xxh3_128_hexdigest(repr(all_of_it).encode())

    def widths(self) -> dict[str, int]:
        """How wide the features of each tap are, found by one black image."""
        self.backbone.to(self.device)
        with evaluating(self.backbone), torch.no_grad():
            pooled = self._use(self.backbone, torch.zeros(1, 3, self.view.size, self.view.size, device=self.device))
        return {name: pooled_1d.shape[1] for name, pooled_1d in pooled.items()}

    def trunk(self, images: int) -> str:
        """How the network runs for so many images: `EAGER` or `FROZEN`."""
        return way_of(self.compile, self.backbone, self._use, images=images, size=self.view.size, device=self.device)

    def compiled(self) -> Compiled | None:
        """The network and its taps as one compiled function; None where it cannot be compiled.

        Raises:
            UsageError: compiling was asked for, and is not possible.
        """
        say("compiling the network (10 to 50 s)")
        backbone = self.backbone.to(self.device).to(memory_format=FROZEN_FORMAT)
        how: dict[str, Any] = {"batch": self.batch, "size": self.view.size, "device": self.device}
        try:
            with evaluating(backbone), exact_float32():
                return compile_frozen(backbone, self._use, threads=torch.get_num_threads(), **how)
        except CannotCompileError as error:
            if self.compile is True:
                raise UsageError(f"{error}; leave --compile out to do without") from error
            tell_fallback(str(error))
            return None

    def features(
        self,
        split: LabelledSplit,
        *,
        compiled: Compiled | None = None,
        what: str = "features",
        into: Arrays | None = None,
    ) -> dict[str, Feature]:
        """Features of the images of a split in their order, (N, d) of `dtype` for each tap by its name.

        Memory: N * d * 4 bytes (2 of float16) for each tap, on the host, unless `into` lies elsewhere.

        Args:
            split: which images.
            compiled: as `compiled` gives it; None runs the network as it is.
            what: name of the step in the progress line.
            into: arrays (N, d) by tap to be filled; None for new ones in memory.

        Raises:
            DataError: NaN or infinity in a feature, or a value beyond float16, with the image's name; an undecodable
                image; no rows.
        """
        source, rows, device = split.open(), split.rows, self.device
        batches = clean_batches(source, self.view, rows, batch=self.batch, device=device, threads=self.threads)
        self.backbone.to(device).to(memory_format=FROZEN_FORMAT)
        return self.collect(batches, rows, compiled=compiled, name_of=source.name, what=what, into=into)

    def collect(
        self,
        batches: Batches,
        rows: NDArray[np.int64],
        *,
        compiled: Compiled | None = None,
        name_of: Callable[[int], str] = "row {}".format,
        what: str = "features",
        into: Arrays | None = None,
    ) -> dict[str, Feature]:
        """`features` behind the pipeline: run the network, which is where the images are, and fill one array a tap.

        Batches are (rows (B,), images_BCHW), in the order of `rows`; `name_of` a row is for messages.

        Raises:
            DataError: as `features`.
            MismatchError: the batches are not of the rows that were asked for.
        """
        if len(rows) == 0:
            raise DataError(f"{what}: no images to take features of; name shards that hold at least one")
        features = dict(into or {})
        run = compiled or partial(self._use, self.backbone)
        start = 0
        with evaluating(self.backbone), exact_float32(), torch.no_grad(), Progress(what, len(rows)) as progress:
            for rows_B, images_BCHW in batches:
                stop = start + len(rows_B)
                if not np.array_equal(rows_B, rows[start:stop]):
                    raise MismatchError(f"{what}: images {start} to {stop - 1} came in another order than asked for")
                for name, pooled_Bd in run(images_BCHW).items():
                    values_Bd = pooled_Bd.float().cpu().numpy()
                    _refuse_unusable(values_Bd, self.dtype, rows_B, f"{what}: {self.taps[name]}", name_of)
                    if name not in features:
                        features[name] = np.empty((len(rows), values_Bd.shape[1]), self.dtype)
                    features[name][start:stop] = values_Bd
                start = stop
                progress.advance(len(rows_B))
        if start != len(rows):
            raise MismatchError(f"{what}: {start} of {len(rows)} images came out of the pipeline")
        return features

    @property
    def _use(self) -> Use:
        return partial(_features, taps=self.taps)


def warn_of_collapse(what: str, shares: Mapping[str, float], images: int) -> None:
    """Warn of features that are (all but) the same for all images: the network has collapsed, and scores are chance.

    Args:
        what: name of the features.
        shares: `variation` by tap.
        images: how many there are.
    """
    for tap, share in shares.items():
        if share < COLLAPSED and images > 1:
            say(
                f"warning: {what}: {tap} is the same for all {images} images (it varies by {share:.1g} of its size, "
                f"less than {COLLAPSED:g}): the network has collapsed, and no score of it says anything"
            )


def variation(features_Nd: Feature) -> float:
    """How much features differ between images: the root mean square of x - mean, over that of x; 0 where all are 0."""
    total, squares = np.zeros(features_Nd.shape[1]), 0.0
    images = min(_SLICE, max(1, _SLICE_VALUES // features_Nd.shape[1]))
    parts = [features_Nd[start : start + images] for start in range(0, len(features_Nd), images)]
    for part in parts:
        total += part.sum(axis=0, dtype=np.float64)
        squares += float(np.square(part, dtype=np.float64).sum())
    mean = total / len(features_Nd)
    # Around the mean itself: a difference of large sums would be rounding.
    around = sum(float(np.square(part - mean).sum()) for part in parts)
    return float(np.sqrt(around / squares)) if squares > 0 else 0.0


def _features(backbone: Backbone, images_BCHW: Tensor, taps: Mapping[str, Tap]) -> dict[str, Tensor]:
    """Features (B, d) of one batch by the tap's name."""
    return {name: pooled_Bcn.flatten(1) for name, pooled_Bcn in tapped(backbone, images_BCHW, taps).items()}


def _refuse_unusable(
    values_Bd: NDArray[np.float32],
    dtype: FeatureType,
    rows_B: NDArray[np.int64],
    where: str,
    name_of: Callable[[int], str],
) -> None:
    """Refuse values that are not finite, or are not once they are rounded."""
    largest = np.finfo(dtype).max
    bad = np.flatnonzero(~(np.abs(values_Bd) <= largest).all(axis=1))  # NaN is no less than anything
    if not len(bad):
        return
    images = f"{name_of(int(rows_B[bad[0]]))} and {len(bad) - 1} more of the {len(rows_B)} images of its batch"
    if np.isfinite(values_Bd).all():
        raise DataError(
            f"{where}: {np.abs(values_Bd).max():.3g} for {images}; {dtype} ends at {largest:g}: leave --dtype out"
        )
    raise DataError(
        f"{where}: NaN or infinity for {images}; the weights are broken or the images' normalisation is wrong"
    )
