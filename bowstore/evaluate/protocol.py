"""The pattern of a protocol: what one is made of, what it is given, and what it gives back. Loads no torch.

A protocol is one module of `protocols/` (or a plugin) with one value in it, a `Kind`. It has one of two forms:

- `score`: a function of frozen features. `run_protocol` takes them, once for each labelled split, and keeps them.
- `run`: a function of the network itself, where something is trained.

Its functions may be named by "package.module:function" instead, so that the module that states settings and ids
loads neither torch nor scikit-learn.

Legend: N images of a split, K classes, d width of a feature.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from bowstore.config import Strict, ViewConfig, Workspace
from bowstore.data.index import Index
from bowstore.data.reader import ImageSource
from bowstore.errors import UsageError
from bowstore.plugins import Plugin, called

if TYPE_CHECKING:  # they load torch
    from bowstore.models.backbone import Backbone
    from bowstore.models.pooling import Tap
    from bowstore.train.distributed import World

T = TypeVar("T")
_LONGEST_LAYERS = 80  # characters of an id, which names a file, that layers may take
_ID = re.compile(r"[^./\s][^\0-\x1f]*")  # of it a file is named: no hidden one, and none elsewhere


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a number means.

    Attributes:
        id: name with a slash, for example "voc07-svm/fair"; all that changes the numbers' meaning is in it.
        version: grows when the same weights and images can give other numbers.
        description: one line; docs/protocols.md has the rest for bowstore's own.
        headline: the metric that stands for the protocol in a comparison.
    """

    id: str
    version: int
    description: str
    headline: str

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise UsageError(f"{self.id!r} is no id of a protocol; it begins with a letter or a digit, as in knn/k200")


@dataclass(frozen=True, kw_only=True)
class LabelledSplit:
    """Images of one split and their labels.

    Attributes:
        open: gives the encoded images; called only when pixels are needed.
        rows: int64 (N,), rows of what `open` gives, in the order of the features.
        labels: integers (N,), places in `classes` (-1: none); or (N, K), a column a class, where an image has several.
        classes: names; empty where nobody recorded them.
        fingerprint: of images and labels, for the result file.
        content: changes whenever an image or the order of the rows does: features are kept under it.
        index: of the shards; None where images lie as files.
        role: what the result file's inputs call the split, if not its name: "train" or "test".
    """

    open: Callable[[], ImageSource]
    rows: NDArray[np.int64]
    labels: NDArray[np.integer]
    classes: tuple[str, ...]
    fingerprint: str
    content: str = ""
    index: Index | None = None
    role: str | None = None

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.labels):
            raise UsageError(f"a protocol's split has {len(self.rows)} rows and {len(self.labels)} labels; correct it")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def key_hash(self) -> NDArray[np.uint64] | None:
        """uint64 (N,), of the images' keys, in the order of the rows; None where they do not lie in shards."""
        return None if self.index is None else np.asarray(self.index.key_hash[self.rows])

    @cached_property
    def key(self) -> str:
        """32 hex digits over `fingerprint`, `content` and the rows."""
        digest = xxhash.xxh3_128(f"{self.fingerprint} {self.content} ".encode())
        digest.update(np.ascontiguousarray(self.rows, "<i8").data)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class DataSets:
    """What a protocol looks at.

    Attributes:
        splits: by name, for example "train" and "test", in the order in which features are taken.
        view: fields of `CleanView` that the protocol fixes whatever the network was trained at, for example `size`; of
            one that trains no more than its size, which it sees to itself.
        dataset: name of the paper's data set, where it can only be that: its figures are shown beside.
    """

    splits: Mapping[str, LabelledSplit]
    view: Mapping[str, Any] = field(default_factory=dict)
    dataset: str | None = None

    def __getitem__(self, split: str) -> LabelledSplit:
        return self.splits[split]

    @property
    def inputs(self) -> dict[str, str | None]:
        """Fingerprints by role, as a result file records them."""
        return {split.role or name: split.fingerprint for name, split in self.splits.items()}


@dataclass(frozen=True, kw_only=True)
class SplitFeatures:
    """Features of one split, with its labels.

    `features["train"]["pooled"]` is an array (N, d) float32, finite and C-contiguous; row i belongs to `labels[i]`. It
    is memory-mapped when large, and other protocols get the same one: never write to it.

    Attributes:
        taps: the arrays by tap as they are kept, float16 where a user asked for that: for those that turn a few rows at
            a time into float32 or float64.
        labels: integers (N,), places in `classes` (-1: none), or (N, K), as in `LabelledSplit`.
        classes: names; empty where nobody recorded them.
        variation: by tap, how much its features differ between images (`features.variation`).
        key_hash: uint64 (N,), of the images' keys; None where they do not lie in shards.
    """

    taps: "Mapping[str, NDArray[np.float32] | NDArray[np.float16]]"
    labels: NDArray[np.integer]
    classes: tuple[str, ...]
    variation: Mapping[str, float]
    key_hash: NDArray[np.uint64] | None = None

    def __getitem__(self, tap: str) -> NDArray[np.float32]:
        return self.taps[tap].astype(np.float32, copy=False)  # of float16 a copy in memory

    def __len__(self) -> int:
        return len(self.labels)


def num_classes(train: LabelledSplit | SplitFeatures) -> int:
    """K, of images of each class, as train images are."""
    return len(train.classes) or int(train.labels.max()) + 1


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a `score` function is given: `features[split][tap]`, labels and classes with each split.

    Attributes:
        splits: by the names that `data` gave them, in that order.
        device: where the network ran, for scores that are computed with torch: "cpu" or "cuda".
    """

    splits: Mapping[str, SplitFeatures]
    device: str = "cpu"

    def __getitem__(self, split: str) -> SplitFeatures:
        return self.splits[split]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a protocol gives.

    Attributes:
        metrics: finite numbers, shares from 0 to 1 by name; the headline is among them.
        details: plain values: curves, scores by class, intervals. Those of one tap among several lie under its name.
        settings: plain values that the protocol fixes or found, to be recorded beside what the user set.
    """

    metrics: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, Mapping):
                raise UsageError(f"a protocol's {name} are {type(value).__name__}, not values by name; correct it")


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network that a `run` function is given.

    Attributes:
        backbone: on the job's device, in eval mode; nobody else has it, so that it may be trained.
        view: size, normalisation and perturbations that it was trained with.
        folder: for checkpoints of a training of hours; removed once the result is written. None: nowhere.
    """

    backbone: "Backbone"
    view: ViewConfig
    folder: Path | None = None


def layers_in_id(layers: Sequence[str]) -> str:
    """What stands for layers in a protocol's id, in whatever order they are given: their names, or a digest of many."""
    names = "-".join(sorted(layers))
    if len(names) <= _LONGEST_LAYERS:
        return names
    return f"{len(layers)}-layers-{xxhash.xxh3_64_hexdigest(names.encode())[:8]}"


def _as_given(settings: Any, _workspace: Workspace) -> Any:
    return settings


@dataclass(frozen=True, kw_only=True)
class Kind(Plugin):
    """A protocol, or a family of them with ids by their settings; `bowstore eval NAME` is made of it.

    Attributes:
        name: of the command.
        help: what it measures, in one line.
        settings: all that a user sets, data included; command-line options, their help and defaults come from it.
        flags: how options are spelled that do not have their field's name with dashes.
        describe: id and version of resolved settings.
        data: opens and checks the labelled images: what can be wrong is said before an image is read.
        resolve: fills in what the workspace says, and what follows from the data; as given where there is nothing.
        taps: where features are taken, by name, for a network and a size of its input in pixels; by default its pooled
            output, "pooled".
        score: first form.
        run: second form: on every rank of the job, with the data sets, the settings and the `World`.
    """

    help: str
    settings: type[Strict]
    flags: Mapping[str, str] = field(default_factory=dict)
    describe: Callable[[Any], Protocol]
    data: Callable[[Any, Workspace], DataSets] | str
    resolve: Callable[[Any, Workspace], Any] | str = _as_given
    taps: "Callable[[Backbone, Any, int], Mapping[str, Tap]] | str" = "bowstore.evaluate.features:pooled_output"
    score: Callable[[Features, Any], Scores] | str | None = None
    run: "Callable[[Network, DataSets, Any, World], Scores] | str | None" = None

    def __post_init__(self) -> None:
        if (self.score is None) == (self.run is None):
            raise ValueError(f"protocol {self.name!r} needs one of score and run")

    def ask(self, part: str, kind: type[T], *given: Any) -> T:
        """What the function of one part, for example `data`, gives.

        Raises:
            UsageError: it cannot be imported, or gives anything but a `kind`.
        """
        found = called(getattr(self, part))(*given)
        if not isinstance(found, kind):
            raise UsageError(
                f"protocol {self.name!r}: its {part} gives {type(found).__name__}, not {kind.__name__}; correct it"
            )
        return found
