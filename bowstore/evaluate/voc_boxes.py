"""Objects of VOC devkits: image lists, annotations, and the splits of detection (`protocols/voc0712_detection.py`).

Legend: N images, M objects of an image, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree import ElementTree

import numpy as np
import xxhash
from numpy.typing import NDArray

from bowstore.config import Workspace
from bowstore.errors import DataError, MissingError, nearest
from bowstore.evaluate.protocol import DataSets
from bowstore.evaluate.protocols.voc0712_detection import DetectionSettings
from bowstore.evaluate.voc_layout import (
    AGAIN,
    IMAGES,
    MAIN,
    FileSplit,
    class_lists,
    extract,
    find_devkit,
    header_size,
    of_files,
    read_ids,
    refuse_missing,
    refuse_shared,
)

Part = Literal["trainval", "test"]
_SHAPES = {(16_551, 4952, 20): "voc0712", (5011, 4952, 20): "voc07"}  # images in train and test, classes
_SIDES = ("xmin", "ymin", "xmax", "ymax")


class Objects(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: float32 (M, 4), left, top, right and bottom edge, pixels: what VOC counts from 1 to W is 0 to W here.
        labels: int64 (M,), places among the classes.
        difficult: bool (M,).
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class BoxedSplit(FileSplit):
    """Images with their objects; labels are int8 (N, K): 1 where a class is present.

    Attributes:
        sizes: int64 (N, 2), height and width, pixels.
        objects: of each image.
    """

    sizes: NDArray[np.int64]
    objects: tuple[Objects, ...]


def data(settings: DetectionSettings, _workspace: Workspace) -> DataSets:
    """Train and test images with their objects: what can be wrong is said before an image is decoded.

    Raises:
        MissingError: a folder, a list, an annotation or an image is not there.
        DataError: a list or an annotation that cannot be right; a class without objects.
        MismatchError: images that are listed for both.
    """
    assert settings.voc is not None, "resolved"
    plan = settings.plan
    classes = tuple(class_lists(find_devkit(settings.voc, 2007), "trainval"))
    folders = [find_devkit(settings.voc, year) for year in plan.years]
    if len(set(folders)) < len(folders):
        raise MissingError(f"{settings.voc} is the folder of one year; name VOCdevkit, with VOC2007 and VOC2012 in it")
    lists = [(folder, _listed(folder, year, "trainval")) for folder, year in zip(folders, plan.years, strict=True)]
    tested = _listed(folders[0], 2007, "test")
    train = read_boxes(lists, classes, role="train")
    test = read_boxes([(folders[0], tested)], classes, role="test")
    refuse_shared(train, test, str(settings.voc))
    for split, part in ((train, "trainval"), (test, "test")):
        counts = _counted(split, easy=part == "test")
        if not counts.all():
            name = classes[int(counts.argmin())]
            what = "objects that are not difficult" if part == "test" else "objects"
            raise DataError(f"{settings.voc}: class {name} has 0 {what} in {part}; need at least 1 of each class")
    if plan.test_images:
        few = [tested[row] for row in _few(test, plan.test_images)]
        test = read_boxes([(folders[0], few)], classes, role="test")
    shape = len(train), len(test), len(classes)
    return DataSets(splits={"train": train, "test": test}, view={"size": plan.test_side}, dataset=_SHAPES.get(shape))


def _listed(voc: Path, year: int, part: Part) -> tuple[str, ...]:
    """The images of a part, sorted; all of them and their annotations are there."""
    source = voc / MAIN / f"{part}.txt"
    for place in (voc / IMAGES, voc / "Annotations", source):
        if not place.exists():
            alone = "" if year == 2007 else ", or --schedule voc07 trains on VOC2007 alone (another protocol id)"
            raise MissingError(f"no {place}; {extract(year, part)}{alone}")
    ids = tuple(sorted(read_ids(source)))
    refuse_missing(source, "image", [voc / IMAGES / f"{name}.jpg" for name in ids])
    refuse_missing(source, "annotation", [voc / "Annotations" / f"{name}.xml" for name in ids])
    return ids


def read_boxes(lists: Sequence[tuple[Path, Sequence[str]]], classes: tuple[str, ...], *, role: str) -> BoxedSplit:
    """Images with their annotations.

    The fingerprint is over classes, ids, objects and the images' sizes in bytes.

    Args:
        lists: folder of a year, and ids in it.
        classes: names.
        role: "train" or "test".

    Raises:
        DataError: as `read_annotation`; an image that cannot be opened.
    """
    paths, sizes, objects = [], [], []
    digest = xxhash.xxh3_128(" ".join(classes).encode())
    for folder, ids in lists:
        for name in ids:
            path = folder / IMAGES / f"{name}.jpg"
            size = header_size(path)
            found = read_annotation(folder / "Annotations" / f"{name}.xml", classes, size)
            digest.update(f"{name} {path.stat().st_size}".encode())
            for array in found:
                digest.update(array.tobytes())
            paths.append(path)
            sizes.append(size)
            objects.append(found)
    present_NK = np.zeros((len(paths), len(classes)), np.int8)
    for row, each in enumerate(objects):
        present_NK[row, each.labels] = 1
    split = of_files(paths, labels=present_NK, classes=classes, fingerprint=digest.hexdigest(), role=role)
    return BoxedSplit(**vars(split), sizes=np.array(sizes, np.int64), objects=tuple(objects))


def read_annotation(path: Path, classes: Sequence[str], size: tuple[int, int]) -> Objects:
    """The objects of an image: VOC counts pixels from 1, and the last one belongs to the box.

    Truncated and occluded objects are objects like any other; boxes of parts (heads, hands, feet) are left out.

    Args:
        path: the XML file.
        classes: names.
        size: height and width of the image, pixels.

    Raises:
        DataError: no XML, another size than the image's, an unknown class, a box without area or that reaches outside
            of the image, a value that is no number; named by file, object and value.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path} is no XML ({error}); {AGAIN}") from error
    height, width = (_number(root, f"size/{side}", str(path)) for side in ("height", "width"))
    if [height, width] != list(size):
        raise DataError(f"{path}: size {width:g} x {height:g}, but its image has {size[1]} x {size[0]} pixels; {AGAIN}")
    boxes, labels, difficult = [], [], []
    for number, each in enumerate(root.findall("object"), start=1):
        name = (each.findtext("name") or "").strip()
        where = f"{path}: object {number} ({name})"
        if name not in classes:
            hint = nearest(name, classes) or f"there are {', '.join(classes)}"
            raise DataError(f"{path}: object {number} is of unknown class {name!r}; {hint}")
        box = [_number(each, f"bndbox/{side}", where) for side in _SIDES]
        left, top, right, bottom = box
        shown = " ".join(f"{value:g}" for value in box)
        if right < left or bottom < top:
            raise DataError(f"{where}: box {shown} ({' '.join(_SIDES)}) has no area; {AGAIN}")
        if min(left, top) < 1 or right > width or bottom > height:
            raise DataError(
                f"{where}: box {shown} ({' '.join(_SIDES)}) reaches outside of its image, pixels 1 to {width:g} and 1 "
                f"to {height:g}; {AGAIN}"
            )
        boxes.append((left - 1, top - 1, right, bottom))
        labels.append(classes.index(name))
        difficult.append(_number(each, "difficult", where, missing=0.0) != 0)
    return Objects(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), np.array(difficult, np.bool_)
    )


def _number(element: ElementTree.Element, name: str, where: str, missing: float | None = None) -> float:
    """A value as XML has it; a few boxes of VOC2012 have decimals."""
    text = element.findtext(name)
    if text is None and missing is not None:
        return missing
    try:
        value = float(text or "")
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise DataError(f"{where}: {name} is {'not there' if text is None else repr(text)}, not a number; {AGAIN}")
    return value


def _counted(split: BoxedSplit, *, easy: bool) -> NDArray[np.int64]:
    """Objects of each class, (K,); without the difficult ones if only easy ones count."""
    labels = [_labels(each, easy=easy) for each in split.objects]
    return np.bincount(np.concatenate(labels), minlength=len(split.classes))


def _few(split: BoxedSplit, count: int) -> list[int]:
    """The first rows, so many, and for each class the first row with an object of it that is not difficult."""
    easy = [_labels(each, easy=True) for each in split.objects]
    firsts = {next(row for row, labels in enumerate(easy) if k in labels) for k in range(len(split.classes))}
    return sorted(firsts | set(range(min(count, len(split)))))


def _labels(objects: Objects, *, easy: bool) -> NDArray[np.int64]:
    return objects.labels[~objects.difficult] if easy else objects.labels
