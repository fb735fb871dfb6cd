"""Folders of images on disk: splits, classes, keys, in one fixed order.

Reads names, sizes and times only; no image is opened here.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from bowstore.errors import DataError, MissingError, UsageError

SPLIT_NAMES = ("train", "val", "test")
# The last two are none that Pillow reads; they are listed so that they end in quarantine and not unseen.
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm"
    " .jp2 .j2k .avif .heic .heif".split()
)
NO_LABEL = -1
DANGLING = -1  # size of a link to a file that is not there
# A member's name has 100 bytes in USTAR; ".webp" and ".jpeg" are the longest extensions.
MAX_KEY_BYTES = 95
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_+=,@~-]+")


class ImageFile(NamedTuple):
    """One image on disk.

    Attributes:
        path: relative to the source folder, with forward slashes.
        key: the sample's key; unique within its split.
        label: place in the class list, or `NO_LABEL`.
        size_bytes: length of the file, or `DANGLING`.
        mtime_ns: when it last changed, nanoseconds.
    """

    path: str
    key: str
    label: int
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Attributes:
        name: train, val or test.
        classes: class names in label order; empty where images have no labels.
        images: sorted by path.
    """

    name: str
    classes: tuple[str, ...]
    images: Sequence[ImageFile]

    @property
    def size_bytes(self) -> int:
        """Length of all files together."""
        return sum(max(image.size_bytes, 0) for image in self.images)

    def listing_digest(self) -> str:
        """32 hex digits over all paths, sizes and times: equal means that no file came, went or changed."""
        digest = xxhash.xxh3_128()
        for image in self.images:
            digest.update(os.fsencode(f"{image.path}\0{image.size_bytes} {image.mtime_ns}\n"))
        return digest.hexdigest()


class _File(NamedTuple):
    path: str
    size_bytes: int
    mtime_ns: int


def list_splits(source: Path) -> list[Split]:
    """List the images of a folder.

    `source` holds train/, val/ and test/ (any of them); or class folders, or images, which are then the split
    train. Below a split lie class folders, of any depth inside, or images alone, which then have no labels.
    Hidden files and files without an image's extension are passed over. Labels count the class names of train
    (without train: of the first split with classes) in sorted order.

    Returns:
        The splits found, in the order train, val, test; each holds at least one image.

    Raises:
        MissingError: no such folder.
        UsageError: `source` is a file.
        DataError: no images; images beside class folders; classes that train does not have; a folder that
            cannot be read.
    """
    if not source.exists():
        raise MissingError(f"no folder {source}; name the one that holds train/ and val/, or class folders")
    if not source.is_dir():
        raise UsageError(f"{source} is a file, not a folder of images; unpack it and name the folder")
    names = [name for name in SPLIT_NAMES if (source / name).is_dir()]
    try:
        folders = {name: list(_walk(source, name)) for name in names} or {"train": list(_walk(source, ""))}
    except OSError as error:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}; make it readable") from error
    splits: list[Split] = []
    for name, files in folders.items():
        folder = source / name if names else source
        labelled = next((split for split in splits if split.classes), None)
        splits.append(_make_split(name, folder, _below(files, bool(names)), labelled))
    return splits


def _below(files: list[_File], in_split_folder: bool) -> list[tuple[str, _File]]:
    """Files in order of their paths, each with its path below the split's folder."""
    return [(file.path.partition("/")[2] if in_split_folder else file.path, file) for file in sorted(files)]


def _walk(source: Path, start: str, above: tuple[str, ...] = ()) -> Iterator[_File]:
    """Image files below `source/start`, in any order."""
    folder = os.path.join(source, start)
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(f"folder {folder} is a link to a folder that holds it; remove the link")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{start}/{entry.name}" if start else entry.name
            if entry.is_dir():
                yield from _walk(source, path, (*above, real))
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                if entry.is_file():
                    status = entry.stat()
                    yield _File(path, status.st_size, status.st_mtime_ns)
                elif entry.is_symlink():
                    yield _File(path, DANGLING, 0)


def _make_split(name: str, folder: Path, files: Sequence[tuple[str, _File]], labelled: Split | None) -> Split:
    """Label and name the files of one split; `labelled` is an earlier split whose classes bind, if any."""
    if not files:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"no images in {folder} (looked for {suffixes}); fill it, or name another folder")
    class_names = [path.partition("/")[0] if "/" in path else "" for path, _ in files]
    classes = sorted(set(class_names) - {""})
    if classes and "" in class_names:
        beside = [path for path, _ in files if "/" not in path]
        raise DataError(
            f"{len(beside)} images lie beside the class folders of {folder}, for example {beside[0]}; "
            "move them into a class folder or away"
        )
    if classes and labelled:
        _refuse_unknown(folder, classes, labelled.name, labelled.classes)
        classes = list(labelled.classes)
    labels = {class_name: label for label, class_name in enumerate(classes)}
    keys = make_keys([path for path, _ in files])
    images = [
        ImageFile(file.path, key, labels.get(class_name, NO_LABEL), file.size_bytes, file.mtime_ns)
        for (_, file), key, class_name in zip(files, keys, class_names, strict=True)
    ]
    return Split(name, tuple(classes), images)


def _refuse_unknown(folder: Path, found: Sequence[str], reference: str, known: Sequence[str]) -> None:
    unknown = sorted(set(found) - set(known))
    if unknown:
        more = ", ..." if len(unknown) > 5 else ""
        names = ", ".join(unknown[:5])
        raise DataError(
            f"{folder} has {len(unknown)} classes that {reference} does not have: {names}{more}; "
            "all splits must share one class list, so rename or remove them"
        )


def make_keys(paths: Sequence[str]) -> list[str]:
    """Keys of image files, in the order given; the owner of the rule for names in shards.

    A key is the path without its extension, with everything but ASCII letters, digits and a few marks replaced
    by "_". Where that loses something (a mark was replaced, two paths come out the same, more than
    `MAX_KEY_BYTES` bytes were cut), a hash of the path stands behind. So a key depends on its path alone but for
    twins such as a.jpg and a.png, and when one twin is removed the other's key is new, never the lost one's.

    Args:
        paths: relative to the split's folder, each with an extension.

    Returns:
        Unique keys without dots and white space, at most `MAX_KEY_BYTES` bytes each.
    """
    stems = [path.rpartition(".")[0] for path in paths]
    plain = [_plain_key(stem) for stem in stems]
    often = Counter(plain)
    used: set[str] = set()
    keys = []
    for path, stem, key in zip(paths, stems, plain, strict=True):
        if key != stem or often[key] > 1 or len(key) > MAX_KEY_BYTES:
            salt, candidate = path, _with_hash(key, path)
            while candidate in used or candidate in often:
                salt += "'"
                candidate = _with_hash(key, salt)
            key = candidate
        used.add(key)
        keys.append(key)
    return keys


def _plain_key(stem: str) -> str:
    # webdataset passes over names that begin and end with two underscores.
    return "/".join(_NOT_IN_KEYS.sub("_", part).lstrip("_") or "x" for part in stem.split("/"))


def _with_hash(key: str, salt: str) -> str:
    digits = 16
    return f"{key[: MAX_KEY_BYTES - digits - 1]}-{xxhash.xxh3_64_hexdigest(os.fsencode(salt))[:digits]}"
