"""Where the folders of the years lie in a Pascal VOC devkit. Loads no torch."""

import re
from pathlib import Path

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
