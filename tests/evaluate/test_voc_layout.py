from pathlib import Path

import pytest

from bowstore.evaluate.voc_layout import find_devkit, read_ids


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("VOCdevkit/VOC2012", "VOCdevkit/VOC2012"),
        ("VOCdevkit", "VOCdevkit/VOC2012"),
        (".", "VOCdevkit/VOC2012"),
        ("VOCdevkit/VOC2007", "VOCdevkit/VOC2012"),
        ("pascal", "pascal"),
        ("nowhere", "nowhere/VOC2012"),
        ("nowhere/VOC2007", "nowhere/VOC2012"),
        ("kaggle/VOC2012", "kaggle/VOC2012/VOCdevkit/VOC2012"),
        ("kaggle/VOC2007", "kaggle/VOC2012"),
    ],
)
def test_a_devkit_however_it_is_named(tmp_path: Path, named: str, found: str) -> None:
    for folder in ("VOCdevkit/VOC2007", "VOCdevkit/VOC2012", "pascal", "kaggle/VOC2012/VOCdevkit/VOC2012"):
        (tmp_path / folder / "JPEGImages").mkdir(parents=True)
    assert find_devkit(tmp_path / named, 2012) == tmp_path / found


def test_the_folder_of_another_year_is_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by a dot, too, which is no name: its images would be counted as those of the other year."""
    (tmp_path / "VOC2007/JPEGImages").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "VOC2007")
    assert find_devkit(Path("."), 2012) == tmp_path / "VOC2012"
    assert find_devkit(Path("."), 2007) == tmp_path / "VOC2007"


def test_what_a_list_may_hold(tmp_path: Path) -> None:
    """Ids, with any ends of lines, or the files of an image and its mask."""
    path = tmp_path / "list.txt"
    path.write_bytes(b"2007_000032 \r\n\r\nmy.image\r\n/JPEGImages/2007_000039.jpg /Masks/2007_000039.png\r\n")
    assert read_ids(path) == ("2007_000032", "my.image", "2007_000039")
