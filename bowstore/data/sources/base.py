"""What all kinds of sources share: an image where it lies, a split, and what a kind must be able to do."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import xxhash

from bowstore.errors import BowstoreError, DataError, MissingError
from bowstore.files import check_plain_file
from bowstore.plugins import Plugin

SPLIT_NAMES = ("train", "val", "test")
NO_LABEL = -1
LABEL_FIELDS = ("label", "cls", "class", "target")  # of JSON beside an image, where no other is asked for
DANGLING = -1  # size of a link to a file that is not there
NO_LABEL_FIELD = "none"  # what --label-field says to leave all images without labels
EXAMPLES = 3  # how many cases a message names
Folders = Literal["classes", "splits"]  # what --folders says that the folders of a source are


class ImageFile(NamedTuple):
    """One image on disk: a file of its own, or a part of a container (a tar, a CIFAR batch).

    Attributes:
        path: relative to the source, with forward slashes; in a container, the container's path and the name inside.
        key: the sample's key; unique within its split.
        label: place in the class list, or `NO_LABEL`.
        size_bytes: length of the image as it lies there, or `DANGLING`.
        stamp: when the file or the container last changed, nanoseconds; for CIFAR a digest of the pixels.
        container: path of the container relative to the source; empty for a file of its own.
        place: where in the container: first byte in a tar, row in a batch.
    """

    path: str
    key: str
    label: int
    size_bytes: int
    stamp: int
    container: str = ""
    place: int = 0


Reader: TypeAlias = Callable[[ImageFile], bytes]


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Attributes:
        name: train, val or test.
        classes: class names in label order; empty where images have no labels, or numbers without names.
        images: in one fixed order.
        bare_folders: folders that might be classes, were there an image in them; they have no label.
        class_names: what people call the classes, in label order; empty where the source does not say.
    """

    name: str
    classes: tuple[str, ...]
    images: Sequence[ImageFile]
    bare_folders: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Length of all images together."""
        return sum(max(image.size_bytes, 0) for image in self.images)

    def classes_without_images(self) -> list[str]:
        """Names of the classes, and of the folders that might be classes, in which this split has no image."""
        present = {image.label for image in self.images}
        return sorted([*self.bare_folders, *(name for n, name in enumerate(self.classes) if n not in present)])

    def listing_digest(self) -> str:
        """32 hex digits over all paths, sizes and stamps: equal means that no file came, went or changed."""
        digest = xxhash.xxh3_128()
        for image in self.images:
            digest.update(os.fsencode(f"{image.path}\0{image.size_bytes} {image.stamp}\n"))
        return digest.hexdigest()

    def label_digest(self) -> str:
        """32 hex digits over all keys and labels; a list or a label field may change them and no file."""
        digest = xxhash.xxh3_128()
        for image in self.images:
            digest.update(f"{image.key} {image.label}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Options:
    """What a user may say about a source.

    Attributes:
        lists: `FILE` or `SPLIT=FILE`, for the kind `list`.
        label_field: column, JSON key or tar extension that holds the label; None for the usual names;
            `NO_LABEL_FIELD` for no labels.
        folders: what folders are that could be classes or splits; None where the user did not say.
        named: the user named the kind.
    """

    lists: tuple[str, ...] = ()
    label_field: str | None = None
    folders: Folders | None = None
    named: bool = False

    @property
    def unlabelled(self) -> bool:
        """Whether all images shall come without labels, whatever is written."""
        return self.label_field == NO_LABEL_FIELD


@dataclass(frozen=True)
class Listing:
    """What a kind finds in a source.

    Attributes:
        splits: in the order train, val, test, each with an image.
        used: files and folders, relative to the source, that were read beside images and their containers: lists,
            names, labels.
        passed_over: how many members of containers became no image, by what they are.
    """

    splits: list[Split]
    used: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind(Plugin):
    """One layout that images come in.

    Attributes:
        name: what `--source` calls it.
        expects: what must lie on disk, in one line.
        example: a command.
        recognise: whether a path has this layout; looks at names and first bytes only.
        list_splits: what a path of this layout holds.
        open: makes the function that returns an image's bytes, and does nothing else; by default it reads files and
            members of tars.
        general: recognised by what other kinds have too; gives way to a kind that is recognised by marks of its own.
        by_choice: takes what the user names, so that nothing is said of all else that lies there.
        folders: takes `Options.folders`.
        label_field: takes `Options.label_field`.
    """

    expects: str
    example: str
    recognise: Callable[[Path], bool]
    list_splits: Callable[[Path, Options], Listing]
    open: Callable[[Path], Reader] = lambda source: partial(read_image, source)
    general: bool = False
    by_choice: bool = False
    folders: bool = False
    label_field: bool = False


@dataclass(frozen=True)
class Source:
    """A listed source, as a worker process opens it."""

    path: Path
    kind: str


def shown(name: str) -> str:
    """A name as a terminal can show it in one line: line breaks, and bytes that are not UTF-8, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def some(cases: Sequence[object]) -> str:
    """The first few cases, for a message."""
    return ", ".join(shown(str(case)) for case in cases[:EXAMPLES]) + (", ..." if len(cases) > EXAMPLES else "")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file of whatever the machine cannot read in the block; `path` where the error does not say.

    Raises:
        MissingError: for a file that is not there.
        DataError: for any other OSError that is not bowstore's own.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, BowstoreError):
            raise
        where = error.filename or path
        if isinstance(error, FileNotFoundError):
            raise MissingError(f"{where} is not there; bring it there, or name another") from error
        raise DataError(f"cannot read {where}: {error.strerror or error}; make it readable, or move it away") from error


def read_image(source: Path, image: ImageFile) -> bytes:
    """Bytes of an image that is a file of its own, or a member of a tar.

    Args:
        source: the tar, or the folder that the image's path or container is relative to.
        image: what was listed.

    Raises:
        DataError: it cannot be read, or changed after it was listed.
    """
    path = source if source.is_file() else source / (image.container or image.path)
    check_plain_file(path)
    with reading(path), open(path, "rb") as file:
        stamp = os.fstat(file.fileno()).st_mtime_ns
        file.seek(image.place)
        data = file.read(image.size_bytes)
    if stamp != image.stamp or len(data) != image.size_bytes:
        raise source_changed(str(path), "changed after it was listed")
    return data


def source_changed(path: str, how: str) -> DataError:
    """The error for an image that is not what was listed."""
    return DataError(f"{path} {how}: the source is changing; run again, with another OUT, once it is at rest")
