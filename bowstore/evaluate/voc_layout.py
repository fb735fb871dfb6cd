"""A Pascal VOC devkit: where the folders of the years lie, its lists, and splits of its images. Loads no torch.

Legend: N images, K classes.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from bowstore.data.file_reader import FileReader
from bowstore.data.images import FORMATS
from bowstore.data.sources.listing import read_list
from bowstore.errors import DataError, MismatchError, MissingError, is_machine_error
from bowstore.evaluate.protocol import LabelledSplit

IMAGES = "JPEGImages"
MAIN = "ImageSets/Main"
AGAIN = "correct it, or extract the devkit again"
_ARCHIVES = {
    (2007, "trainval"): "VOCtrainval_06-Nov-2007.tar",
    (2007, "test"): "VOCtest_06-Nov-2007.tar",
    (2012, "trainval"): "VOCtrainval_11-May-2012.tar",
}


def find_devkit(path: Path, year: int) -> Path:
    """The folder of one year, for example VOCdevkit/VOC2007, however a user names the devkit.

    That folder itself (whatever it is called, if it holds images), the devkit that it lies in, the folder above that
    one, or the folder of another year beside it. Nothing need be there yet: then it is where it would be looked for.
    """
    name = f"VOC{year}"
    for below in (path / "VOCdevkit" / name, path / name):
        if below.is_dir():
            return below
    path = path if path.name else Path.cwd()  # as "." is given
    if re.fullmatch(r"VOC\d{4}", path.name):
        return path.with_name(name)
    return path if (path / IMAGES).is_dir() else path / name


def extract(year: int, part: str) -> str:
    """What to do where files of a part are not there."""
    return f"extract {_ARCHIVES[year, part]} into the same devkit"


def class_lists(voc: Path, part: str) -> dict[str, Path]:
    """The list of each class in VOC2007's folder, by the class's name, sorted.

    Raises:
        MissingError: a folder is not there, or no list.
    """
    for folder in (voc / IMAGES, voc / MAIN):
        if not folder.is_dir():
            raise MissingError(f"no folder {folder}; name the devkit (VOCdevkit) or its folder VOCdevkit/VOC2007")
    paths = sorted((voc / MAIN).glob(f"[!.]*_{part}.txt"))
    if not paths:
        raise MissingError(f"no <class>_{part}.txt in {voc / MAIN}; {extract(2007, part)}")
    return {path.name.removesuffix(f"_{part}.txt"): path for path in paths}


def read_ids(path: Path) -> tuple[str, ...]:
    """The images that a list names, in its order: ids, or the files of an image and its mask.

    Raises:
        DataError: an image is listed twice; as `listing.read_list`.
    """
    ids = tuple(Path(entry.path).name.removesuffix(".jpg") for entry in read_list(path))
    (first, times), *_ = Counter(ids).most_common(1)
    if times > 1:
        raise DataError(f"{path}: image {first} is listed {times} times; name each image once")
    return ids


def refuse_missing(source: Path, what: str, paths: Sequence[Path], remedy: str = "extract the devkit again") -> None:
    """Refuse a list whose images, masks or annotations are not all there.

    Raises:
        MissingError: names list and file.
    """
    if absent := [path for path in paths if not path.is_file()]:
        raise MissingError(f"{source}: no {what} {absent[0]} ({len(absent)} of {len(paths)} are missing); {remedy}")


def header_size(path: Path) -> tuple[int, int]:
    """Height and width of an image from its header: as it lies in the file, without EXIF rotation.

    Raises:
        DataError: an image that cannot be opened.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.height, image.width
    except Exception as error:  # damaged headers end in errors of any kind
        if is_machine_error(error):
            raise
        raise DataError(f"image {path} cannot be opened ({' '.join(str(error).split())}); {AGAIN}") from error


@dataclass(frozen=True, kw_only=True)
class FileSplit(LabelledSplit):
    """Images that lie as files.

    Attributes:
        paths: in the order of the rows.
    """

    paths: tuple[Path, ...]


def of_files(
    paths: Sequence[Path], *, labels: NDArray[np.integer], classes: Sequence[str], fingerprint: str, role: str
) -> FileSplit:
    """A split of images that lie as files, in that order, with labels (N, K).

    Raises:
        OSError: a file is not there.
    """
    # Times of writing can be set back; those of change cannot, and a file that is moved there has a new one, too.
    found = [(stat.st_mtime_ns, stat.st_ctime_ns) for stat in (path.stat() for path in paths)]
    return FileSplit(
        open=lambda: FileReader(paths),
        rows=np.arange(len(paths)),
        labels=labels,
        classes=tuple(classes),
        fingerprint=fingerprint,
        content=xxhash.xxh3_128_hexdigest(repr([*paths, *found]).encode()),
        role=role,
        paths=tuple(paths),
    )


def refuse_shared(train: FileSplit, test: FileSplit, where: str) -> None:
    """Refuse images that are both trained and tested on.

    Raises:
        MismatchError: names the first.
    """
    if shared := set(train.paths) & set(test.paths):
        raise MismatchError(
            f"{where}: {len(shared)} images are in the lists of both train and test (first: {min(shared).stem}); take "
            "them out of one, or extract the devkit again"
        )
