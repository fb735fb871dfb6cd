"""A Pascal VOC devkit: where the folders of the years lie, and splits of its images. Loads no torch.

Legend: N images, K classes.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from bowstore.data.file_reader import FileReader
from bowstore.evaluate.protocol import LabelledSplit

IMAGES = "JPEGImages"


def find_devkit(path: Path, year: int) -> Path:
    """The folder of one year, for example VOCdevkit/VOC2007, however a user names the devkit.

    That folder itself (whatever it is called, if it holds images), the devkit that it lies in, the folder above that
    one, or the folder of another year beside it. Nothing need be there yet: then it is where it would be looked for.
    """
    name = f"VOC{year}"
    if path.name == name:
        return path
    if re.fullmatch(r"VOC\d{4}", path.name):
        return path.with_name(name)
    if (path / IMAGES).is_dir():
        return path
    below = path / "VOCdevkit" / name
    return below if below.is_dir() else path / name


def of_files(
    paths: Sequence[Path], *, labels: NDArray[np.integer], classes: Sequence[str], fingerprint: str, role: str
) -> LabelledSplit:
    """A split of images that lie as files, in that order, with labels (N, K).

    Raises:
        OSError: a file is not there.
    """
    # Times of writing can be set back; those of change cannot, and a file that is moved there has a new one, too.
    found = [(stat.st_mtime_ns, stat.st_ctime_ns) for stat in (path.stat() for path in paths)]
    return LabelledSplit(
        open=lambda: FileReader(paths),
        rows=np.arange(len(paths)),
        labels=labels,
        classes=tuple(classes),
        fingerprint=fingerprint,
        content=xxhash.xxh3_128_hexdigest(repr([*paths, *found]).encode()),
        role=role,
    )
