"""Labelled train and test images of an evaluation, once they fit each other; how the paper's data sets are known.

Legend: N images of a split, K classes.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from bowstore.config import SomePaths, StorageConfig
from bowstore.data.index import Index, open_index
from bowstore.data.reader import ShardReader, fetched
from bowstore.errors import DataError, MismatchError, UsageError
from bowstore.evaluate.protocol import DataSets, LabelledSplit

_HELD_OUT = 10  # one image in so many of each class
# xxh3-64 of a data set's sorted class names, where all copies have the same.
_CLASSES: Mapping[str, str] = {
    "cifar10": "bc990f50561ece3b",
    "miniimagenet": "189dcceae09565aa",  # the 64 base classes (Ravi and Larochelle, 2017)
    "imagenette": "568e13dd559b8776",
}
# Those that are known by their numbers: of classes, of train images and of test images (ImageNet's and Places' val).
NUMBERS: Mapping[str, tuple[int, int, int]] = {
    "cifar100": (100, 50_000, 10_000),
    "imagenet": (1000, 1_281_167, 50_000),
    "places205": (205, 2_448_873, 20_500),
}


def labelled(index: Index, rows: NDArray[np.int64] | None = None) -> LabelledSplit:
    """All images of shards, or some of their rows, int64 (N,)."""
    rows = np.arange(len(index), dtype=np.int64) if rows is None else rows
    return LabelledSplit(
        open=lambda: ShardReader(fetched(index)),
        rows=rows,
        labels=np.asarray(index.label[rows]),
        classes=index.classes,
        fingerprint=index.fingerprint,
        content=index.columns_digest,
        index=index,
    )


def open_splits(
    train: SomePaths, test: Path | None, storage: StorageConfig | None = None, *, images: int | None = None
) -> DataSets:
    """Train and test images, once they fit each other and have labels: what can be wrong before an image is read.

    Args:
        train: labelled shards, of one folder or several.
        test: labelled shards of the same classes; None to hold a tenth of each class of the train shards out.
        storage: how shards are read.
        images: at most so many of each split (`some_images`); None for all.

    Raises:
        MismatchError: other classes in both, or the same images.
        DataError: as `check_labels` and `check_classes`.
        UsageError: fewer images than classes.
    """
    index = open_index(train, storage)
    tested = open_index(test, storage) if test else None
    for name, each in {"train": index, **({"test": tested} if tested else {})}.items():
        check_labels(name, np.asarray(each.label))
    if tested is None:
        splits = _held_out(index, train)
    elif tested.fingerprint == index.fingerprint:
        raise MismatchError(f"{train} and {test} hold the same images; name another split's shards as test")
    elif tested.classes != index.classes:
        raise MismatchError(
            f"{train} has {len(index.classes)} classes and {test} {len(tested.classes)}, or other ones; "
            "write both splits from one data set, or hold a tenth of each train class out (--held-out)"
        )
    else:
        splits = {"train": labelled(index), "test": labelled(tested)}
    check_classes(splits["train"].labels, splits["test"].labels, len(index.classes) or None)
    some = {name: some_images(split, images) for name, split in splits.items()} if images else splits
    return DataSets(splits=some, dataset=None if images else known_dataset(index, tested))


def some_images(split: LabelledSplit, images: int) -> LabelledSplit:
    """At most so many images of a split, in its order: the first of each class, of all classes as many if they can.

    Raises:
        UsageError: fewer images than classes.
    """
    label_N = split.labels
    order_N = np.argsort(label_N, kind="stable")
    classes_K, first_K, count_K = np.unique(label_N[order_N], return_index=True, return_counts=True)
    if images < len(classes_K):
        raise UsageError(
            f"images {images} are fewer than the {len(classes_K)} classes; give --images {len(classes_K)} or more"
        )
    turn_N = np.empty(len(label_N), np.int64)  # how many of the same class come before
    turn_N[order_N] = np.arange(len(label_N)) - np.repeat(first_K, count_K)
    kept = np.sort(np.lexsort((label_N, turn_N))[:images])
    return replace(split, rows=split.rows[kept], labels=label_N[kept])


def _held_out(index: Index, train: SomePaths) -> dict[str, LabelledSplit]:
    """A tenth of each class as the test split (`a_tenth`); the rest as the train split.

    Raises:
        DataError: a class of one image.
    """
    label_N = np.asarray(index.label)
    check_tenth(label_N, f"{train}", "give --test")
    held_N = a_tenth(label_N, np.asarray(index.key_hash))
    return {"train": labelled(index, np.flatnonzero(~held_N)), "test": labelled(index, np.flatnonzero(held_N))}


def a_tenth(label_N: NDArray[np.integer], key_hash_N: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which images are a tenth of each class, at least one image of it.

    The images with the least key hashes: the same ones in whatever order and shards the images lie.
    """
    order = np.lexsort((key_hash_N, label_N))
    _, first, count = np.unique(label_N[order], return_index=True, return_counts=True)
    held_N = np.zeros(len(label_N), bool)
    for at, images in zip(first.tolist(), count.tolist(), strict=True):
        held_N[order[at : at + max(1, images // _HELD_OUT)]] = True
    return held_N


def check_tenth(label_N: NDArray[np.integer], what: str, remedy: str) -> None:
    """Refuse a class of which `a_tenth` would be all."""
    classes, count = np.unique(label_N, return_counts=True)
    if len(alone := classes[count < 2]):
        raise DataError(
            f"{what}: class {alone[0]} has 1 image, so that none of it can be held out ({len(alone)} such classes); "
            f"{remedy}"
        )


def share_no_class(train: Index, test: Index) -> bool:
    """Whether two splits have classes of their own, as those of MiniImageNet have."""
    return bool(train.classes) and bool(test.classes) and not set(train.classes) & set(test.classes)


def known_dataset(train: Index, test: Index | None) -> str | None:
    """Name of the paper's data set that these shards can only be; its figures are then shown.

    CIFAR-100, ImageNet and Places205 by their numbers; MiniImageNet's base classes by their names and images, beside a
    test split of the same classes. A held-out tenth (no test split) is none of the paper's.
    """
    if test is None:
        return None
    for name, numbers in NUMBERS.items():
        if (len(train.classes), len(train), len(test)) == numbers:
            return name
    base = has_classes_of("miniimagenet", train) and len(train) == 38_400
    return "miniimagenet" if base and test.classes == train.classes else None


def has_classes_of(dataset: str, index: Index) -> bool:
    """Whether shards have the classes of a data set; of one that is not known: whatever they are."""
    if dataset in NUMBERS:
        return len(index.classes) == NUMBERS[dataset][0]
    names = xxhash.xxh3_64_hexdigest(" ".join(sorted(index.classes)).encode())
    return _CLASSES.get(dataset, names) == names


def check_labels(split: str, labels: NDArray[np.integer]) -> None:
    """Refuse images without labels."""
    missing = np.flatnonzero(labels < 0)
    if len(missing):
        raise DataError(
            f"{split}: {len(missing)} of {len(labels)} images have no label (first: row {missing[0]}); "
            "an evaluation needs shards made from a source with labels"
        )


def check_classes(train_labels_N: NDArray[np.integer], test_labels_M: NDArray[np.integer], classes: int | None) -> None:
    """Refuse fewer than two classes, labels outside them, and a class without train images; None: as many as labels."""
    classes = classes or int(train_labels_N.max()) + 1
    if classes < 2:
        raise DataError(f"{classes} class in {len(train_labels_N)} train images; a probe needs at least 2")
    outside = test_labels_M[test_labels_M >= classes]
    if len(outside):
        raise DataError(
            f"{len(outside)} of {len(test_labels_M)} test images have labels (first: {outside[0]}) outside "
            f"the {classes} train classes; write both splits from one data set"
        )
    images_K = np.bincount(train_labels_N, minlength=classes)
    if len(images_K) > classes:
        raise DataError(f"train labels reach {len(images_K) - 1} with {classes} classes; index the shards again")
    empty = np.flatnonzero(images_K == 0)
    if len(empty):
        raise DataError(
            f"{len(empty)} of {classes} classes have no train images (first: class {empty[0]}); "
            "use more train images, or shards of all classes"
        )
