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
    years = zip(folders, plan.years, strict=True)
    learned = [path for folder, year in years for path in _listed(folder, year, "trainval")]
    tested = _listed(folders[0], 2007, "test")
    train, test = read_boxes(learned, classes, role="train"), read_boxes(tested, classes, role="test")
    refuse_shared(train, test, str(settings.voc))
    easy_NK = np.zeros_like(test.labels)
    for row, objects in enumerate(test.objects):
        easy_NK[row, objects.labels[~objects.difficult]] = 1
    for part, what, present_NK in (
        ("trainval", "objects", train.labels),
        ("test", "objects that are not difficult", easy_NK),
    ):
        for name, present_N in zip(classes, present_NK.T, strict=True):
            if not present_N.any():
                raise DataError(f"{settings.voc}: class {name} has 0 {what} in {part}; need at least 1 of each class")
    if plan.test_images:
        few = {*range(min(plan.test_images, len(test))), *easy_NK.argmax(axis=0).tolist()}  # and each class's first
        test = read_boxes([tested[row] for row in sorted(few)], classes, role="test")
    shape = len(train), len(test), len(classes)
    return DataSets(splits={"train": train, "test": test}, view={"size": plan.test_side}, dataset=_SHAPES.get(shape))


def _listed(voc: Path, year: int, part: Part) -> list[Path]:
    """The images of a part, sorted; all of them and their annotations are there."""
    source = voc / MAIN / f"{part}.txt"
    for place in (voc / IMAGES, voc / "Annotations", source):
        if not place.exists():
            alone = "" if year == 2007 else ", or --schedule voc07 trains on VOC2007 alone (another protocol id)"
            raise MissingError(f"no {place}; {extract(year, part)}{alone}")
    images = [voc / IMAGES / f"{name}.jpg" for name in sorted(read_ids(source))]
    refuse_missing(source, "image", images)
    refuse_missing(source, "annotation", [_annotation(path) for path in images])
    return images


def _annotation(image: Path) -> Path:
    return image.parents[1] / "Annotations" / f"{image.stem}.xml"


def read_boxes(paths: Sequence[Path], classes: tuple[str, ...], *, role: str) -> BoxedSplit:
    """Images with their annotations.

    The fingerprint is over classes, ids, objects and the images' sizes in bytes.

    Args:
        paths: of the images.
        classes: names.
        role: "train" or "test".

    Raises:
        DataError: as `read_annotation`; an image that cannot be opened.
    """
    sizes, objects = [], []
    present_NK = np.zeros((len(paths), len(classes)), np.int8)
    digest = xxhash.xxh3_128(" ".join(classes).encode())
    for row, path in enumerate(paths):
        sizes.append(header_size(path))
        objects.append(read_annotation(_annotation(path), classes, sizes[row]))
        present_NK[row, objects[row].labels] = 1
        digest.update(f"{path.stem} {path.stat().st_size}".encode())
        for array in objects[row]:
            digest.update(array.tobytes())
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
