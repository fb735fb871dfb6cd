"""ImageNet as Kaggle gives it out: ILSVRC/Data/CLS-LOC with train by class and val flat, and tables beside."""

from pathlib import Path

from bowstore.data.sources.base import SPLIT_NAMES, Kind, Listing, Options
from bowstore.data.sources.synsets import read_names, read_solution
from bowstore.data.sources.wnids import above, add_splits, finish
from bowstore.errors import MissingError

SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_IMAGES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")


def _images(source: Path) -> str | None:
    """The folder of train/ and val/ below the source."""
    return next((below for below in _IMAGES if any((source / below / split).is_dir() for split in SPLIT_NAMES)), None)


def _list_splits(source: Path, _options: Options) -> Listing:
    """List train, val and test; test has no labels.

    Raises:
        MissingError: no images; a flat val without the table of its labels.
        DataError: as `wnids` and `synsets`.
    """
    below = _images(source)
    if below is None:
        raise MissingError(
            f"{source} has no {_IMAGES[0]} with train, val or test in it; extract Kaggle's archive there"
        )
    used = [name for name in (SOLUTION, MAPPING) if (source / name).is_file()]
    truth = read_solution(source / SOLUTION) if SOLUTION in used else None
    synsets = read_names(source / MAPPING) if MAPPING in used else None
    remedy = above(source, SOLUTION) or "fetch it from Kaggle (imagenet-object-localization-challenge)"
    found = add_splits(source, f"{below}/", truth, no_truth=f"{SOLUTION}, which is not in {source}; {remedy}")
    return Listing(finish(found, synsets, source), tuple(used))


KIND = Kind(
    name="kaggle",
    expects="ImageNet from Kaggle: ILSVRC/Data/CLS-LOC/ with train/WNID/, val/ and test/, and LOC_val_solution.csv "
    "(LOC_synset_mapping.txt, too, for the names of classes) beside ILSVRC/",
    example="bowstore shards imagenet-object-localization-challenge data/shards",
    recognise=lambda source: _images(source) is not None,
    list_splits=_list_splits,
)
