"""VOC07 classification (`protocols/voc07.py`): the devkit's image lists, features, and SVMs.

The details are those of the public codes (protocols 3.1). Both splits are seen without augmentation: short side to
256, then the whole image squashed to a square, by linear interpolation with antialias, as VISSL does with PIL, or
without, as FAIR did with OpenCV.

Legend: N images, K classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from bowstore.config import Workspace
from bowstore.data.sources.listing import read_list
from bowstore.errors import DataError, MismatchError
from bowstore.evaluate.protocol import DataSets, Features, Scores
from bowstore.evaluate.protocols.voc07 import COSTS, Voc07Settings, VocSvmSettings
from bowstore.evaluate.svm import ABSENT, IGNORED, NORM_EPSILON, PRESENT, SEED, SvmScores, check_problem, evaluate_svms
from bowstore.evaluate.voc_layout import IMAGES, FileSplit, class_lists, of_files, refuse_missing, refuse_shared
from bowstore.models.backbone import Backbone
from bowstore.models.pooling import Tap, layer_taps

Split = Literal["trainval", "test"]
_LABELS = {"1": PRESENT, "-1": ABSENT, "0": IGNORED}
_LAST_STAGES = 2
_VOC07_SHAPE = (5011, 4952, 20)  # images in trainval and test, classes

_VIEW = {"size": 224, "resize": 256, "squash": True}  # pixels (protocols 3.1), whatever the network was trained at


def read_split(voc: Path, split: Split) -> FileSplit:
    """Read `ImageSets/Main/<class>_<split>.txt` of all classes of a devkit.

    A line is an image id and 1 (present), -1 (absent) or 0 (only difficult objects). All classes list the same ids.
    Images come sorted by id; labels are int8 (N, K): 1 present, 0 absent, -1 only difficult objects of that class. The
    fingerprint is over classes, ids, labels and the images' sizes in bytes.

    Args:
        voc: the folder with JPEGImages and ImageSets, for example VOCdevkit/VOC2007.
        split: "trainval" or "test".

    Raises:
        MissingError: a folder, the lists or an image is not there.
        DataError: a malformed line, an id listed twice, lists of other ids, or a class without a positive
            image; named by file and line.
    """
    lists = class_lists(voc, split)
    labels = {name: _read_list(path) for name, path in lists.items()}
    first, *others = labels
    for name in others:
        if different := labels[first].keys() ^ labels[name].keys():
            image = min(different)
            there, missing = (lists[first], lists[name]) if image in labels[first] else (lists[name], lists[first])
            raise DataError(
                f"{missing}: image {image} is not listed, but {there} lists it ({len(different)} such "
                "images); every class must list all images of the split: extract the devkit again"
            )
    ids = tuple(sorted(labels[first]))
    paths = tuple(voc / IMAGES / f"{image}.jpg" for image in ids)
    refuse_missing(lists[first], "image", paths)
    labels_NK = np.array([[labels[name][image] for name in labels] for image in ids], np.int8)
    for name, label_N in zip(labels, labels_NK.T, strict=True):
        if not (label_N == PRESENT).any():
            raise DataError(f"{lists[name]}: class {name} has 0 positive images of {len(ids)}; need at least 1")
    digest = xxhash.xxh3_128(" ".join((*labels, *ids, *(str(path.stat().st_size) for path in paths))).encode())
    digest.update(labels_NK.tobytes())
    role = "test" if split == "test" else "train"
    return of_files(paths, labels=labels_NK, classes=tuple(labels), fingerprint=digest.hexdigest(), role=role)


def _read_list(path: Path) -> dict[str, int]:
    """Labels by image id, in the order of the lines."""
    labels: dict[str, int] = {}
    for entry in read_list(path):
        image, line = entry.path, entry.whole or entry.path
        if len(line.split()) != 2 or entry.label not in _LABELS:
            raise DataError(f"{path}:{entry.number}: expected an image id and 1, 0 or -1, got {line!r}")
        if image in labels:
            raise DataError(f"{path}:{entry.number}: image {image} is listed twice")
        labels[image] = _LABELS[entry.label]
    return labels


def data(settings: Voc07Settings, _workspace: Workspace) -> DataSets:
    """Both splits, once they fit each other and the SVMs: what can be wrong before an image is read.

    Raises:
        MissingError, DataError, MismatchError: as `open_voc` and `svm.check_problem`.
    """
    found = open_voc(settings)
    check_problem(found["trainval"].labels, found["trainval"].classes)
    return found


def open_voc(settings: VocSvmSettings) -> DataSets:
    """Both splits, once they fit each other.

    Raises:
        MissingError, DataError: as `read_split`.
        MismatchError: the two splits have other classes, or share images.
    """
    voc = settings.voc
    assert voc is not None, "resolved"
    train, test = read_split(voc, "trainval"), read_split(voc, "test")
    if train.classes != test.classes:
        different = sorted(set(train.classes) ^ set(test.classes))
        raise MismatchError(
            f"{voc}: {len(train.classes)} classes in trainval and {len(test.classes)} in test (first that "
            f"differs: {different[0]}); extract both archives of one year into the same devkit"
        )
    refuse_shared(train, test, str(voc))
    shape = len(train), len(test), len(train.classes)
    return DataSets(
        splits={"trainval": train, "test": test},
        view=_VIEW | ({"antialias": False} if settings.resize == "opencv" else {}),
        dataset="voc07" if shape == _VOC07_SHAPE else None,  # the real one can be told by its numbers
    )


def taps(backbone: Backbone, settings: VocSvmSettings, size: int) -> Mapping[str, Tap]:
    """The last two stages pooled to about 9k dimensions, or as obow does it: the last, averaged everywhere.

    Raises:
        UsageError: a layer that the backbone does not have.
    """
    obow = settings.costs == "obow"
    layers = settings.layers or backbone.layers[-1 if obow else -_LAST_STAGES :]
    return layer_taps(backbone, layers, size=size, everywhere=obow, count_padding=settings.costs == "vissl")


def score(features: Features, settings: Voc07Settings) -> Scores:
    """Train SVMs on trainval and test them, for each layer; mean average precision of each and of the best.

    Raises:
        DataError: as `svm.evaluate_svms`.
    """
    train, test, costs = features["trainval"], features["test"], COSTS[settings.costs]
    how: dict[str, Any] = {"costs": costs, "solver": settings.solver, "jobs": settings.jobs}
    scores = {
        layer: evaluate_svms(train[layer], train.labels, test[layer], test.labels, what=f"svm {layer}", **how)
        for layer in train.taps
    }
    means = {f"map_{layer}": found.mean_average_precision for layer, found in scores.items()}
    return Scores(
        metrics=means | {"map_best": max(means.values())},
        details={layer: _details(found, train.classes) for layer, found in scores.items()},
        settings={"norm_epsilon": NORM_EPSILON, "costs": list(costs), "seed": SEED},
    )


def _details(score: SvmScores, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "average_precision": dict(zip(classes, score.average_precision_K.tolist(), strict=True)),
        "cost": dict(zip(classes, score.cost_K.tolist(), strict=True)),
        "validation": dict(zip(classes, score.validation_KC.tolist(), strict=True)),
        "fits": score.fits,
        "unconverged_fits": score.unconverged,
    }
