"""CIFAR-10 and CIFAR-100 as published for Python: pickled batches of pixels, in an archive or extracted.

Nothing is extracted to disk. A batch's pixels become PNG, which loses nothing.

Legend: N images, D values of an image (channel, row, column).
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from bowstore.data.sources.base import ImageFile, Kind, Listing, Split, source_changed
from bowstore.data.sources.keys import make_keys
from bowstore.data.sources.packed import read_packed
from bowstore.data.sources.plain_pickle import read_plain_pickle
from bowstore.errors import CorruptError, MissingError

_SIDE = 32  # pixels
_IMAGE_BYTES = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class _Layout:
    """What the files of one data set are called.

    Attributes:
        archive: the published file.
        folder: what it extracts to.
        batches: files by split.
        meta: file with the class names.
        names: its key for them.
        labels: key of the labels in a batch.
    """

    archive: str
    folder: str
    batches: dict[str, tuple[str, ...]]
    meta: str
    names: str
    labels: str

    @property
    def files(self) -> list[str]:
        """All files that there must be."""
        return [self.meta, *chain(*self.batches.values())]


_LAYOUTS = {
    "cifar10": _Layout(
        archive="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        batches={"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
        meta="batches.meta",
        names="label_names",
        labels="labels",
    ),
    "cifar100": _Layout(
        archive="cifar-100-python.tar.gz",
        folder="cifar-100-python",
        batches={"train": ("train",), "test": ("test",)},
        meta="meta",
        names="fine_label_names",
        labels="fine_labels",
    ),
}


@dataclass(frozen=True)
class _Batch:
    """One file of pixels: uint8 (N, D), labels and file names of its images."""

    pixels_ND: "NDArray[np.uint8]"
    labels: list[int]
    names: tuple[str, ...]


def _place(source: Path, layout: _Layout) -> Path | None:
    """The folder of batches or the archive that a source means, or None."""
    for folder in (source, source / layout.folder):
        if sum((folder / name).is_file() for name in layout.files) > 1:
            return folder
    for archive in (source, source / layout.archive):
        if archive.is_file() and archive.name == layout.archive:
            return archive
    return None


def _read_files(place: Path, layout: _Layout) -> dict[str, bytes]:
    """The bytes of the layout's files that are there."""
    if place.is_dir():
        return {name: (place / name).read_bytes() for name in layout.files if (place / name).is_file()}
    return read_packed(place, [f"{layout.folder}/{name}" for name in layout.files])


class _Batches:
    """The batches of a source, loaded when first asked for; also the function that gives an image's bytes."""

    def __init__(self, source: Path, layout: _Layout) -> None:
        self._source, self._layout = source, layout

    @cached_property
    def _loaded(self) -> tuple[dict[str, _Batch], tuple[str, ...]]:
        layout = self._layout
        place = _place(self._source, layout)
        if place is None:
            raise MissingError(
                f"{self._source} is not {layout.archive} and holds neither it nor {layout.folder}; "
                "name one of them, or the folder that holds it"
            )
        files = _read_files(place, layout)
        if missing := [name for name in layout.files if name not in files]:
            raise MissingError(f"{place} has no {', '.join(missing)}; fetch it anew")
        values = {name: read_plain_pickle(files.pop(name), place / name) for name in list(files)}
        classes = _texts(values.pop(layout.meta).get(layout.names), place / layout.meta)
        return {name: _batch(value, layout, len(classes), place / name) for name, value in values.items()}, classes

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self._loaded[1]

    def __getitem__(self, name: str) -> _Batch:
        return self._loaded[0][name]

    def __call__(self, image: ImageFile) -> bytes:
        """The image as PNG."""
        row_D = self[image.container].pixels_ND[image.place]
        if _stamp(row_D) != image.stamp:
            raise source_changed(str(self._source / image.path), "has other pixels than when it was listed")
        file = io.BytesIO()
        Image.fromarray(row_D.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)).save(file, "PNG")
        return file.getvalue()


def _stamp(row_D: "NDArray[np.uint8]") -> int:
    return xxhash.xxh3_64_intdigest(row_D.tobytes())


def _texts(value: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str | bytes) for text in value):
        raise CorruptError(f"{path} has no list of names; fetch the archive anew")
    return tuple(text if isinstance(text, str) else text.decode("latin1") for text in value)


def _batch(value: dict[str, Any], layout: _Layout, classes: int, path: Path) -> _Batch:
    """A batch whose parts fit each other.

    Raises:
        CorruptError: a part that is not there, or has another form or length.
    """
    names = _texts(value.get("filenames"), path)
    pixels: Any = value.get("data")
    labels: Any = value.get(layout.labels)
    whole = getattr(pixels, "shape", None) == (len(names), _IMAGE_BYTES) and isinstance(labels, list)
    if not whole or len(labels) != len(names) or not all(type(n) is int and 0 <= n < classes for n in labels):
        raise CorruptError(
            f"{path}: pixels (data) and {layout.labels} are not those of {len(names)} images of {classes} classes; "
            "fetch the archive anew"
        )
    return _Batch(pixels, labels, names)


def _list(layout: _Layout, source: Path) -> Listing:
    """Train and test, in the order of the batches.

    Raises:
        MissingError: no archive or folder, or one without all batches.
        DataError: pickles that ask for more than arrays.
        CorruptError: a damaged archive, or batches whose parts do not fit.
    """
    batches = _Batches(source, layout)
    splits = [
        Split(split, batches.classes, _images(names, [batches[name] for name in names]))
        for split, names in layout.batches.items()
    ]
    return Listing(splits, _used(source, layout))


def _used(source: Path, layout: _Layout) -> tuple[str, ...]:
    """The files that were read, relative to the source."""
    place = _place(source, layout)
    assert place, "the batches have been read"
    read = [place / name for name in layout.files] if place.is_dir() else [place]
    return tuple(path.relative_to(source).as_posix() for path in read)


def _images(names: Sequence[str], batches: Sequence[_Batch]) -> list[ImageFile]:
    # Where a file name comes twice, the keys follow the fixed order of the archive.
    keys = iter(make_keys([name for batch in batches for name in batch.names]))
    return [
        ImageFile(f"{container}/{name}", next(keys), label, _IMAGE_BYTES, _stamp(pixels_D), container, row)
        for container, batch in zip(names, batches, strict=True)
        for row, (name, label, pixels_D) in enumerate(zip(batch.names, batch.labels, batch.pixels_ND, strict=True))
    ]


def _kind(name: str, classes: str) -> Kind:
    layout = _LAYOUTS[name]
    return Kind(
        name=name,
        expects=f"{layout.archive} or {layout.folder}/, or a folder that holds one of them; {classes}",
        example=f"bowstore shards {layout.archive} data/shards",
        recognise=lambda source: _place(source, layout) is not None,
        list_splits=lambda source, _options: _list(layout, source),
        open=lambda source: _Batches(source, layout),
    )


CIFAR10 = _kind("cifar10", "10 classes")
CIFAR100 = _kind("cifar100", "100 fine classes")
