"""Places205, and Places365 by its standard lists: `path label` lines, the images in a folder tree below."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from bowstore.data.sources.base import Kind, Listing, Options
from bowstore.data.sources.labels import Draft, finish_splits
from bowstore.data.sources.listing import Entry, find_files, read_list
from bowstore.errors import DataError, MissingError

_LISTS = {
    "Places205": {"train": "train_places205.csv", "val": "val_places205.csv"},
    "Places365": {"train": "places365_train_standard.txt", "val": "places365_val.txt"},
}
_LIST_FOLDERS = ("", "trainvalsplit_places205")
# Where the archives put the images, and where torchvision does.
_IMAGE_FOLDERS = (
    "data/vision/torralba/deeplearning/images256",
    "images256",
    "data_256_standard",
    "data_large_standard",
    "data_256",
    "data_large",
    "val_256",
    "val_large",
    "",
)


def _find_lists(source: Path) -> dict[str, dict[str, Path]]:
    """The lists that are there, by data set and split."""
    found = {
        name: {
            split: path
            for split, file in lists.items()
            for folder in _LIST_FOLDERS
            if (path := source / folder / file).is_file()
        }
        for name, lists in _LISTS.items()
    }
    return {name: lists for name, lists in found.items() if lists}


def _list_splits(source: Path, _options: Options) -> Listing:
    """List train and val; classes are the folders of train's images (for example a/abbey) where those fit the labels.

    Raises:
        MissingError: no list, or no folder with the images.
        DataError: lists of both data sets; as `listing.read_list` and `listing.find_files`.
    """
    found = _find_lists(source)
    if not found:
        names = ", ".join(chain.from_iterable(lists.values() for lists in _LISTS.values()))
        raise MissingError(f"{source} has none of the lists {names}; bring the one for your images there")
    if len(found) > 1:
        raise DataError(f"{source} has the lists of {' and '.join(found)}; take those of one away")
    (lists,) = found.values()
    drafts = {}
    for split, path in lists.items():
        # Places365's lists begin paths with a slash, and mean the folder of images by it.
        entries = [entry._replace(path=entry.path.lstrip("/"), whole="") for entry in read_list(path)]
        below = _image_folder(source, entries, path)
        drafts[split] = find_files(entries, source=source, below=below, listed_in=path, split=split)
    splits = finish_splits(drafts, where=source)
    classes = _class_names(drafts["train"]) if "train" in drafts else ()
    used = tuple(path.relative_to(source).as_posix() for path in lists.values())
    return Listing([replace(split, classes=classes) for split in splits], used)


def _image_folder(source: Path, entries: Sequence[Entry], path: Path) -> str:
    """The folder that holds the list's first image."""
    for folder in _IMAGE_FOLDERS:
        if (source / folder / entries[0].path).is_file():
            return folder
    looked = ", ".join(folder or "the folder itself" for folder in _IMAGE_FOLDERS)
    raise MissingError(
        f"list {path}: image {entries[0].path} of line {entries[0].number} is in none of the folders of {source} "
        f"that hold images ({looked}); extract the images there"
    )


def _class_names(drafts: Sequence[Draft]) -> tuple[str, ...]:
    """Folders of the images in label order, if each label has one folder for itself and none is left out."""
    folders = {(int(draft.label), draft.name.rpartition("/")[0]) for draft in drafts if draft.label.isdecimal()}
    labels, names = zip(*sorted(folders), strict=True) if folders else ((), ())
    fits = labels == tuple(range(len(labels))) and len(set(names)) == len(names) and all(names)
    return names if fits else ()


KIND = Kind(
    name="places205",
    expects="train_places205.csv and val_places205.csv, or trainvalsplit_places205/ with them; images in images256/ or "
    "data/vision/torralba/deeplearning/images256/; also Places365 with places365_train_standard.txt, places365_val.txt",
    example="bowstore shards places205 data/shards",
    recognise=lambda source: bool(_find_lists(source)),
    list_splits=_list_splits,
)
