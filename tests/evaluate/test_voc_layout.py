from pathlib import Path

import pytest

from bowstore.evaluate.voc_layout import find_devkit


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
    ],
)
def test_a_devkit_however_it_is_named(tmp_path: Path, named: str, found: str) -> None:
    for folder in ("VOCdevkit/VOC2007", "VOCdevkit/VOC2012", "pascal"):
        (tmp_path / folder / "JPEGImages").mkdir(parents=True)
    assert find_devkit(tmp_path / named, 2012) == tmp_path / found
