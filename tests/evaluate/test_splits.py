"""Which images an evaluation trains and tests on, and when the paper's figures stand beside."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from shard_sets import ShardMaker, encode_jpeg, textured_image, write_tar

from bowstore.data.index import build_index
from bowstore.errors import DataError, UsageError
from bowstore.evaluate import splits
from bowstore.evaluate.protocol import LabelledSplit
from bowstore.evaluate.splits import (
    check_classes,
    check_labels,
    known_dataset,
    open_splits,
    share_no_class,
    some_images,
)

# MiniImageNet's 64 base classes (Ravi and Larochelle, 2017).
BASE = """
    n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747 n02074367 n02089867 n02091831
    n02101006 n02105505 n02108089 n02108551 n02108915 n02111277 n02113712 n02120079 n02165456 n02457408
    n02606052 n02687172 n02747177 n02795169 n02823428 n02966193 n03017168 n03047690 n03062245 n03207743
    n03220513 n03337140 n03347037 n03400231 n03476684 n03527444 n03676483 n03838899 n03854065 n03888605
    n03908618 n03924679 n03998194 n04067472 n04243546 n04251144 n04258138 n04275548 n04296562 n04389033
    n04435653 n04443257 n04509417 n04515003 n04596742 n04604644 n04612504 n06794110 n07584110 n07697537
    n07747607 n09246464 n13054560 n13133613
""".split()


class Sized(SimpleNamespace):
    def __len__(self) -> int:
        return int(self.images)


def shards(classes: tuple[str, ...], images: int) -> Any:
    return Sized(classes=classes, images=images)


def numbered(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


@pytest.mark.parametrize(
    ("classes", "train", "test", "name"),
    [(100, 50_000, 10_000, "cifar100"), (10, 50_000, 10_000, None), (100, 50_000, 9_999, None), (64, 38_400, 1, None)],
)
def test_the_papers_figures_stand_beside_its_own_data_set_only(
    classes: int, train: int, test: int, name: str | None
) -> None:
    assert known_dataset(shards(numbered(classes), train), shards(numbered(classes), test)) == name
    assert known_dataset(shards(numbered(classes), train), None) is None


def test_miniimagenet_is_its_base_classes_with_a_test_split_of_their_own() -> None:
    base, novel = tuple(BASE), numbered(20)
    train = shards(base, 38_400)
    assert known_dataset(train, shards(base, 19_200)) == "miniimagenet"
    assert known_dataset(train, shards(novel, 12_000)) is None
    assert known_dataset(train, None) is None  # a held-out tenth is none of the paper's
    assert known_dataset(shards(base, 38_399), shards(base, 19_200)) is None
    assert known_dataset(shards(("other", *base[1:]), 38_400), shards(("other", *base[1:]), 19_200)) is None
    assert share_no_class(train, shards(novel, 12_000))
    assert not share_no_class(train, shards(base[::-1], 1))


def labelled(labels: list[int], seed: int = 0) -> Any:
    keys = np.random.default_rng(seed).permutation(len(labels)).astype(np.uint64) * 977
    return _sized(np.array(labels, np.int32), keys)


def _sized(label: NDArray[np.int32], key_hash: NDArray[np.uint64]) -> Any:
    return Sized(images=len(label), classes=(), label=label, key_hash=key_hash, fingerprint="f", columns_digest="c")


def test_a_tenth_of_each_class_is_held_out() -> None:
    index = labelled([0] * 30 + [1] * 7 + [2] * 19)
    parts = splits._held_out(index, Path("train"))
    held = parts["test"].rows
    assert np.bincount(parts["test"].labels).tolist() == [3, 1, 1]
    assert np.bincount(parts["train"].labels).tolist() == [27, 6, 18]
    assert sorted([*held, *parts["train"].rows]) == list(range(56))
    for label in range(3):
        hashes = {row: int(index.key_hash[row]) for row in np.flatnonzero(index.label == label).tolist()}
        least = sorted(hashes, key=lambda row: hashes[row])[: len(held[parts["test"].labels == label])]
        assert sorted(least) == held[parts["test"].labels == label].tolist()


def test_the_held_out_images_do_not_depend_on_their_order() -> None:
    index = labelled([0, 1, 2] * 20)
    order = np.random.default_rng(5).permutation(60)
    other = _sized(index.label[order], index.key_hash[order])
    keys = [set(some.key_hash[splits._held_out(some, Path("train"))["test"].rows].tolist()) for some in (index, other)]
    assert keys[0] == keys[1]


def test_what_cannot_be_held_out() -> None:
    with pytest.raises(DataError, match=r"train: class 1 has 1 image, so that none .* \(1 such classes\); give --test"):
        splits._held_out(labelled([0, 0, 1]), Path("train"))


def test_images_without_labels_are_refused_before_their_classes_are_compared(
    make_shard_set: ShardMaker, tmp_path: Path
) -> None:
    train = make_shard_set(8, classes=2).root
    samples = [(f"x{n}", encode_jpeg(textured_image(n, 16, 16)), None) for n in range(3)]
    write_tar(tmp_path / "bare" / "train-000000.tar", samples)
    bare = build_index(tmp_path / "bare").root
    for given, message in (((train, bare), "test: 3 of 3"), ((bare, train), "train: 3 of 3"), ((bare, None), "train")):
        with pytest.raises(DataError, match=rf"^{message}.* images have no label \(first: row 0\)"):
            open_splits(*given)


@pytest.mark.parametrize(
    ("images", "kept"),
    [
        (3, [0, 2, 5]),  # one of each class
        (4, [0, 2, 3, 5]),  # the first class has one more
        (6, [0, 1, 2, 3, 5, 7]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),  # class 1 has no more than two
        (9, list(range(9))),
        (10, list(range(9))),
    ],
)
def test_some_images_are_the_first_of_each_class_as_many_of_all_as_there_are(images: int, kept: list[int]) -> None:
    labels = np.array([2, 2, 0, 0, 0, 1, 2, 1, 2])
    split = LabelledSplit(open=list, rows=np.arange(9) + 10, labels=labels, classes=(), fingerprint="f")
    some = some_images(split, images)
    assert (some.rows - 10).tolist() == kept
    assert some.labels.tolist() == labels[kept].tolist()
    with pytest.raises(UsageError, match=r"^images 2 are fewer than the 3 classes; give --images 3 or more$"):
        some_images(split, 2)


def test_labels_that_no_protocol_can_use() -> None:
    def check(labels: list[int], test_labels: list[int], classes: int | None = None) -> None:
        check_classes(np.array(labels), np.array(test_labels), classes)

    with pytest.raises(DataError, match=r"train: 2 of 4 images have no label \(first: row 1\)"):
        check_labels("train", np.array([0, -1, 1, -1]))
    with pytest.raises(DataError, match=r"1 of 3 classes have no train images \(first: class 1\)"):
        check([0, 2], [0])
    with pytest.raises(DataError, match=r"2 of 4 classes have no train images \(first: class 2\)"):
        check([0, 1], [0], 4)
    with pytest.raises(DataError, match=r"2 of 3 test images have labels \(first: 5\) outside the 2 train"):
        check([0, 1], [0, 5, 7])
    with pytest.raises(DataError, match="train labels reach 4 with 3 classes"):
        check([0, 1, 2, 4], [0], 3)
    with pytest.raises(DataError, match=r"1 class in 2 train images; .* at least 2"):
        check([0, 0], [0])
