"""A Pascal VOC devkit: its images, split by ImageSets/Main, without labels.

An image holds objects of several classes, so there is no single label; `bowstore.evaluate.voc` reads the devkit's
own lists of classes.
"""

from pathlib import Path

from bowstore.data.sources.base import Kind, Listing, Options, some
from bowstore.data.sources.labels import finish_splits
from bowstore.data.sources.listing import Entry, find_files, read_list
from bowstore.errors import DataError, MissingError

_IMAGES, _LISTS = "JPEGImages", "ImageSets/Main"
_SPLITS = {"train": "trainval", "test": "test"}


def _years(source: Path) -> list[Path]:
    """Folders of the devkit that hold images and lists: the source itself, or some below it."""
    below = [source, *sorted(source.glob("VOC2*")), *sorted(source.glob("VOCdevkit/VOC2*"))]
    return [folder for folder in below if (folder / _IMAGES).is_dir() and (folder / _LISTS).is_dir()]


def _list_splits(source: Path, _options: Options) -> Listing:
    """List trainval as train, and test where the devkit has it.

    Raises:
        MissingError: no devkit, or one without lists.
        DataError: devkits of several years; as `listing.read_list` and `listing.find_files`.
    """
    years = _years(source)
    if not years:
        raise MissingError(f"{source} holds no {_IMAGES} and {_LISTS}; name the folder VOCdevkit/VOC2007 of the devkit")
    if len(years) > 1:
        raise DataError(f"{source} holds {len(years)} devkits: {some(years)}; name the one to take")
    (folder,) = years
    below = str((folder / _IMAGES).relative_to(source))
    drafts = {}
    for split, name in _SPLITS.items():
        path = folder / _LISTS / f"{name}.txt"
        if path.is_file():
            images = [Entry(entry.number, f"{entry.path}.jpg", "") for entry in read_list(path)]
            drafts[split] = find_files(images, source=source, below=below, listed_in=path, split=split)
    if not drafts:
        raise MissingError(f"no trainval.txt and no test.txt in {folder / _LISTS}; extract the devkit again")
    used = tuple((folder / _LISTS / f"{_SPLITS[split]}.txt").relative_to(source).as_posix() for split in drafts)
    return Listing(finish_splits(drafts, where=folder), used)


KIND = Kind(
    name="voc",
    expects="VOCdevkit/VOC2007, or a folder that holds it, with JPEGImages and ImageSets/Main: trainval.txt becomes "
    "train, test.txt test, without labels",
    example="bowstore shards VOCdevkit/VOC2007 data/shards",
    recognise=lambda source: bool(_years(source)),
    list_splits=_list_splits,
)
