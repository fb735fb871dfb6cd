"""Walking folders: the images in them, and the count of all that became none.

Links to folders are followed. What systems make by themselves is passed over by name.
"""

import errno
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bowstore.data.sources.base import DANGLING, reading, shown
from bowstore.data.sources.names import SIGNATURE_BYTES, has_image_suffix, is_image, is_system
from bowstore.errors import DataError

SYSTEM = "hidden or system"
IMAGES = "images"
_NO_EXTENSION = "no extension"
_MAX_SUFFIXES = 5  # that the report names
_MAX_SUFFIX_LETTERS = 12


class FoundFile(NamedTuple):
    """An image file: path below the source, length in bytes or `DANGLING`, time of its last change."""

    path: str
    size_bytes: int
    mtime_ns: int


class Level(NamedTuple):
    """Names in one folder, sorted, without those of systems: folders, images, and all other files."""

    folders: list[str]
    images: list[str]
    others: list[str]


def look(folder: Path | str) -> Level:
    """What lies directly in a folder.

    Raises:
        DataError: it cannot be read.
    """
    level = Level([], [], [])
    for entry in _entries(str(folder)):
        if not is_system(entry.name):
            kind = level.folders if _is_folder(entry) else level.images if _is_image_file(entry) else level.others
            kind.append(entry.name)
    return level


def image_files(source: Path, start: str = "", above: tuple[str, ...] = ()) -> Iterator[FoundFile]:
    """Image files below `source/start`, in any order; links to nothing with an image's name are among them.

    Raises:
        DataError: a folder or a file that cannot be read, a link to a folder that holds it.
    """
    folder = os.path.join(source, start)
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(f"folder {folder} is a link to a folder that holds it; remove the link")
    for entry in _entries(folder):
        if is_system(entry.name):
            continue
        path = f"{start}/{entry.name}" if start else entry.name
        if _is_folder(entry):
            yield from image_files(source, path, (*above, real))
        elif _is_image_file(entry):
            status = entry.stat() if _is_file(entry) else None
            yield FoundFile(path, status.st_size, status.st_mtime_ns) if status else FoundFile(path, DANGLING, 0)


def holds_image(source: Path, start: str = "") -> bool:
    """Whether there is an image below `source/start`; stops at the first."""
    return next(image_files(source, start), None) is not None


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with reading(Path(folder)), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return _is_there(entry.path, entry.is_dir)


def _is_file(entry: os.DirEntry[str]) -> bool:
    return _is_there(entry.path, entry.is_file)


def _is_there(path: str, ask: Callable[[], bool]) -> bool:
    with reading(Path(path)):
        try:
            return ask()
        except OSError as error:
            if error.errno == errno.ELOOP:  # links in a circle
                return False
            raise


def _is_image_file(entry: os.DirEntry[str]) -> bool:
    """Whether a directory's entry is an image, or a link to nothing with an image's name."""
    if not _is_file(entry):
        return entry.is_symlink() and not os.path.exists(entry.path) and has_image_suffix(entry.name)
    return is_image(entry.name, lambda: _first_bytes(entry.path))


def _first_bytes(path: str) -> bytes:
    with reading(Path(path)), open(path, "rb") as file:
        return file.read(SIGNATURE_BYTES)


@dataclass
class PassedOver:
    """What lies in a source and became no image of any split.

    Attributes:
        counts: by what it is: `IMAGES`, `SYSTEM` (a folder counts once, unopened), a suffix such as ".xml", or more.
        examples: a path for each.
        complete: False where nobody looked, because the user named the images.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    complete: bool = True

    def add(self, what: str, path: str, count: int = 1) -> None:
        """Count something, with its path or name as an example."""
        if not count:
            return
        self.counts[what] += count
        self.examples.setdefault(what, path)

    def summary(self) -> str:
        """The counts in a few words, the most important first."""
        if not self.complete:
            return "only what the lists name was looked at"
        told = (IMAGES, SYSTEM, *sorted(what for what in self.counts if what[0] != "." and what != _NO_EXTENSION))
        parts = [
            f"{self.counts[what]} {what}"
            + (f" (for example {shown(self.examples[what])})" if self.examples[what] else "")
            for what in dict.fromkeys(told)
            if self.counts[what]
        ]
        rest = Counter({what: count for what, count in self.counts.items() if what not in told})
        if rest:
            kinds = [f"{what} {count}" for what, count in rest.most_common(_MAX_SUFFIXES)]
            kinds += ["..."] if len(rest) > _MAX_SUFFIXES else []
            parts.append(f"{rest.total()} files of other kinds ({', '.join(kinds)})")
        return ", ".join(parts) or "nothing"


def passed_over(source: Path, taken: Collection[str], used: Sequence[str]) -> PassedOver:
    """Count what lies in a folder and is neither an image that was taken nor a file that was read for them.

    Args:
        source: the folder; a file holds nothing but itself.
        taken: paths of images and their containers, relative to the folder.
        used: further files and folders that were read.
    """
    found = PassedOver()
    if source.is_dir():
        _count(source, "", taken, frozenset(used), found, ())
    return found


def _count(
    source: Path, start: str, taken: Collection[str], used: Collection[str], found: PassedOver, above: tuple[str, ...]
) -> None:
    folder = os.path.join(source, start)
    real = os.path.realpath(folder)
    try:
        entries = [] if real in above else _entries(folder)
    except DataError:
        found.add("folders that cannot be read", start)
        return
    for entry in entries:
        path = f"{start}/{entry.name}" if start else entry.name
        if path in taken or path in used:
            continue
        if is_system(entry.name):
            found.add(SYSTEM, path)
        elif _is_folder(entry):
            _count(source, path, taken, used, found, (*above, real))
        elif not _is_file(entry):
            found.add("links to nothing, pipes or devices", path)
        else:
            suffix = os.path.splitext(entry.name)[1].lower()
            odd = not suffix[1:].isalnum() or len(suffix) > _MAX_SUFFIX_LETTERS
            what = IMAGES if has_image_suffix(entry.name) else _NO_EXTENSION if odd else suffix
            found.add(what, path)
