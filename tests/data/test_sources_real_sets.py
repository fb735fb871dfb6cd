"""Layouts of data sets that many people have: what is a class there, what is a split, and what is said of it."""

import shutil
import tarfile
from pathlib import Path

import pytest
from imagenet_sets import (
    DEVKIT,
    IDS,
    small_imagenet,
    val_name,
    write_archives,
    write_folders,
    write_kaggle,
    write_tiny,
)
from source_sets import classes_of, list_splits, shards_of, tiny_image, write_file, write_members

from bowstore.data.sources import Folders, list_source
from bowstore.errors import DataError, MismatchError, MissingError

JPEG = tiny_image(1)


def _fill(root: Path, *paths: str) -> Path:
    for path in paths:
        write_file(root / path, JPEG if path.lower().endswith((".jpg", ".jpeg", ".png")) else b"a text")
    return root


def _labels(source: Path, folders: Folders | None = None, label_field: str | None = None) -> dict[str, dict[str, int]]:
    splits = list_splits(source, folders=folders, label_field=label_field)
    return {split.name: {image.key: image.label for image in split.images} for split in splits}


def test_images_without_labels_wherever_they_lie(tmp_path: Path) -> None:
    """Photographs in folders by date, and beside them, were refused without an option that takes them."""
    _fill(tmp_path, "1.jpg", "2019/05/2.JPG", "2020/3.jpg", "2020/4.xmp")
    with pytest.raises(
        DataError, match=r"1 images lie beside the class folders .* or take all without labels with --label-field none$"
    ):
        list_splits(tmp_path)
    assert _labels(tmp_path, label_field="none") == {"train": {"1": -1, "2019/05/2": -1, "2020/3": -1}}
    assert list_source(tmp_path, label_field="none").passed_over.counts == {".xmp": 1}
    splits = _fill(tmp_path / "splits", "train/ant/1.jpg", "train/2.jpg", "val/bee/3.jpg")
    assert _labels(splits, label_field="none") == {"train": {"ant/1": -1, "2": -1}, "val": {"bee/3": -1}}
    with pytest.raises(DataError, match=r"so rename or remove them, or take all images without labels with --label-fi"):
        list_splits(_fill(tmp_path / "mini", "train/ant/1.jpg", "val/bee/3.jpg"))
    inside = _fill(tmp_path / "inside", "nut/train/1.jpg", "nut/test/2.jpg", "bolt/test/2.jpg")
    with pytest.raises(DataError, match=r"3 folders inside of classes that are called as splits"):
        list_splits(inside, label_field="none")


def test_one_class_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CelebA's one folder is no class; that of a detector of cats may be."""
    source = _fill(tmp_path / "celeba", "img_align_celeba/000001.jpg", "list_attr_celeba.txt")
    assert _labels(source) == {"train": {"img_align_celeba/000001": 0}}
    assert (
        f"note: all images of {source} lie in one folder, img_align_celeba, which is taken for their class; --lab"
        in (capsys.readouterr().err)
    )
    _labels(source, label_field="none")
    _labels(_fill(tmp_path / "two", "train/ant/1.jpg", "train/bee/1.jpg", "val/ant/1.jpg"))
    assert "note" not in capsys.readouterr().err


def test_classes_that_lie_deeper_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SUN397 has a folder for each first letter."""
    source = _fill(tmp_path / "sun", "a/abbey/1.jpg", "a/airport/1.jpg", "b/bar/1.jpg")
    assert list_splits(source)[0].classes == ("a", "b")
    assert f"note: no image of {source} lies in a class folder itself (a/abbey/1.jpg); the 2 outer folders are" in (
        capsys.readouterr().err
    )
    list_splits(_fill(source, "b/2.jpg"))
    assert "note" not in capsys.readouterr().err


def test_classes_called_by_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ImageNetV2's folders are labels of ImageNet, and sorted names put 10 before 2."""
    source = _fill(tmp_path, *(f"imagenetv2-matched-frequency-format-val/{n}/a.jpeg" for n in (0, 1, 2, 10)))
    assert _labels(source) == {"train": {"0/a": 0, "1/a": 1, "10/a": 2, "2/a": 3}}
    told = capsys.readouterr().err
    assert "holds all in one folder" in told
    assert "labels count their names in sorted order, as torchvision does: class 10 has label 2" in told
    assert list(_labels(source, "splits")) == ["val"]
    capsys.readouterr()
    list_splits(_fill(tmp_path / "digits", *(f"train/{n}/1.png" for n in range(10))))
    assert "sorted order" not in capsys.readouterr().err


def test_a_split_by_a_number_beside_others(tmp_path: Path) -> None:
    """train2017 and unlabeled2017 of COCO became the classes 0 and 1."""
    _fill(tmp_path, "train2017/1.jpg", "unlabeled2017/2.jpg", "annotations/instances.json")
    with pytest.raises(DataError, match=r"holds train2017, which may be classes or splits by their names; say which"):
        list_splits(tmp_path)
    listed = list_source(tmp_path, folders="splits")
    assert ([split.name for split in listed.splits], listed.passed_over.counts) == (
        ["train"],
        {"images": 1, ".json": 1},
    )


def test_a_split_inside_of_itself(tmp_path: Path) -> None:
    """Intel's scenes from Kaggle: the second seg_test was a class that train does not have."""
    _fill(
        tmp_path, *(f"seg_{split}/seg_{split}/{name}/1.jpg" for split in ("train", "test") for name in ("sea", "ice"))
    )
    expected = {"ice/1": 0, "sea/1": 1}
    assert _labels(tmp_path, "splits") == {"train": expected, "test": expected}
    _fill(tmp_path / "cats", "train/cat.jpg", "test1/1.jpg", "more/1.jpg")
    with pytest.raises(
        DataError, match=r"train beside 2 other folders .*--folders splits \(test1 is then test, more left"
    ):
        list_splits(tmp_path / "cats")
    assert _labels(tmp_path / "cats", "splits") == {"train": {"cat": -1}, "test": {"1": -1}}
    _fill(tmp_path / "parts", "train.X1/ant/1.jpg", "train.X2/bee/1.jpg", "val.X/ant/2.jpg")
    with pytest.raises(
        DataError, match=r"train\.X1 and train\.X2, which by name are the same split, train; put what they"
    ):
        list_splits(tmp_path / "parts", folders="splits")


def test_raw_files_of_cameras_are_no_images(tmp_path: Path) -> None:
    """They begin as TIFFs do, and what a TIFF's reader finds in them is a thumbnail."""
    raw = tiny_image(2, "TIFF")
    for name in ("1.CR2", "1.nef", "2.dng", "1.jpg", "scan"):
        write_file(tmp_path / "ant" / name, JPEG if name == "1.jpg" else raw)
    listed = list_source(tmp_path)
    assert [image.path for image in listed.splits[0].images] == ["ant/1.jpg", "ant/scan"]
    assert listed.passed_over.counts == {".cr2": 1, ".nef": 1, ".dng": 1}


def test_archives_of_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Imagenette's tar has a folder around train and val, which both became train, without labels."""
    names = ("train/ant/1.jpg", "train/bee/1.jpg", "val/ant/1.jpg")
    for below in ("", "./", "imagenette2/", "a/b/"):
        tar = write_members(tmp_path / "a.tar", [(below + name, JPEG) for name in names])
        with pytest.raises(DataError, match=r"a\.tar is an archive of the folders train, val, not a shard; extract it"):
            list_splits(tar)
    list_splits(write_members(tmp_path / "b.tar", [(f"set/{name}", JPEG) for name in names[:2]]))
    assert "and if their folders are classes (set/train/ant/1.jpg), extract the tars" in capsys.readouterr().err
    list_splits(write_members(tmp_path / "c.tar", [("1.jpg", JPEG), ("x/2.jpg", JPEG)]))
    assert "extract" not in capsys.readouterr().err


def test_several_data_sets_in_a_folder(tmp_path: Path) -> None:
    """ImageNet's archives beside COCO: it was taken for a class without images."""
    write_archives(tmp_path / "ILSVRC2012", small_imagenet())
    _fill(tmp_path, "coco/val2017/1.jpg", "photos/1.jpg")
    with pytest.raises(
        DataError,
        match=r"holds ILSVRC2012, a data set of kind imagenet, beside other images; name .*/ILSVRC2012, or take .* as "
        r"it is with --source folder",
    ):
        list_splits(tmp_path)
    assert list_splits(tmp_path, "folder")[0].classes == ("coco", "photos")
    (tmp_path / "zips/a").mkdir(parents=True)
    _fill(tmp_path / "zips", "a/train.zip", "val.zip")
    with pytest.raises(
        DataError, match=r"no images in .*, which holds 2 files of other kinds \(\.zip 2\); unpack what is"
    ):
        list_splits(tmp_path / "zips")


@pytest.mark.parametrize("inside", ["images/{}", "{}/images", "{}"])
def test_tiny_imagenet_whose_val_was_sorted(tmp_path: Path, inside: str) -> None:
    """Many scripts move val's images into class folders, the best known into val/images/WNID."""
    images = small_imagenet()
    plain = shards_of(write_tiny(tmp_path / "plain", images), tmp_path / "out/plain")
    source = write_tiny(tmp_path / "sorted", images)
    for place, wnid in enumerate(images.val_wnids):
        target = source / "val" / inside.format(wnid) / f"val_{place}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        (source / f"val/images/val_{place}.JPEG").rename(target)
    assert shards_of(source, tmp_path / "out/sorted") == plain
    (source / "val/val_annotations.txt").unlink()
    assert _labels(source) == _labels(tmp_path / "plain")


def test_imagenet_named_too_deep(tmp_path: Path) -> None:
    """The table of Kaggle's labels lies above the folder that was named."""
    source = write_kaggle(tmp_path / "kaggle", small_imagenet())
    for below in ("ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"):
        with pytest.raises(MissingError, match=r"; LOC_val_solution\.csv is in .*/kaggle, so name that folder$"):
            list_splits(source / below)


def test_val_extracted_over_everything(tmp_path: Path) -> None:
    """ILSVRC2012_img_val.tar is flat: extracted where it lies, its images lie beside all else."""
    images = small_imagenet()
    write_archives(tmp_path, images, "train devkit")
    for place, data in enumerate(images.val):
        write_file(tmp_path / val_name(place), data)
    message = r"holds 5 images of val beside all else; move them \(ILSVRC2012_val_\*\) into .*val$"
    with pytest.raises(DataError, match=message):
        list_splits(tmp_path)
    (tmp_path / "ILSVRC2012_img_train.tar").unlink()
    with pytest.raises(DataError, match=message):
        list_splits(tmp_path)
    write_archives(tmp_path, images, "val")
    assert list_source(tmp_path).passed_over.counts == {"images": 5}


def test_shards_with_labels_and_without_are_told_apart(tmp_path: Path) -> None:
    source = _fill(tmp_path / "source", "ant/1.jpg", "bee/1.jpg")
    assert set(shards_of(source, tmp_path / "out", label_field="none")["train"]) == {"ant/1", "bee/1"}
    assert classes_of(tmp_path / "out/train") == ()
    with pytest.raises(MismatchError, match=r"holds shards of other classes, not of these 2; take another OUT"):
        shards_of(source, tmp_path / "out")


def test_a_class_called_images_below_splits(tmp_path: Path) -> None:
    """Neither option took images/ and drawings/ below train/ and val/ for classes."""
    _fill(tmp_path, *(f"{split}/{name}/1.jpg" for split in ("train", "val") for name in ("images", "drawings")))
    with pytest.raises(DataError, match=r"train holds images beside .* take all for classes with --folders splits, or"):
        list_splits(tmp_path)
    expected = {"drawings/1": 0, "images/1": 1}
    assert _labels(tmp_path, "splits") == {"train": expected, "val": expected}


def test_imagenet_with_two_folders_of_one_split(tmp_path: Path) -> None:
    """The last was taken, and the images of the other passed over."""
    images = small_imagenet()
    write_archives(write_folders(tmp_path, images), images, "devkit")
    shutil.copytree(tmp_path / "val", tmp_path / "valid")
    with pytest.raises(DataError, match=r"holds val more than once: val, valid; take the archives with --source"):
        list_splits(tmp_path)
    shutil.rmtree(tmp_path / "valid")
    for name in ("test", "test_v10102019"):
        write_members(tmp_path / f"ILSVRC2012_img_{name}.tar", [(val_name(0, "test"), JPEG)])
    message = r"holds test more than once: ILSVRC2012_img_test\.tar, ILSVRC2012_img_test_v10102019\.tar; take"
    for kind in (None, "imagenet"):
        with pytest.raises(DataError, match=message):
            list_splits(tmp_path, kind)


def test_a_devkit_in_a_folder_of_its_own_name(tmp_path: Path) -> None:
    """As desktop unpackers leave it."""
    write_archives(tmp_path, small_imagenet())
    expected = _labels(tmp_path)
    with tarfile.open(tmp_path / f"{DEVKIT}.tar.gz") as archive:
        archive.extractall(tmp_path / DEVKIT, filter="data")
    (tmp_path / f"{DEVKIT}.tar.gz").unlink()
    assert _labels(tmp_path) == expected


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        (r"ant\1.jpg ant", r"write / for \\$"),  # written on Windows
        ("ant/1 ant", r"write names with their extension, \.jpg$"),  # Food-101
        ("17 ant/1.jpg", r"put the path first in a line, and the label behind it$"),  # CUB
        ("ant/2.jpg ant", r"bring them there, or remove the lines$"),
    ],
)
def test_lists_of_another_form(tmp_path: Path, line: str, remedy: str) -> None:
    _fill(tmp_path, "ant/1.jpg", "bee/2.jpg")
    listed = write_file(tmp_path / "list.txt", f"bee/2.jpg bee\n{line}\n")
    with pytest.raises(DataError, match=r"1 of 2 files are not in .* in line 2; " + remedy):
        list_splits(tmp_path, lists=[str(listed)])


def test_tables_of_classes_that_are_empty(tmp_path: Path) -> None:
    kaggle, tiny = (write(tmp_path / write.__name__, small_imagenet()) for write in (write_kaggle, write_tiny))
    for path in (kaggle / "LOC_synset_mapping.txt", tiny / "wnids.txt"):
        path.write_text("\n")
        with pytest.raises(DataError, match=rf"{path.name} names no class; fetch it anew, or take it away$"):
            list_splits(path.parent)


@pytest.mark.parametrize("kind", ["imagenet", "kaggle", "tinyimagenet"])
def test_val_that_was_sorted_by_other_numbers(tmp_path: Path, kind: str) -> None:
    """Ids are in another order than WNIDs: a script that takes them for labels sorts val into wrong folders."""
    images = small_imagenet()
    write = {"imagenet": write_folders, "kaggle": write_kaggle, "tinyimagenet": write_tiny}[kind]
    source = write(tmp_path, images)
    if kind == "imagenet":
        write_archives(source, images, "devkit")
    val = source / ("ILSVRC/Data/CLS-LOC/val" if kind == "kaggle" else "val")
    files = sorted(val.rglob("*.JPEG"), key=lambda path: path.name)
    data = [path.read_bytes() for path in files]
    for wnids, right in ((images.val_wnids, True), ([sorted(IDS)[number - 1] for number in images.truth], False)):
        for path in val.rglob("*.JPEG"):
            path.unlink()
        for path, wnid, content in zip(files, wnids, data, strict=True):
            write_file(val / wnid / path.name, content)
        if right:
            assert {image.label for image in list_splits(source)[1].images} == {0, 1, 2, 3}
        else:
            with pytest.raises(
                DataError, match=r"val holds 5 of 5 images in class folders that .* contradicts: n.*, wh"
            ):
                list_splits(source)
    assert list_splits(source if kind != "kaggle" else val.parent, "folder")
