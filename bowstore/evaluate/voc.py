"""VOC07 classification: the devkit's image lists, and the protocols voc07-svm/fair, /vissl and /obow.

The details are those of the public codes (protocols 3.1). Both splits are seen without augmentation: short
side to `resize`, then the whole image squashed to a square, by linear interpolation with antialias. (FAIR
resized with OpenCV without antialias, VISSL with PIL's antialiased bilinear.)

Legend: N images, K classes.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from bowstore.config import Compile, ViewConfig
from bowstore.data.file_reader import FileReader
from bowstore.data.views import CleanView, clean_view
from bowstore.environment import choose_device
from bowstore.errors import DataError, MismatchError, MissingError
from bowstore.evaluate.features import Tap, compiled_features, extract, layer_taps, variation
from bowstore.evaluate.protocol import Result, new_result, write_result
from bowstore.evaluate.svm import (
    ABSENT,
    COSTS,
    IGNORED,
    NORM_EPSILON,
    PRESENT,
    CostList,
    SvmScores,
    check_problem,
    evaluate_svms,
)
from bowstore.models.backbone import Backbone
from bowstore.models.compiled import EAGER, FROZEN
from bowstore.models.weights import weights_sha256

Split = Literal["trainval", "test"]
_LABELS = {"1": PRESENT, "-1": ABSENT, "0": IGNORED}
_LAST_STAGES = 2
_VOC07_SHAPE = (5011, 4952, 20)  # images in trainval and test, classes

_SIZE, _RESIZE = 224, 256  # pixels (protocols, section 3.1)


@dataclass(frozen=True)
class VocSplit:
    """The images of one split, sorted by id.

    Attributes:
        ids: image ids, for example "000005".
        paths: image files.
        classes: sorted names.
        labels_NK: int8, 1 present, 0 absent, -1 only difficult objects of that class.
        fingerprint: 32 hex digits over classes, ids, labels and the images' sizes in bytes.
    """

    ids: tuple[str, ...]
    paths: tuple[Path, ...]
    classes: tuple[str, ...]
    labels_NK: NDArray[np.int8]
    fingerprint: str


def read_split(voc: Path, split: Split) -> VocSplit:
    """Read `ImageSets/Main/<class>_<split>.txt` of all classes of a devkit.

    A line is an image id and 1 (present), -1 (absent) or 0 (only difficult objects). All classes list the
    same ids.

    Args:
        voc: the folder with JPEGImages and ImageSets, for example VOCdevkit/VOC2007.
        split: "trainval" or "test".

    Raises:
        MissingError: a folder, the lists or an image is not there; an image is named with its line.
        DataError: a malformed line, an id listed twice, lists of other ids, or a class without a positive
            image; named by file and line.
    """
    lists = _class_lists(voc, split)
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
    paths = tuple(voc / "JPEGImages" / f"{image}.jpg" for image in ids)
    sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
    absent = [path for path, size in zip(paths, sizes, strict=True) if size < 0]
    if absent:
        line = list(labels[first]).index(absent[0].stem) + 1
        raise MissingError(
            f"{lists[first]}:{line}: no image {absent[0]} ({len(absent)} of {len(ids)} are missing); "
            "extract the devkit again"
        )
    labels_NK = np.array([[labels[name][image] for name in labels] for image in ids], np.int8)
    for name, label_N in zip(labels, labels_NK.T, strict=True):
        if not (label_N == PRESENT).any():
            raise DataError(f"{lists[name]}: class {name} has 0 positive images of {len(ids)}; need at least 1")
    digest = xxhash.xxh3_128(" ".join((*labels, *ids, *map(str, sizes))).encode())
    digest.update(labels_NK.tobytes())
    return VocSplit(ids, paths, tuple(labels), labels_NK, digest.hexdigest())


def _class_lists(voc: Path, split: Split) -> dict[str, Path]:
    """The list file of each class, by the class's name, sorted by file name."""
    for folder in (voc / "JPEGImages", voc / "ImageSets" / "Main"):
        if not folder.is_dir():
            inside = voc / "VOC2007"
            hint = f"did you mean {inside}?" if inside.is_dir() else "name the folder VOCdevkit/VOC2007 of the devkit"
            raise MissingError(f"no folder {folder}; {hint}")
    paths = sorted((voc / "ImageSets" / "Main").glob(f"[!.]*_{split}.txt"))
    if not paths:
        archive = "VOCtrainval_06-Nov-2007.tar" if split == "trainval" else "VOCtest_06-Nov-2007.tar"
        raise MissingError(
            f"no <class>_{split}.txt in {voc / 'ImageSets' / 'Main'}; extract {archive} into the same devkit"
        )
    return {path.name.removesuffix(f"_{split}.txt"): path for path in paths}


def _read_list(path: Path) -> dict[str, int]:
    """Labels by image id, in the order of the lines."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not ASCII; extract the devkit again") from error
    labels: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if len(words) != 2 or words[1] not in _LABELS:
            raise DataError(f"{path}:{number}: expected an image id and 1, 0 or -1, got {line!r}")
        if words[0] in labels:
            raise DataError(f"{path}:{number}: image {words[0]} is listed twice")
        labels[words[0]] = _LABELS[words[1]]
    if not labels:
        raise DataError(f"{path} lists no images; extract the devkit again")
    return labels


def evaluate_voc07(
    backbone: Backbone,
    *,
    voc: Path,
    view: ViewConfig,
    out: Path,
    costs: CostList = "fair",
    layers: Sequence[str] | None = None,
    jobs: int | None = None,
    seed: int = 0,
    run: str | None = None,
    batch: int = 64,
    threads: int | None = None,
    device: torch.device | None = None,
    compile: Compile = "auto",
) -> Result:
    """Train linear SVMs on VOC07 trainval, test them, write `eval/voc07-svm-<costs>.json` into a run folder.

    Args:
        backbone: the frozen network.
        voc: devkit folder with JPEGImages and ImageSets, holding both splits.
        view: its normalisation is used; size and resize are the protocol's, 224 and 256.
        out: run directory.
        costs: the public code whose cost list (and, for obow, pooling) is used.
        layers: which maps; None for the last two stages (obow: the last).
        jobs: processes that fit SVMs; None for one a core. The result does not depend on it.
        seed: liblinear's.
        run: name of the run that the weights come from.
        batch: images a forward pass.
        threads: decoding threads; None for one a core.
        device: where the network runs; None for the GPU where there is one.
        compile: run the network compiled; auto decides by the number of images.

    Raises:
        MissingError, DataError: as `read_split`, `features.extract` and `svm.evaluate_svms`.
        MismatchError: the two splits have other classes, or share images.
        UsageError: a layer that the backbone does not have.
    """
    device, start = device or choose_device("auto"), time.monotonic()
    splits = _open_splits(voc, COSTS[costs], jobs)
    train, test = splits.values()
    # The protocol fixes the geometry, whatever size the network was trained at.
    clean = replace(clean_view(view, squash=True), size=_SIZE, resize=_RESIZE)
    taps = _taps(backbone.to(device), layers, costs, clean.size)
    images = sum(len(split.paths) for split in splits.values())
    compiled = compiled_features(backbone, taps, compile, images=images, size=clean.size, batch=batch, device=device)
    how: dict[str, Any] = {"batch": batch, "device": device, "threads": threads, "compiled": compiled}
    features = [
        _features(backbone, split, clean, taps, what=f"{name} features", **how) for name, split in splits.items()
    ]
    dims = {layer: values_Nd.shape[1] for layer, values_Nd in features[0].items()}
    varied = _variation(features)
    scores = _score_layers(features, train, test, costs=COSTS[costs], seed=seed, jobs=jobs)
    result = new_result(
        f"voc07-svm/{costs}",
        metrics=_metrics(scores),
        settings={
            "arch": backbone.arch,
            "trunk": FROZEN if compiled else EAGER,
            "view": asdict(clean),
            "layers": {layer: {"pool": str(tap.pool), "dims": dims[layer]} for layer, tap in taps.items()},
            "norm_epsilon": NORM_EPSILON,
            "costs": list(COSTS[costs]),
            "seed": seed,
            "images": {name: len(split.ids) for name, split in splits.items()},
        },
        inputs={"train": train.fingerprint, "test": test.fingerprint, "dataset": _dataset(train, test)}
        | {"weights_sha256": weights_sha256(backbone.state_dict()), "run": run},
        details={layer: _details(score, train.classes) | varied[layer] for layer, score in scores.items()},
        device=device,
        seconds=time.monotonic() - start,
    )
    write_result(out, result)
    return result


def _features(
    backbone: Backbone, split: VocSplit, view: CleanView, taps: Mapping[str, Tap], **how: Any
) -> dict[str, NDArray[np.float32]]:
    """`features.extract` of all images of a split."""
    return extract(backbone, FileReader(split.paths), view, np.arange(len(split.paths)), taps=taps, **how)


def _variation(features: Sequence[dict[str, NDArray[np.float32]]]) -> dict[str, dict[str, Any]]:
    """How much the features of a layer vary, by split (`features.variation`), as a part of the layer's details."""
    names = ("trainval", "test")
    return {
        layer: {"variation": {name: variation(part[layer]) for name, part in zip(names, features, strict=True)}}
        for layer in features[0]
    }


def _dataset(train: VocSplit, test: VocSplit) -> str | None:
    """The real VOC07 by its numbers, or nothing: the paper's figures are shown only beside the former."""
    return "voc07" if (len(train.ids), len(test.ids), len(train.classes)) == _VOC07_SHAPE else None


def _open_splits(voc: Path, costs: Sequence[float], jobs: int | None) -> dict[Split, VocSplit]:
    """Both splits, once they fit each other and the SVMs: what can be wrong before an image is read."""
    train, test = read_split(voc, "trainval"), read_split(voc, "test")
    if train.classes != test.classes:
        different = sorted(set(train.classes) ^ set(test.classes))
        raise MismatchError(
            f"{voc}: {len(train.classes)} classes in trainval and {len(test.classes)} in test (first that "
            f"differs: {different[0]}); extract both archives of one year into the same devkit"
        )
    shared = set(train.ids) & set(test.ids)
    if shared:
        raise MismatchError(
            f"{voc}: {len(shared)} images are in both trainval and test (first: {min(shared)}); "
            "extract the devkit again"
        )
    check_problem(train.labels_NK, test.labels_NK, train.classes, costs, jobs=jobs)
    return {"trainval": train, "test": test}


def _taps(backbone: Backbone, layers: Sequence[str] | None, costs: CostList, size: int) -> dict[str, Tap]:
    """The last two stages pooled to about 9k dimensions, or as obow does it: the last, averaged everywhere."""
    obow = costs == "obow"
    stages = layers or backbone.layers[-1 if obow else -_LAST_STAGES :]
    return layer_taps(backbone, stages, size=size, everywhere=obow, count_padding=costs == "vissl")


def _score_layers(
    features: Sequence[dict[str, NDArray[np.float32]]],
    train: VocSplit,
    test: VocSplit,
    *,
    costs: Sequence[float],
    seed: int,
    jobs: int | None,
) -> dict[str, SvmScores]:
    """Scores by layer; each layer's features are taken out of `features`, to be freed when its SVMs are done."""
    return {
        layer: evaluate_svms(
            features[0].pop(layer),
            train.labels_NK,
            features[1].pop(layer),
            test.labels_NK,
            classes=train.classes,
            costs=costs,
            seed=seed,
            jobs=jobs,
            what=f"svm {layer}",
        )
        for layer in list(features[0])
    }


def _metrics(scores: Mapping[str, SvmScores]) -> dict[str, float]:
    """Mean average precision of each layer and of the best one."""
    means = {f"map_{layer}": score.mean_average_precision for layer, score in scores.items()}
    return means | {"map_best": max(means.values())}


def _details(score: SvmScores, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "average_precision": dict(zip(classes, score.average_precision_K.tolist(), strict=True)),
        "cost": dict(zip(classes, score.cost_K.tolist(), strict=True)),
        "validation": dict(zip(classes, score.validation_KC.tolist(), strict=True)),
        "fits": score.fits,
        "unconverged_fits": score.unconverged,
    }
