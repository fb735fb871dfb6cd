"""Lists of classes: how they are given, what they are called, and which classes of shards they mean."""

import json
from pathlib import Path

import pytest
from shard_sets import SHARED_DATA

from bowstore.errors import DataError, UsageError
from bowstore.evaluate.classes import ALL, class_lists, find_classes, in_order, list_name, read_classes

SPLITS = SHARED_DATA.parent / "paper/splits.json"


def test_the_lists_that_come_with_bowstore() -> None:
    assert {name: len(set(names)) for name, names in class_lists().items()} == {
        "cifar-fs-test": 20,
        "miniimagenet-test": 20,
    }
    assert {"pickup_truck", "woman"} < set(class_lists()["cifar-fs-test"])
    assert {"n01930112", "n07613480"} < set(class_lists()["miniimagenet-test"])


@pytest.mark.skipif(not SPLITS.exists(), reason="the record of the published splits is not beside the checkout")
def test_the_lists_are_the_published_ones() -> None:
    splits = json.loads(SPLITS.read_text())
    assert list(class_lists()["cifar-fs-test"]) == splits["cifar_fs_test_classes"]
    assert list(class_lists()["miniimagenet-test"]) == splits["miniimagenet_classes"]["test"]


def test_classes_are_given_as_names_lists_and_files(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("\ufeff# two of them\n  sweet pepper \n\nBed\r\n", encoding="utf-8")
    assert read_classes([str(path)]) == ("Bed", "sweet pepper")
    assert read_classes([str(path), "worm, fox", "aa"]) == ("aa", "Bed", "fox", "sweet pepper", "worm")
    assert read_classes(["miniimagenet-test"]) == class_lists()["miniimagenet-test"]
    assert read_classes([ALL]) == (ALL,)
    many = [f"class{n:03d}" for n in range(100)]
    assert read_classes([",".join(many)]) == tuple(many)  # longer than a file's name may be


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["all", "cat"], "'all' stands for all of the split; leave the others out"),
        (["cat,dog", "cat"], "cat is named twice; name each once"),
        ([","], "',' names no class"),
    ],
)
def test_classes_that_cannot_be_meant(given: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_classes(given)


def test_a_file_of_classes_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"some\.txt: byte 3 is not UTF-8; name a file with a class a line"):
        read_classes([str(path)])
    path.write_text("# none\n")
    with pytest.raises(UsageError, match=r"some\.txt' names no class"):
        read_classes([str(path)])


def test_a_list_is_known_by_its_classes_and_not_by_how_they_are_written() -> None:
    names = [name.replace("_", " ").title() for name in reversed(class_lists()["cifar-fs-test"])]
    assert list_name(names) == "cifar-fs-test"
    assert list_name([ALL]) == "all"
    some = list_name(["fox", "pickup_truck"])
    assert some == list_name(["Pickup-Truck", "fox"]) == "2-classes-2c90c0c5"
    assert some != list_name(["fox", "pickup"])


def test_names_that_differ_in_capitals_and_signs_are_one_class() -> None:
    there = ("worm", "pickup truck", "Sweet-Pepper")
    assert find_classes(["sweet_pepper", "pickup_truck"], there, "val", str) == [2, 1]
    both = ("a b", "a_b", "c")
    assert find_classes(["a_b", "a b"], both, "val", str) == [1, 0]  # the exact name comes first
    with pytest.raises(UsageError, match="class 'A-B' can be a b, a_b of val; write the one that is meant"):
        find_classes(["A-B"], both, "val", str)
    with pytest.raises(UsageError, match="C, c are one class of val; name each once"):
        find_classes(["C", "c"], both, "val", str)


def test_missing_classes_are_named_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"^val lacks 2 of 3 classes: bed, fox; look elsewhere$"):
        find_classes(["bed", "cat", "fox"], ("cat", "dog"), "val", lambda: "look elsewhere")
    names = [f"c{n}" for n in range(30)]
    with pytest.raises(UsageError, match=r"^val lacks 30 of 30 classes: c0, c1, .*, c24 and 5 more; "):
        find_classes(names, ("cat",), "val", str)


def test_order_does_not_depend_on_how_names_are_written() -> None:
    assert in_order(["b_a", "Ab", "aa"]) == ("aa", "Ab", "b_a")
    assert in_order(["B a", "aa", "ab"]) == ("aa", "ab", "B a")
