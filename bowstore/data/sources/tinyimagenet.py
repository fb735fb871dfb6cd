"""Tiny-ImageNet: train/WNID/images, and a flat val/images with a table; wnids.txt and words.txt name the classes."""

from pathlib import Path

from bowstore.data.sources.base import SPLIT_NAMES, Kind, Listing, Options
from bowstore.data.sources.synsets import read_annotations, read_names
from bowstore.data.sources.wnids import add_splits, finish
from bowstore.errors import MissingError

_ANNOTATIONS, _WNIDS, _WORDS = "val/val_annotations.txt", "wnids.txt", "words.txt"


def _recognise(source: Path) -> bool:
    marks = (source / name for name in (_ANNOTATIONS, _WNIDS))
    return any((source / split).is_dir() for split in SPLIT_NAMES) and any(mark.is_file() for mark in marks)


def _list_splits(source: Path, _options: Options) -> Listing:
    """List train, val and test; test has no labels. Boxes are not read.

    Raises:
        MissingError: no split; a flat val without the table of its labels.
        DataError: as `wnids` and `synsets`.
    """
    used = [name for name in (_ANNOTATIONS, _WNIDS, _WORDS) if (source / name).is_file()]
    truth = read_annotations(source / _ANNOTATIONS) if _ANNOTATIONS in used else None
    synsets = read_names(source / _WORDS, source / _WNIDS) if _WNIDS in used else None
    if not any((source / split).is_dir() for split in SPLIT_NAMES):
        raise MissingError(f"{source} has no train, val or test; extract tiny-imagenet-200.zip again")
    no_truth = f"{_ANNOTATIONS}, which is not in {source}; extract tiny-imagenet-200.zip again"
    found = add_splits(source, "", truth, no_truth=no_truth)
    return Listing(finish(found, synsets, source), tuple(used))


KIND = Kind(
    name="tinyimagenet",
    expects="tiny-imagenet-200/ with train/WNID/images/, val/images/ and val/val_annotations.txt, wnids.txt and "
    "words.txt; test has no labels",
    example="bowstore shards tiny-imagenet-200 data/shards",
    recognise=_recognise,
    list_splits=_list_splits,
)
