"""MiniImageNet: a folder of images and a CSV for each split, whose classes differ (Ravi and Larochelle, 2017)."""

from itertools import combinations
from pathlib import Path

from bowstore.data.sources.base import SPLIT_NAMES, Kind, Listing, Options, some
from bowstore.data.sources.labels import finish_splits
from bowstore.data.sources.listing import find_files, read_list
from bowstore.errors import DataError, MissingError

_IMAGES = "images"


def _recognise(source: Path) -> bool:
    return (source / _IMAGES).is_dir() and all((source / f"{name}.csv").is_file() for name in SPLIT_NAMES)


def _list_splits(source: Path, _options: Options) -> Listing:
    """List the three splits; each numbers its own classes, in sorted order (64, 16 and 20 in the paper).

    Raises:
        MissingError: no images/, or not all three CSVs.
        DataError: as `listing.read_list` and `listing.find_files`, or a class that two splits share.
    """
    missing = [name for name in (_IMAGES, *(f"{split}.csv" for split in SPLIT_NAMES)) if not (source / name).exists()]
    if missing:
        raise MissingError(
            f"{source} has no {', '.join(missing)}; MiniImageNet is images/ with train.csv, val.csv and test.csv beside"
        )
    drafts = {}
    for split in SPLIT_NAMES:
        path = source / f"{split}.csv"
        drafts[split] = find_files(read_list(path), source=source, below=_IMAGES, listed_in=path, split=split)
    splits = finish_splits(drafts, where=source, own_classes=True)
    for one, other in combinations(splits, 2):
        if shared := sorted(set(one.classes) & set(other.classes)):
            raise DataError(
                f"{source}: {len(shared)} classes are in both {one.name} and {other.name}: {some(shared)}; the splits "
                "of MiniImageNet share none, so take --source list with --list train=train.csv --list val=val.csv ..."
            )
    return Listing(splits, used=tuple(f"{split}.csv" for split in SPLIT_NAMES))


KIND = Kind(
    name="miniimagenet",
    expects="images/ with train.csv, val.csv and test.csv beside it (filename,label); each split has its own classes",
    example="bowstore shards mini-imagenet data/shards",
    recognise=_recognise,
    list_splits=_list_splits,
)
