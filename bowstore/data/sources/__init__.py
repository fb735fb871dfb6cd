"""Images on disk, in the layouts they come in: splits, classes, keys, in one fixed order, and their bytes.

Each kind of source is a module that recognises its layout, lists it and reads an image of it.
"""

from collections.abc import Sequence
from pathlib import Path

from bowstore.data.sources import cifar, folder, lists, miniimagenet, places, voc, webdataset
from bowstore.data.sources.base import DANGLING, NO_LABEL, ImageFile, Kind, Options, Reader, Source, Split
from bowstore.data.sources.keys import MAX_KEY_BYTES, make_keys
from bowstore.errors import DataError, MissingError, UsageError

__all__ = [
    "DANGLING",
    "FOLDER",
    "KINDS",
    "MAX_KEY_BYTES",
    "NO_LABEL",
    "ImageFile",
    "Kind",
    "Reader",
    "Source",
    "Split",
    "find_kind",
    "list_splits",
    "make_keys",
    "open_source",
]

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        folder.KIND,
        lists.KIND,
        *cifar.KINDS,
        miniimagenet.KIND,
        voc.KIND,
        places.KIND,
        webdataset.KIND,
    )
}
FOLDER = folder.KIND.name
_WITH_LABEL_FIELD = (lists.KIND.name, webdataset.KIND.name)
_HELP = "`bowstore data` shows what each kind expects"


def find_kind(source: Path, kind: str | None = None, *, listed: bool = False) -> Kind:
    """The kind of a source: the one named, or the one whose layout it has.

    Args:
        source: file or folder.
        kind: a name in `KINDS`; None to find out.
        listed: the user gave a list of images.

    Raises:
        MissingError: no such file or folder.
        UsageError: no such kind; a file of no kind.
        DataError: a folder that has no kind's layout, or several.
    """
    if not source.exists():
        raise MissingError(f"no folder {source}; name the one that holds train/ and val/, or class folders; {_HELP}")
    if kind or listed:
        name = kind or lists.KIND.name
        if name not in KINDS:
            raise UsageError(f"no kind of source {name!r}; there are {', '.join(KINDS)}")
        return KINDS[name]
    found = [kind for kind in KINDS.values() if kind.recognise(source)]
    found = [kind for kind in found if not kind.general] or found
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(kind.name for kind in found)
        raise DataError(
            f"{source} may be {names}; say which with --source {found[0].name} or --source {found[-1].name}; {_HELP}"
        )
    looked = "class folders or images, *.tar, the archives of CIFAR, the lists of MiniImageNet and Places, a VOC devkit"
    if source.is_file():
        raise UsageError(f"{source} is a file, not a folder of images; unpack it and name the folder; {_HELP}")
    raise DataError(
        f"no images in {source} (looked for {looked}); name another folder, or its kind with --source; {_HELP}"
    )


def list_splits(
    source: Path, kind: str | None = None, *, lists: Sequence[str] = (), label_field: str | None = None
) -> list[Split]:
    """List the images of a source; no image is decoded.

    Args:
        source: file or folder.
        kind: as in `find_kind`.
        lists: `FILE` or `SPLIT=FILE`, for the kind list.
        label_field: where labels are, for the kinds list and webdataset: a CSV column, a JSON key, an extension.

    Returns:
        The splits found, in the order train, val, test; each holds at least one image.

    Raises:
        UsageError: an option that the kind does not have.
        MissingError, DataError: as `find_kind` and the kind's own module.
    """
    found = find_kind(source, kind, listed=bool(lists))
    if lists and found.name != "list":
        raise UsageError(f"source {found.name} takes no --list; leave it out, or take --source list")
    if label_field and found.name not in _WITH_LABEL_FIELD:
        raise UsageError(f"source {found.name} takes no --label-field; {' and '.join(_WITH_LABEL_FIELD)} do")
    return found.list_splits(source, Options(tuple(lists), label_field))


def open_source(source: Source) -> Reader:
    """A function that returns an image's bytes; it opens nothing until called.

    The function raises DataError where the image cannot be read, or is not what was listed.
    """
    return KINDS[source.kind].open(source.path)
