"""Folders and files that are easily taken for something else: nothing is dropped or read otherwise without a line."""

import os
import unicodedata
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from source_sets import list_splits, shards_of, tiny_image, write_file, write_members

from bowstore.cli import main
from bowstore.data.sources import Folders, find_source, list_source
from bowstore.errors import DataError, MissingError

JPEG = tiny_image(1)


def _fill(root: Path, *paths: str) -> Path:
    for path in paths:
        write_file(root / path, JPEG)
    return root


def _labels(source: Path, **options: Folders) -> dict[str, dict[str, int]]:
    return {split.name: {i.key: i.label for i in split.images} for split in list_splits(source, **options)}


def test_classes_that_are_called_like_splits(tmp_path: Path) -> None:
    """Vehicles: two of the three classes were lost to a split of the third."""
    _fill(tmp_path, "bus/1.jpg", "car/1.jpg", "train/1.jpg")
    with pytest.raises(
        DataError,
        match=r"holds train beside 2 other folders of images \(bus, car\), so they may be classes or splits; say "
        r"which with --folders classes or --folders splits \(the others are then left out\)",
    ):
        list_splits(tmp_path)
    assert _labels(tmp_path, folders="classes") == {"train": {"bus/1": 0, "car/1": 1, "train/1": 2}}
    listed = list_source(tmp_path, folders="splits")
    assert [(split.name, [image.key for image in split.images]) for split in listed.splits] == [("train", ["1"])]
    assert listed.passed_over.counts == {"images": 2}


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("train", "valid", "val"),
        ("Train", "Test", "test"),
        ("TRAINING", "Validation", "val"),
        ("train", "dev", "val"),
        ("training", "testing", "test"),
    ],
)
@pytest.mark.parametrize("tars", [False, True])
def test_folders_and_tars_know_the_same_words(tmp_path: Path, train: str, other: str, split: str, tars: bool) -> None:
    for name in (train, other):
        if tars:
            write_members(tmp_path / name / "0.tar", [("a.jpg", JPEG), ("a.cls", b"ant")])
            write_members(tmp_path / f"names/x-{name}-0.tar", [("a.jpg", JPEG), ("a.cls", b"ant")])
        else:
            _fill(tmp_path, f"{name}/ant/1.jpg", f"{name}/bee/1.jpg")
    if tars:
        by_name = list_splits(tmp_path / "names")
        assert [found.name for found in by_name] == ["train", split]
        for path in (tmp_path / "names").iterdir():
            path.unlink()
        (tmp_path / "names").rmdir()
    found = list_splits(tmp_path)
    assert [(split.name, len(split.images)) for split in found] == [("train", 2 - tars), (split, 2 - tars)]
    assert found[0].classes == found[1].classes == (("ant",) if tars else ("ant", "bee"))


@pytest.mark.parametrize("names", [("train2017", "val2017"), ("train_set", "test_set"), ("Train-A", "Validation-A")])
def test_splits_by_a_part_of_their_names(tmp_path: Path, names: tuple[str, str]) -> None:
    """They became the classes 0 and 1."""
    for name in (*names, "unlabelled"):
        _fill(tmp_path, f"{name}/ant/1.jpg", f"{name}/bee/1.jpg")
    with pytest.raises(
        DataError,
        match=rf"holds .*{names[0]}.*, which may be classes or splits by their names; say which with --folders "
        r"classes or --folders splits",
    ):
        list_splits(tmp_path)
    assert [split.classes for split in list_splits(tmp_path, folders="splits")] == [("ant", "bee")] * 2
    assert list_splits(tmp_path, folders="classes")[0].classes == tuple(sorted((*names, "unlabelled")))
    for name in names:
        write_members(tmp_path / "tars" / name / "0.tar", [("1.jpg", JPEG)])
    assert [split.name[0] for split in list_splits(tmp_path / "tars", "webdataset", folders="splits")] == [
        name[0].lower() for name in names
    ]


def test_a_class_with_a_splits_word_in_its_name(tmp_path: Path) -> None:
    _fill(tmp_path, "bullet_train/1.jpg", "freight_car/1.jpg")
    assert list_splits(tmp_path)[0].classes == ("bullet_train", "freight_car")


def test_two_folders_for_one_split(tmp_path: Path) -> None:
    _fill(tmp_path, "train/ant/1.jpg", "val/ant/1.jpg", "valid/ant/1.jpg")
    with pytest.raises(DataError, match=r"holds val and valid, which by name are the same split, val; put what"):
        list_splits(tmp_path)
    for name in ("train", "test", "testing"):
        write_members(tmp_path / f"tars/{name}/0.tar", [("a.jpg", JPEG)])
    with pytest.raises(DataError, match=r"holds test and testing, which by name are the same split, test; put"):
        list_splits(tmp_path / "tars")


def test_tars_that_tell_two_splits_or_lie_beside_them(tmp_path: Path) -> None:
    write_members(tmp_path / "a/test-of-train-0.tar", [("a.jpg", JPEG)])
    with pytest.raises(DataError, match=r"1 of 1 tars in .* do not tell one split .*: test-of-train-0\.tar; put the"):
        list_splits(tmp_path / "a")
    for name in ("train/0.tar", "more.TAR"):
        write_members(tmp_path / "b" / name, [(f"{name[0]}.jpg", JPEG)])
    with pytest.raises(DataError, match=r"1 tars lie beside the folders train of .*b, for example more\.TAR; move the"):
        list_splits(tmp_path / "b")
    listed = list_source(tmp_path / "b", folders="splits")
    assert ([len(split.images) for split in listed.splits], listed.passed_over.counts) == ([1], {".tar": 1})
    write_members(tmp_path / "b/extra/0.tar", [("x.jpg", JPEG)])
    with pytest.raises(DataError, match=r"b holds train beside 1 other folders of tars \(extra\), so they may be"):
        list_splits(tmp_path / "b")


def test_images_beside_the_splits(tmp_path: Path) -> None:
    _fill(tmp_path, "train/ant/1.jpg", "1.jpg", "2.jpg")
    with pytest.raises(
        DataError,
        match=r"2 images lie beside the folders train of .*, for example 1\.jpg; move them into one of these, or leave "
        r"them out with --folders splits",
    ):
        list_splits(tmp_path)
    assert list_source(tmp_path, folders="splits").passed_over.counts == {"images": 2}


def test_splits_inside_of_classes(tmp_path: Path) -> None:
    _fill(tmp_path, "bolt/train/good/1.jpg", "bolt/test/good/2.jpg", "nut/train/good/1.jpg")
    with pytest.raises(
        DataError,
        match=r"holds 3 folders inside of classes that are called as splits \(bolt/test, bolt/train, nut/train\); name "
        r"one of the folders above them, or take all they hold for train's with --folders classes",
    ):
        list_splits(tmp_path)
    assert len(_labels(tmp_path, folders="classes")["train"]) == 3
    assert list(_labels(tmp_path / "bolt")) == ["train", "test"]


def test_system_folders_are_no_classes(tmp_path: Path) -> None:
    """Synology's thumbnails became a class, which shifted the labels of all others."""
    _fill(tmp_path, "train/ant/1.jpg", "train/bee/1.jpg", "val/bee/2.jpg", "train/ant/@eaDir/1.jpg/SYNO_THUMB.jpg")
    junk = ("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX", ".git")
    for name in junk:
        _fill(tmp_path, f"{name}/1.jpg", f"train/{name}/1.jpg", f"val/{name}/bee/1.jpg")
    for name in ("._1.jpg", "Thumbs.db", "desktop.ini", ".DS_Store"):
        write_file(tmp_path / "train/ant" / name, "x")
    listed = list_source(tmp_path)
    assert [split.classes for split in listed.splits] == [("ant", "bee"), ("ant", "bee")]
    assert [[image.key for image in split.images] for split in listed.splits] == [["ant/1", "bee/1"], ["bee/2"]]
    assert listed.passed_over.counts == {"hidden or system": 3 * len(junk) + 5}
    tar = write_members(
        tmp_path / "a.tar", [("ant/1.jpg", JPEG), ("ant/@eaDir/1.jpg/T.jpg", JPEG), ("__MACOSX/ant/._1.jpg", b"mac")]
    )
    listed = list_source(tar)
    assert [image.key for image in listed.splits[0].images] == ["ant/1"]
    assert listed.passed_over.summary() == "2 hidden or system members of tars"


def test_images_are_known_by_suffix_or_first_bytes(tmp_path: Path) -> None:
    images = {
        "a.mpo": JPEG,
        "b.jpx": tiny_image(2, "JPEG2000"),
        "c": tiny_image(3, "PNG"),
        "photo.jpg?itok=1": tiny_image(4),
        "photo.jpg?itok=2": tiny_image(5),
        "f.0": tiny_image(6, "BMP"),
        "g.bin": tiny_image(7, "WEBP"),
        "h.data": tiny_image(8, "PPM"),
    }
    for name, data in images.items():
        write_file(tmp_path / "source/ant" / name, data)
    for name in ("notes", "x.json", "y.xyz", "z.txt", "empty"):
        write_file(tmp_path / "source/ant" / name, "" if name == "empty" else "a text")
    listed = list_source(tmp_path / "source")
    assert [image.path for image in listed.splits[0].images] == sorted(f"ant/{name}" for name in images)
    assert listed.passed_over.counts == {"no extension": 2, ".json": 1, ".xyz": 1, ".txt": 1}
    found = shards_of(tmp_path / "source", tmp_path / "out")["train"]
    assert len(found) == len(images)
    assert {JPEG, *(images[name] for name in ("c", "g.bin", "photo.jpg?itok=2"))} <= {s.data for s in found.values()}


def test_what_is_no_file_is_counted(tmp_path: Path) -> None:
    _fill(tmp_path, "ant/1.jpg")
    os.mkfifo(tmp_path / "ant/2.jpg")
    (tmp_path / "ant/loop").symlink_to("loop")
    (tmp_path / "ant/gone.txt").symlink_to("nowhere")
    listed = list_source(tmp_path)
    assert [image.path for image in listed.splits[0].images] == ["ant/1.jpg"]
    assert listed.passed_over.counts == {"links to nothing, pipes or devices": 3}


def test_the_report_ends_with_what_became_no_image(tmp_path: Path) -> None:
    source = _fill(tmp_path / "source", "train/ant/1.jpg", "train/bee/1.jpg", "val/bee/1.jpg")
    for name in ("train/cow/list.txt", "train/dog/list.txt", "README.md", "train/ant/.DS_Store"):
        write_file(source / name, "x")
    done = CliRunner().invoke(main, ["shards", str(source), str(tmp_path / "out"), "--workers", "1"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == (
        "passed over: 1 hidden or system (for example train/ant/.DS_Store), 3 files of other kinds (.txt 2, .md 1); "
        "classes without images: 2 in train (cow, dog), 1 in val (ant)"
    )
    again = CliRunner().invoke(main, ["shards", str(source), str(tmp_path / "out")])
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    listed = tmp_path / "list.txt"
    listed.write_text("train/ant/1.jpg\n")
    done = CliRunner().invoke(main, ["shards", str(source), str(tmp_path / "b"), "--list", str(listed)])
    assert done.stdout.splitlines()[-1].startswith("passed over: only what the lists name was looked at;")


def test_names_that_no_terminal_shows(tmp_path: Path) -> None:
    """A name that is not UTF-8 ended the report of hours of work with a traceback; a line break makes two lines."""
    source = _fill(tmp_path / "source", "ant\nbee/1.jpg", "train/1.jpg")
    for name in (b"\xff.jpg", b"empty-\xfe"):
        os.makedirs(os.fsencode(source / "cow") + b"/" + name)
    os.makedirs(os.fsencode(source) + b"/cow-\xfd")
    (source / "train/1.jpg").rename(os.fsdecode(os.fsencode(source / "train") + b"/\xff.jpg"))
    done = CliRunner().invoke(
        main, ["shards", str(source), str(tmp_path / "out"), "--workers", "1", "--folders", "classes"]
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].endswith("classes without images: 2 in train (cow, cow-\\udcfd)")
    done = CliRunner().invoke(
        main, ["shards", str(source), str(tmp_path / "b"), "--workers", "1", "--folders", "splits"]
    )
    assert done.stdout.splitlines()[-1].startswith("passed over: 1 images (for example ant\\nbee/1.jpg); ")
    done = CliRunner().invoke(main, ["shards", str(source), str(tmp_path / "c")])
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)


@pytest.mark.parametrize("below", ["", "train/", "Train/ant/", "deep/er/"])
def test_a_folder_around_any_layout(tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_file(tmp_path / "README.md", "x")
    source = _fill(tmp_path, f"animals/{below}bee/1.jpg", f"animals/{below}cow/1.jpg").resolve()
    listed = list_source(source)
    inside = source / f"animals/{'deep/er' if 'deep' in below else ''}"
    assert (listed.source.path, listed.source.kind) == (inside, "folder")
    keys = {"Train/ant/": ["ant/bee/1", "ant/cow/1"]}.get(below, ["bee/1", "cow/1"])
    assert [image.key for image in listed.splits[0].images] == keys
    assert listed.passed_over.counts == {".md": 1}
    assert f"note: {source} holds all in one folder, {inside}, which is taken as the source" in capsys.readouterr().err
    assert find_source(source, folders="classes").path == source


def test_a_folder_around_tars_and_marked_layouts(tmp_path: Path) -> None:
    write_members(tmp_path / "a/wds/train/0.tar", [("1.jpg", JPEG)])
    assert find_source(tmp_path / "a").kind == "webdataset"
    for split in ("train", "val", "test"):
        write_file(tmp_path / f"b/mini/{split}.csv", f"filename,label\n{split}.jpg,{split}\n")
    _fill(tmp_path, *(f"b/mini/images/{split}.jpg" for split in ("train", "val", "test")))
    for kind in (None, "miniimagenet"):
        listed = list_source(tmp_path / "b", kind)
        assert (listed.source.kind, len(listed.splits)) == ("miniimagenet", 3)
        assert listed.passed_over.summary() == "nothing"


def test_folders_called_by_what_they_hold_are_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As detectors' data sets have it: train/images beside train/labels, or images/train beside labels/train."""
    _fill(tmp_path, "a/train/images/1.jpg", "a/valid/images/2.jpg", "b/images/train/1.jpg", "b/images/val/2.jpg")
    for name in ("a/train/labels/1.txt", "a/valid/labels/2.txt", "b/labels/train/1.txt", "b/labels/val/2.txt"):
        write_file(tmp_path / name, "0 0.5 0.5 1 1")
    for root in ("a", "b"):
        assert _labels(tmp_path / root) == {"train": {"1": -1}, "val": {"2": -1}}
        assert list_source(tmp_path / root).passed_over.counts == {".txt": 2}
    assert "a/train lie in " in capsys.readouterr().err
    _fill(tmp_path, "c/train/train/bee/1.jpg", "c/train/train/cow/1.jpg")
    assert _labels(tmp_path / "c") == {"train": {"bee/1": 0, "cow/1": 1}}


def test_a_folder_of_all_images_beside_others(tmp_path: Path) -> None:
    """As in Oxford Pets, with masks in annotations/; and as in Caltech-101, whose annotations are no images."""
    _fill(
        tmp_path, "a/images/1.jpg", "a/annotations/trimaps/1.png", "b/101_Objects/ant/1.jpg", "b/101_Objects/bee/1.jpg"
    )
    with pytest.raises(
        DataError,
        match=r"a holds images beside 1 other folders of images \(annotations\), so it may hold all images, or be a "
        r"class; name .*a/images, take all for classes with --folders classes, or all images without labels with "
        r"--label-field none",
    ):
        list_splits(tmp_path / "a")
    assert list_splits(tmp_path / "a", folders="classes")[0].classes == ("annotations", "images")
    write_file(tmp_path / "b/Annotations/ant/1.mat", "x")
    assert _labels(tmp_path / "b") == {"train": {"ant/1": 0, "bee/1": 1}}


def test_a_split_that_loses_its_labels_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _fill(tmp_path, "train/ant/1.jpg", "test/1.jpg")
    assert _labels(tmp_path) == {"train": {"ant/1": 0}, "test": {"1": -1}}
    assert f"note: the images of test in {tmp_path} lie in no class folders, and have no labels" in (
        capsys.readouterr().err
    )


NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def test_tars_that_are_not_there(tmp_path: Path) -> None:
    write_members(tmp_path / "0.tar", [("1.jpg", JPEG)])
    (tmp_path / "1.tar").symlink_to("nowhere")
    with pytest.raises(MissingError, match=r"1\.tar is not there; bring it there, or name another"):
        list_splits(tmp_path)


def test_names_that_look_the_same(tmp_path: Path) -> None:
    _fill(tmp_path, f"a/train/{NFC}/1.jpg", "a/train/bar/1.jpg", f"a/val/{NFD}/1.jpg", "a/val/bar/1.jpg")
    train, val = list_splits(tmp_path / "a")
    assert train.classes == val.classes == ("bar", NFC)
    assert [image.label for image in val.images] == [0, 1]
    _fill(tmp_path, f"b/{NFC}/1.jpg", f"b/{NFD}/1.jpg")
    with pytest.raises(
        DataError,
        match=r"b has 1 classes whose names look like another's, written with other code points: "
        r".*\('(cafe\\u0301|caf\\xe9)'\); rename one of each two, or put them together",
    ):
        list_splits(tmp_path / "b")
    table = write_file(tmp_path / "list.csv", f"filename,label,split\n{NFC}.jpg,{NFC},train\nx.jpg,{NFD},val\n")
    _fill(tmp_path, f"c/{NFD}.jpg", "c/x.jpg")
    train, val = list_splits(tmp_path / "c", lists=[str(table)])
    assert (train.images[0].path, train.images[0].label, val.images[0].label) == (f"{NFD}.jpg", 0, 0)
    with pytest.raises(DataError, match=r"1 of 1 files are not in .*/c: 'gone\.jpg'"):
        list_splits(tmp_path / "c", lists=[str(write_file(tmp_path / "gone.txt", "gone.jpg\n"))])


def test_nothing_but_system_folders(tmp_path: Path) -> None:
    _fill(tmp_path, "@eaDir/1.jpg")
    with pytest.raises(DataError, match=r"no images in "):
        list_splits(tmp_path)
    with pytest.raises(MissingError, match=r"no folder"):
        list_splits(tmp_path / "nowhere")


_PARTS = st.sampled_from(["train", "Val", "test", "ant", "bee", "images", "@eaDir", "train2017", "._x", ".git"])
_LEAVES = st.sampled_from(["1.jpg", "2.PNG", "photo", "a.jpg?x=1", "notes.txt", "._1.jpg", "README", "Thumbs.db"])
_PATHS = st.tuples(st.lists(_PARTS, max_size=3), _LEAVES).map(lambda path: "/".join([*path[0], path[1]]))


@settings(max_examples=80, deadline=None)
@given(paths=st.sets(_PATHS, min_size=1, max_size=8), folders=st.sampled_from([None, "classes", "splits"]))
def test_every_file_is_taken_counted_or_refused(
    paths: set[str], folders: Folders | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for path in paths:
        write_file(root / path, b"text" if path.endswith(("txt", "README", "db")) else JPEG)
    try:
        listed = list_source(root, folders=folders)
    except DataError:
        return
    system = {"._x", ".git", "@eaDir", "Thumbs.db", "._1.jpg"}
    tops = {  # a folder that is passed over counts once
        "/".join(path.split("/")[: [part in system for part in path.split("/")].index(True) + 1])
        for path in paths
        if system & set(path.split("/"))
    }
    plain = [path for path in paths if not system & set(path.split("/"))]
    taken = sum(len(split.images) for split in listed.splits)
    assert listed.passed_over.counts["hidden or system"] == len(tops)
    assert taken + listed.passed_over.counts.total() == len(plain) + len(tops)
    if folders is None:
        assert taken == sum(not path.endswith(("txt", "README")) for path in plain)
