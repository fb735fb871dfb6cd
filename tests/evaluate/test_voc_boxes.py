"""Devkits with annotations, as detection reads them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from voc_devkit import annotation, write_boxed_devkit

from bowstore.config import Workspace
from bowstore.errors import DataError, MismatchError, MissingError
from bowstore.evaluate.protocol import DataSets
from bowstore.evaluate.protocols import voc0712_detection
from bowstore.evaluate.protocols.voc0712_detection import DetectionSettings, resolve
from bowstore.evaluate.voc_boxes import BoxedSplit, Objects, data, read_annotation


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_boxed_devkit(tmp_path_factory.mktemp("both"), trainval=6, test=4, years=(2007, 2012), side=48)


@pytest.fixture
def devkit(both: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(both, tmp_path / "VOCdevkit"))


def opened(devkit: Path, **settings: object) -> DataSets:
    return data(DetectionSettings.model_validate({"voc": devkit, **settings}), Workspace())


def split(sets: DataSets, name: str) -> BoxedSplit:
    found = sets[name]
    assert isinstance(found, BoxedSplit)
    return found


def test_both_years_are_trained_on_and_2007_is_tested_on(both: Path) -> None:
    for named in (both, both / "VOC2007", both.parent):
        sets = opened(named)
        train, test = split(sets, "train"), split(sets, "test")
        assert [path.stem for path in train.paths] == [f"{n:06d}" for n in range(1, 7)] + [
            f"2012_{n:06d}" for n in range(1, 7)
        ]
        assert [path.stem for path in test.paths] == [f"{n:06d}" for n in range(5001, 5005)]
        assert sets.inputs == {"train": train.fingerprint, "test": test.fingerprint}
        assert sets.dataset is None  # not the real one
    assert train.classes == ("blue", "green", "red")
    assert train.sizes[:5].tolist() == [[36, 48]] * 4 + [[48, 36]]
    assert train.labels.shape == (12, 3)
    assert train.labels[0].tolist() == [0, 1, 1]
    assert len(split(opened(both, schedule="voc07"), "train")) == 6
    assert len(split(opened(both, small=True), "train")) == 6


def test_a_small_test_has_every_class(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image 5001 has green and red, 5002 red and a difficult blue, 5003 blue and green."""
    monkeypatch.setattr(voc0712_detection, "SMALL", replace(voc0712_detection.SMALL, test_images=1))
    names = {path.stem: set(objects.labels[~objects.difficult]) for path, objects in _test_objects(opened(both))}
    assert names == {"005001": {1, 2}, "005002": {2}, "005003": {0, 1}, "005004": {1}}
    small = opened(both, small=True)
    assert [path.stem for path, _ in _test_objects(small)] == ["005001", "005003"]
    assert small.inputs["test"] != opened(both).inputs["test"]


def _test_objects(sets: DataSets) -> list[tuple[Path, Objects]]:
    test = split(sets, "test")
    return list(zip(test.paths, test.objects, strict=True))


def test_boxes_are_edges_counted_from_0(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text(annotation((40, 30), [("cat", (1, 1, 40, 30), False), ("dog", (3.25, 4, 3.25, 5), True)]))
    found = read_annotation(path, ["cat", "dog"], (30, 40))
    assert found.boxes.tolist() == [[0, 0, 40, 30], [2.25, 3, 3.25, 5]]  # parts are no objects, one pixel is an area
    assert (found.labels.tolist(), found.difficult.tolist()) == ([0, 1], [False, True])
    assert (found.boxes.dtype, found.labels.dtype) == (np.float32, np.int64)
    path.write_text(annotation((40, 30), []))
    assert read_annotation(path, ["cat"], (30, 40)).boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (
            (0, 1, 5, 5),
            r"a.xml: object 1 \(cat\): box 0 1 5 5 \(xmin ymin xmax ymax\) reaches outside of its image, pix",
        ),
        ((1, 1, 41, 5), r"box 1 1 41 5 .* reaches outside of its image, pixels 1 to 40 and 1 to 30; correct it"),
        ((1, 1, 5, 31), r"box 1 1 5 31 .* reaches outside"),
        ((5, 1, 4, 5), r"a.xml: object 1 \(cat\): box 5 1 4 5 \(xmin ymin xmax ymax\) has no area; correct it"),
        ((5, 9, 6, 8), r"box 5 9 6 8 .* has no area"),
        (("x", 1, 5, 5), r"a.xml: object 1 \(cat\): bndbox/xmin is 'x', not a number"),
        ((1, 1, "nan", 5), r"bndbox/xmax is 'nan', not a number"),
    ],
)
def test_boxes_that_cannot_be(tmp_path: Path, box: tuple[float, float, float, float], message: str) -> None:
    path = tmp_path / "a.xml"
    path.write_text(annotation((40, 30), [("cat", box, False)]))
    with pytest.raises(DataError, match=message):
        read_annotation(path, ["cat"], (30, 40))


def test_annotations_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    for text, message in (
        ("<annotation>", r"a.xml is no XML \(no element found"),
        ("<annotation/>", r"a.xml: size/height is not there, not a number"),
        (annotation((30, 40), []), r"a.xml: size 30 x 40, but its image has 40 x 30 pixels"),
        (
            annotation((40, 30), [("cta", (1, 1, 2, 2), False)]),
            r"a.xml: object 1 is of unknown class 'cta'; did you mean 'cat'\?",
        ),
        (
            annotation((40, 30), [("cat", (1, 1, 2, 2), False)]).replace("<xmin>1</xmin>", ""),
            r"bndbox/xmin is not there",
        ),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_annotation(path, ["cat"], (30, 40))


def _main(devkit: Path, name: str) -> Path:
    return devkit / "VOC2007/ImageSets/Main" / name


def _difficult(devkit: Path) -> None:
    for path in (devkit / "VOC2007/Annotations").glob("005*.xml"):
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda kit: shutil.rmtree(kit / "VOC2012"),
            MissingError,
            r"no .*VOC2012/JPEGImages; extract VOCtrainval_11-May-2012.tar into the same devkit, or --schedule voc07",
        ),
        (lambda kit: shutil.rmtree(kit / "VOC2007/Annotations"), MissingError, r"no .*VOC2007/Annotations; extract V"),
        (lambda kit: _main(kit, "test.txt").unlink(), MissingError, r"no .*test.txt; extract VOCtest_06-Nov-2007.tar"),
        (lambda kit: shutil.rmtree(kit / "VOC2007"), MissingError, r"no folder .*VOC2007/JPEGImages; name the devkit"),
        (lambda kit: _main(kit, "test.txt").write_text(""), DataError, r"test.txt names no image"),
        (lambda kit: _main(kit, "test.txt").write_text("a\na\n"), DataError, r"test.txt: image a is listed 2 times"),
        (
            lambda kit: _main(kit, "test.txt").write_text("000002\n005001\n"),
            MismatchError,
            r"1 images are in the lists of both .* \(first: 000002\)",
        ),
        (
            lambda kit: (kit / "VOC2012/JPEGImages/2012_000003.jpg").unlink(),
            MissingError,
            r"VOC2012/ImageSets/Main/trainval.txt: no image .*2012_000003.jpg \(1 of 6 are missing\); extract",
        ),
        (
            lambda kit: (kit / "VOC2007/Annotations/005001.xml").unlink(),
            MissingError,
            r"test.txt: no annotation .*005001.xml \(1 of 4 are missing\); extract the devkit again",
        ),
        (
            lambda kit: (kit / "VOC2007/JPEGImages/000003.jpg").write_bytes(b"nothing"),
            DataError,
            r"image .*000003.jpg cannot be opened \(cannot identify image file",
        ),
        (_difficult, DataError, r"class blue has 0 objects that are not difficult in test; need at least 1"),
        (
            lambda kit: _main(kit, "pink_trainval.txt").write_text(""),
            DataError,
            r"class pink has 0 objects in trainval; need at least 1 of each class",
        ),
    ],
)  # fmt: skip
def test_devkits_that_cannot_be(
    devkit: Path, spoil: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    spoil(devkit)
    with pytest.raises(error, match=message) as raised:
        opened(devkit)
    assert "\n" not in str(raised.value)


def test_the_year_that_is_not_there_is_named(devkit: Path) -> None:
    """`reproduce` looks for it before weeks of training."""

    def named(**settings: object) -> Path | None:
        return resolve(DetectionSettings.model_validate(settings), Workspace(voc=devkit)).voc

    assert named() == devkit / "VOC2012"
    (devkit / "VOC2007").rename(devkit / "away")
    assert named() == devkit / "VOC2007"
    (devkit / "VOC2012").rename(devkit / "VOC2007")
    assert named() == devkit / "VOC2012"
    assert named(schedule="voc07") == devkit / "VOC2007"


def test_a_folder_of_one_year_under_another_name(devkit: Path) -> None:
    alone = (devkit / "VOC2007").rename(devkit / "mine")
    with pytest.raises(
        MissingError, match=r"mine is the folder of one year; name VOCdevkit, with VOC2007 and VOC2012 in"
    ):
        opened(alone)
    assert len(split(opened(alone, schedule="voc07"), "train")) == 6


def test_the_fingerprint_sees_boxes_and_images(devkit: Path) -> None:
    before = opened(devkit).inputs
    assert opened(devkit).inputs == before
    path = devkit / "VOC2012/Annotations/2012_000001.xml"
    path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    after = opened(devkit).inputs
    assert (after["test"], after["train"] != before["train"]) == (before["test"], True)
    Image.new("RGB", (48, 36)).save(devkit / "VOC2007/JPEGImages/005001.jpg")
    assert opened(devkit).inputs["test"] != before["test"]


def test_turned_images_are_what_lies_in_the_file(devkit: Path) -> None:
    """A camera's turn is not applied: boxes are in the pixels of the file."""
    path = devkit / "VOC2007/JPEGImages/000001.jpg"
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    assert split(opened(devkit), "train").sizes[0].tolist() == [36, 48]
