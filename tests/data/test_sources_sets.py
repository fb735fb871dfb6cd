"""The layouts of published data sets: MiniImageNet, VOC, Places205 and Places365."""

import shutil
from pathlib import Path

import pytest
from source_sets import classes_of, list_splits, shards_of, tiny_image, write_file
from voc_devkit import write_devkit

from bowstore.data.sources import NO_LABEL
from bowstore.errors import DataError, MissingError

MINI = {"train": ("n02", "n01", "n03"), "val": ("n05", "n04"), "test": ("n07",)}


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    """MiniImageNet with two images a class."""
    root = tmp_path / "mini"
    for split, classes in MINI.items():
        names = [(f"{name}0000000{number}.jpg", name) for name in classes for number in range(2)]
        write_file(root / f"{split}.csv", "filename,label\n" + "".join(f"{file}, {name}\n" for file, name in names))
        for number, (file, _) in enumerate(names):
            write_file(root / "images" / file, tiny_image(number))
    return root


def test_miniimagenet_numbers_the_classes_of_each_split(mini: Path, tmp_path: Path) -> None:
    found = shards_of(mini, tmp_path / "out")
    assert list(found) == ["train", "val", "test"]
    for split, classes in MINI.items():
        assert classes_of(tmp_path / "out" / split) == tuple(sorted(classes))
        assert {key: sample.label for key, sample in found[split].items()} == {
            f"{name}0000000{number}": label for label, name in enumerate(sorted(classes)) for number in range(2)
        }
    assert found["test"]["n0700000001"].data == tiny_image(1)


def test_miniimagenet_that_is_not_whole(mini: Path) -> None:
    (mini / "images/n0500000000.jpg").unlink()
    with pytest.raises(
        DataError,
        match=r"val\.csv: 1 of 4 files are not in .*mini/images: 'n0500000000\.jpg' in line 2; bring them",
    ):
        list_splits(mini)
    (mini / "val.csv").unlink()
    with pytest.raises(MissingError, match=r"mini has no val\.csv; MiniImageNet is images/ with train\.csv, val\.csv"):
        list_splits(mini, "miniimagenet")


def test_miniimagenet_splits_must_not_share_classes(mini: Path) -> None:
    write_file(mini / "images/more.jpg", tiny_image(1))
    write_file(mini / "test.csv", "filename,label\nmore.jpg,n01\n")
    with pytest.raises(
        DataError, match=r"mini: 1 classes are in both train and test: n01; the splits of MiniImageNet share none, so"
    ):
        list_splits(mini)
    lists = [f"{split}={mini / split}.csv" for split in ("train", "test")]
    assert [len(split.classes) for split in list_splits(mini / "images", lists=lists)] == [3, 3]


def test_voc_devkit(tmp_path: Path) -> None:
    voc = write_devkit(tmp_path / "root")
    found = shards_of(voc, tmp_path / "out")
    assert {split: len(samples) for split, samples in found.items()} == {"train": 24, "test": 15}
    assert found["train"]["000001"] == ((voc / "JPEGImages/000001.jpg").read_bytes(), NO_LABEL)
    assert classes_of(tmp_path / "out/train") == ()
    for above in (tmp_path / "root", voc.parent):
        keys = [[image.key for image in split.images] for split in list_splits(above)]
        assert keys == [sorted(samples) for samples in found.values()]


def test_voc_devkits_that_are_not_whole(tmp_path: Path) -> None:
    voc = write_devkit(tmp_path)
    (voc / "JPEGImages/000002.jpg").unlink()
    with pytest.raises(DataError, match=r"trainval\.txt: 1 of 24 files are not in .*JPEGImages: '000002\.jpg' in l"):
        list_splits(voc)
    (voc / "ImageSets/Main/trainval.txt").unlink()
    assert [split.name for split in list_splits(voc)] == ["test"]
    (voc / "ImageSets/Main/test.txt").unlink()
    with pytest.raises(MissingError, match=r"no trainval\.txt and no test\.txt in .*ImageSets/Main; extract"):
        list_splits(voc)
    shutil.copytree(voc, voc.parent / "VOC2012")
    with pytest.raises(DataError, match=r"VOCdevkit holds 2 devkits: .*/VOC2007, .*/VOC2012; name the one to take"):
        list_splits(voc.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"empty holds no JPEGImages and ImageSets/Main; name the folder VOC"):
        list_splits(tmp_path / "empty", "voc")


@pytest.mark.parametrize("images", ["data/vision/torralba/deeplearning/images256", "images256", ""])
@pytest.mark.parametrize("lists", ["trainvalsplit_places205", ""])
def test_places205(tmp_path: Path, images: str, lists: str) -> None:
    root = tmp_path / "places"
    train = [("a/abbey/gsun_1.jpg", 0), ("b/bar/gsun_2.jpg", 1), ("f/field/wild/gsun_3.jpg", 2)]
    val = [("b/bar/gsun_4.jpg", 1)]
    for number, (path, _) in enumerate(train + val):
        write_file(root / images / path, tiny_image(number))
    for split, lines in (("train", train), ("val", val)):
        text = "".join(f"{path} {label}\n" for path, label in lines)
        write_file(root / lists / f"{split}_places205.csv", text)
    found = shards_of(root, tmp_path / "out")
    assert {key: sample.label for key, sample in found["train"].items()} == {
        "a/abbey/gsun_1": 0,
        "b/bar/gsun_2": 1,
        "f/field/wild/gsun_3": 2,
    }
    assert found["val"] == {"b/bar/gsun_4": (tiny_image(3), 1)}
    for split in found:
        assert classes_of(tmp_path / "out" / split) == ("a/abbey", "b/bar", "f/field/wild")


def test_places365_as_torchvision_leaves_it(tmp_path: Path) -> None:
    root = tmp_path / "places"
    write_file(root / "data_256_standard/a/airfield/00000001.jpg", tiny_image(1))
    write_file(root / "data_256_standard/b/bar/00000001.jpg", tiny_image(2))
    write_file(root / "val_256/Places365_val_00000001.jpg", tiny_image(3))
    write_file(root / "places365_train_standard.txt", "/a/airfield/00000001.jpg 0\n/b/bar/00000001.jpg 1\n")
    write_file(root / "places365_val.txt", "Places365_val_00000001.jpg 1\n")
    write_file(root / "places365_test.txt", "Places365_test_00000001.jpg\n")
    found = shards_of(root, tmp_path / "out")
    assert {split: {key: s.label for key, s in samples.items()} for split, samples in found.items()} == {
        "train": {"a/airfield/00000001": 0, "b/bar/00000001": 1},
        "val": {"Places365_val_00000001": 1},
    }
    assert classes_of(tmp_path / "out/val") == ("a/airfield", "b/bar")


def test_places_whose_folders_are_not_the_classes(tmp_path: Path) -> None:
    for number, path in enumerate(("x/1.jpg", "x/2.jpg")):
        write_file(tmp_path / "images256" / path, tiny_image(number))
    write_file(tmp_path / "train_places205.csv", "x/1.jpg 0\nx/2.jpg 1\n")
    (split,) = list_splits(tmp_path)
    assert (split.classes, [image.label for image in split.images]) == ((), [0, 1])


def test_places_that_are_not_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "val_places205.csv", "a/abbey/gsun_1.jpg 0\n../../etc/passwd 1\n")
    with pytest.raises(
        MissingError,
        match=r"image a/abbey/gsun_1\.jpg of line 1 is in none of the folders of .* that hold images \(",
    ):
        list_splits(tmp_path)
    write_file(tmp_path / "images256/a/abbey/gsun_1.jpg", tiny_image(1))
    with pytest.raises(DataError, match=r"1 paths climb out of .*images256: '\.\./\.\./etc/passwd' in line 2"):
        list_splits(tmp_path)
    write_file(tmp_path / "places365_val.txt", "a.jpg 0\n")
    with pytest.raises(DataError, match=r"has the lists of Places205 and Places365; take those of one away"):
        list_splits(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"empty has none of the lists train_places205\.csv, val_places205\.csv"):
        list_splits(tmp_path / "empty", "places205")
