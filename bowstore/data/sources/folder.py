"""Class folders: train/, val/ and test/ with a folder for each class, or class folders alone.

Reads names, sizes and times only; no image is opened here.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bowstore.data.sources.base import (
    DANGLING,
    IMAGE_SUFFIXES,
    NO_LABEL,
    SPLIT_NAMES,
    ImageFile,
    Kind,
    Options,
    Split,
    read_file,
)
from bowstore.data.sources.keys import make_keys
from bowstore.data.sources.labels import refuse_unknown
from bowstore.errors import DataError


class _File(NamedTuple):
    path: str
    size_bytes: int
    mtime_ns: int


def _recognise(source: Path) -> bool:
    """Whether there is an image in the folders that would be listed; stops at the first."""
    return source.is_dir() and any(True for name in split_folders(source) or [""] for _ in _files(source, name))


def split_folders(source: Path) -> list[str]:
    """Those of train, val and test that are folders of the source."""
    return [name for name in SPLIT_NAMES if (source / name).is_dir()]


def _list_splits(source: Path, _options: Options) -> list[Split]:
    """List the images of a folder.

    `source` holds train/, val/ and test/ (any of them); or class folders, or images, which are then the split
    train. Below a split lie class folders, of any depth inside, or images alone, which then have no labels.
    Hidden files and files without an image's extension are passed over. Labels count the class names of train
    (without train: of the first split with classes) in sorted order.

    Raises:
        DataError: no images; images beside class folders; classes that train does not have; a folder that
            cannot be read.
    """
    names = split_folders(source)
    folders = {name: list(_files(source, name)) for name in names} or {"train": list(_files(source, ""))}
    splits: list[Split] = []
    for name, files in folders.items():
        folder = source / name if names else source
        labelled = next((split for split in splits if split.classes), None)
        splits.append(_make_split(name, folder, _below(files, bool(names)), labelled))
    return splits


def _below(files: list[_File], in_split_folder: bool) -> list[tuple[str, _File]]:
    """Files in order of their paths, each with its path below the split's folder."""
    return [(file.path.partition("/")[2] if in_split_folder else file.path, file) for file in sorted(files)]


def _files(source: Path, start: str) -> Iterator[_File]:
    """Image files below `source/start`, in any order."""
    try:
        yield from _walk(source, start)
    except OSError as error:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}; make it readable") from error


def _walk(source: Path, start: str, above: tuple[str, ...] = ()) -> Iterator[_File]:
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
        refuse_unknown(str(folder), classes, labelled.name, labelled.classes)
        classes = list(labelled.classes)
    labels = {class_name: label for label, class_name in enumerate(classes)}
    keys = make_keys([path for path, _ in files])
    images = [
        ImageFile(file.path, key, labels.get(class_name, NO_LABEL), file.size_bytes, file.mtime_ns)
        for (_, file), key, class_name in zip(files, keys, class_names, strict=True)
    ]
    return Split(name, tuple(classes), images)


KIND = Kind(
    name="folder",
    expects="train/CLASS/..., val/CLASS/... or test/CLASS/...; or CLASS/... alone; or images alone, without labels",
    example="bowstore shards imagenet data/shards",
    recognise=_recognise,
    list_splits=_list_splits,
    open=lambda source: partial(read_file, source),
    general=True,
)
