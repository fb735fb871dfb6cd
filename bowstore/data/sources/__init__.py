"""Images on disk, in the layouts they come in: splits, classes, keys, in one fixed order, and their bytes.

Each kind of source is a module that recognises its layout, lists it and reads an image of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bowstore.data.sources.arrange import CLASSES, wrapped
from bowstore.data.sources.base import (
    DANGLING,
    NO_LABEL,
    Folders,
    ImageFile,
    Kind,
    Listing,
    Options,
    Reader,
    Source,
    Split,
    reading,
)
from bowstore.data.sources.keys import MAX_KEY_BYTES, make_keys
from bowstore.data.sources.walk import PassedOver, look, passed_over
from bowstore.errors import BowstoreError, DataError, MissingError, UsageError
from bowstore.plugins import Registry
from bowstore.progress import say

__all__ = [
    "DANGLING",
    "FOLDER",
    "KINDS",
    "MAX_KEY_BYTES",
    "NO_LABEL",
    "Folders",
    "ImageFile",
    "Kind",
    "Listed",
    "PassedOver",
    "Reader",
    "Source",
    "Split",
    "find_source",
    "list_source",
    "make_keys",
    "open_source",
]

FOLDER, LIST = "folder", "list"
KINDS = Registry(
    "kind of source",
    "bowstore.sources",
    Kind,
    {
        FOLDER: "bowstore.data.sources.folder:KIND",
        LIST: "bowstore.data.sources.lists:KIND",
        "imagenet": "bowstore.data.sources.imagenet:KIND",
        "kaggle": "bowstore.data.sources.kaggle:KIND",
        "tinyimagenet": "bowstore.data.sources.tinyimagenet:KIND",
        "cifar10": "bowstore.data.sources.cifar:CIFAR10",
        "cifar100": "bowstore.data.sources.cifar:CIFAR100",
        "miniimagenet": "bowstore.data.sources.miniimagenet:KIND",
        "voc": "bowstore.data.sources.voc:KIND",
        "places205": "bowstore.data.sources.places:KIND",
        "webdataset": "bowstore.data.sources.webdataset:KIND",
    },
)
_MAX_DATA_SETS = 20
_HELP = "`bowstore data` shows what each kind expects"


def find_source(
    source: Path, kind: str | None = None, *, listed: bool = False, folders: Folders | None = None
) -> Source:
    """A source of the kind named, or of the one whose layout it has; in a folder that wraps it, what is wrapped.

    Args:
        source: file or folder.
        kind: a name in `KINDS`; None to find out.
        listed: the user gave a list of images.
        folders: as in `Options`.

    Raises:
        MissingError: no such file or folder.
        UsageError: no such kind; a file of no kind.
        DataError: a folder that has no kind's layout, or several.
    """
    if not source.exists():
        raise MissingError(f"no folder {source}; name the one that holds train/ and val/, or class folders; {_HELP}")
    name = kind or (LIST if listed else None)
    kinds = [KINDS.get(name)] if name else KINDS.values()
    levels = [source] if name == LIST or folders == CLASSES else wrapped(source, folders)
    # Marks of its own count wherever they are; class folders and tars are whatever lies innermost.
    for level, general in [*((level, False) for level in levels), *((level, True) for level in levels[::-1])]:
        if found := [kind for kind in kinds if kind.general == general and kind.recognise(level)]:
            if general and not name and folders is None:
                _refuse_data_sets(level)
            if level != source:
                say(f"note: {source} holds all in one folder, {level}, which is taken as the source")
            return Source(level, _only(level, found).name)
    if name:
        return Source(source, name)
    raise _unknown(source)


def _refuse_data_sets(source: Path) -> None:
    """Refuse a folder of several data sets, of which one has marks of its own: it would be a class of the others.

    Classes are many and data sets few, so no more than a few folders are looked into.
    """
    names = look(source).folders if source.is_dir() else []
    marked = [kind for kind in KINDS.values() if not kind.general]
    for inner in [source / name for name in names] if len(names) <= _MAX_DATA_SETS else []:
        if found := [kind.name for kind in marked if kind.recognise(inner)]:
            raise DataError(
                f"{source} holds {inner.name}, a data set of kind {found[0]}, beside other images; name {inner}, or "
                f"take {source} as it is with --source {FOLDER}"
            )


def _only(source: Path, found: Sequence[Kind]) -> Kind:
    if len(found) == 1:
        return found[0]
    names = " and ".join(kind.name for kind in found)
    raise DataError(
        f"{source} may be {names}; say which with --source {found[0].name} or --source {found[-1].name}; {_HELP}"
    )


def _unknown(source: Path) -> BowstoreError:
    looked = (
        "class folders or images, *.tar, the archives of ImageNet and CIFAR, the lists of MiniImageNet and Places, "
        "a VOC devkit"
    )
    if source.is_file():
        return UsageError(f"{source} is a file, not a folder of images; unpack it and name the folder; {_HELP}")
    held = passed_over(source, (), ()).summary()
    return DataError(
        f"no images in {source} (looked for {looked}), which holds {held}; unpack what is packed, name the folder that "
        f"images or tars lie in, or its kind with --source; {_HELP}"
    )


@dataclass(frozen=True)
class Listed:
    """A source, and what it holds.

    Attributes:
        source: as a worker process opens it.
        splits: in the order train, val, test; each holds at least one image.
        passed_over: what became no image.
    """

    source: Source
    splits: list[Split]
    passed_over: PassedOver


def list_source(
    path: Path,
    kind: str | None = None,
    *,
    lists: Sequence[str] = (),
    label_field: str | None = None,
    folders: Folders | None = None,
) -> Listed:
    """List the images of a source, and count what is none; no image is decoded.

    Args:
        path: file or folder.
        kind: as in `find_source`.
        lists: `FILE` or `SPLIT=FILE`, for the kind list.
        label_field: where labels are, for the kinds list and webdataset: a CSV column, a JSON key, an extension.
        folders: as in `Options`.

    Raises:
        UsageError: an option that the kind does not have.
        MissingError, DataError: as `find_source` and the kind's own module.
    """
    with reading(path):
        source = find_source(path, kind, listed=bool(lists), folders=folders)
    found = KINDS.get(source.kind)
    if lists and found.name != LIST:
        raise UsageError(f"source {found.name} takes no --list; leave it out, or take --source {LIST}")
    for option, given, takers in (
        ("--label-field", label_field, [kind.name for kind in KINDS.values() if kind.label_field]),
        ("--folders", folders, [kind.name for kind in KINDS.values() if kind.folders]),
    ):
        if given and found.name not in takers:
            raise UsageError(f"source {found.name} takes no {option}; {' and '.join(takers)} do")
    with reading(path):
        listing = found.list_splits(source.path, Options(tuple(lists), label_field, folders, named=bool(kind)))
    return Listed(source, listing.splits, _passed_over(path, source, listing))


def _passed_over(path: Path, source: Source, listing: Listing) -> PassedOver:
    """What lies below the path that the user named, and is none of the listing."""
    if KINDS.get(source.kind).by_choice:
        return PassedOver(complete=False)
    below = "" if source.path == path else f"{source.path.relative_to(path).as_posix()}/"
    taken = {f"{below}{image.container or image.path}" for split in listing.splits for image in split.images}
    found = passed_over(path, taken, [f"{below}{name}" for name in listing.used])
    for what, count in listing.passed_over.items():
        found.add(what, "", count)
    return found


def open_source(source: Source) -> Reader:
    """A function that returns an image's bytes; it opens nothing until called.

    The function raises DataError where the image cannot be read, or is not what was listed.
    """
    return KINDS.get(source.kind).open(source.path)
