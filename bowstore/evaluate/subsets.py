"""A part of the train images: those that a file lists by name, or a seeded sample of each class.

Legend: N images of a split, K classes.
"""

from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from bowstore.data.index import Index
from bowstore.data.sources.keys import make_keys
from bowstore.errors import DataError
from bowstore.evaluate.classes import read_lines
from bowstore.evaluate.protocol import LabelledSplit

_EXAMPLE = "n01440764_10026.JPEG"
_SAMPLE = 3  # the stream of Philox that a sample is drawn from, behind those of a run's plan


def listed(split: LabelledSplit, path: Path, where: str) -> LabelledSplit:
    """The images of a split that a file names, a file name a line, in the order of the split.

    A name is that of the image's file; with folders before it, as many as one likes, where classes have files of one
    name.

    Args:
        split: labelled images of shards.
        path: the file; empty lines and those that begin with # do not count.
        where: what messages call the split.

    Raises:
        DataError: names that no image has, or that several have; a name twice; no names.
    """
    names = read_lines(path, f"an image's name, as in {_EXAMPLE},")
    if not names:
        raise DataError(f"{path} lists no image; name a file with an image's name a line, as in {_EXAMPLE}")
    assert split.index is not None, "the images lie in shards"
    places = _places(split.index, split.rows, names)
    if absent := [name for name in names if not places[name]]:
        raise DataError(
            f"{path}: {len(absent)} of {len(names)} names are not in {where} (first: {absent[0]}); a name is that of "
            f"the image's file, as in {_EXAMPLE}: list others, or name the shards that have them as train"
        )
    if double := [name for name in names if len(places[name]) > 1]:
        keys = " and ".join(split.index.key(int(split.rows[place])) for place in places[double[0]][:2])
        raise DataError(
            f"{path}: {len(double)} of {len(names)} names are those of several images of {where} (first: {double[0]}, "
            f"of {keys}); write their folders before them"
        )
    place_N, first_N = np.unique([places[name][0] for name in names], return_index=True)
    if twice := sorted(set(range(len(names))) - set(first_N.tolist())):  # by the image: it may have several spellings
        raise DataError(
            f"{path} lists {len(twice)} of {len(names)} images twice (first: {names[twice[0]]}); list each once"
        )
    return _part(split, place_N)


def _places(index: Index, rows: NDArray[np.int64], names: tuple[str, ...]) -> dict[str, list[int]]:
    """Where in the rows the images of each name are."""
    wanted: dict[str, list[tuple[str, str]]] = {}  # by the last part of a key
    for name in dict.fromkeys(names):
        for key in {name.removesuffix(PurePosixPath(name).suffix), make_keys([name])[0]}:
            wanted.setdefault(key.rpartition("/")[2], []).append((key, name))
    places: dict[str, list[int]] = {name: [] for name in names}
    for place, row in enumerate(rows.tolist()):
        own = index.key(row)
        for key, name in wanted.get(own.rpartition("/")[2], ()):
            if f"/{own}".endswith(f"/{key}") or key.endswith(f"/{own}"):
                places[name].append(place)
    return places


def sampled(split: LabelledSplit, percent: int, seed: int) -> LabelledSplit:
    """A percentage of the images of each class, half of one counted as one.

    Drawn from the seed and the numbers of images of the classes, with the images of a class in the order of their key
    hashes: the same ones in whatever shards they lie. Smaller samples of a seed are parts of larger ones.

    Args:
        split: labelled images of shards.
        percent: of each class.
        seed: of the sample.
    """
    assert split.index is not None, "the images lie in shards"
    order_N = np.lexsort((split.index.key_hash[split.rows], split.labels))
    label_N = split.labels[order_N]
    draw_N = np.random.Generator(np.random.Philox(key=[seed, _SAMPLE])).random(len(order_N))
    images_K = np.bincount(label_N)
    wanted_K = (2 * percent * images_K + 100) // 200
    by_draw_N = np.lexsort((draw_N, label_N))  # class by class, which begins at the same places
    rank_N = np.arange(len(label_N)) - np.repeat(images_K.cumsum() - images_K, images_K)
    return _part(split, np.sort(order_N[by_draw_N[rank_N < wanted_K[label_N]]]))


def check_filled(split: LabelledSplit, what: str, remedy: str) -> None:
    """Refuse a part without an image of some class.

    Raises:
        DataError: there are such classes.
    """
    images_K = np.bincount(split.labels, minlength=len(split.classes))
    if len(empty := np.flatnonzero(images_K == 0)):
        first = split.classes[empty[0]] if split.classes else empty[0]
        raise DataError(f"{what} has no image of {len(empty)} of {len(images_K)} classes (first: {first}); {remedy}")


def _part(split: LabelledSplit, places: NDArray[np.int64]) -> LabelledSplit:
    return replace(split, rows=split.rows[places], labels=split.labels[places])
