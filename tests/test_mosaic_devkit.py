"""Mosaics: labels, boxes and masks say the same, and say what was pasted where."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from mosaic_devkit import BORDER, CELL, main
from PIL import Image

COLOURS = {"blue": (40, 60, 230), "green": (30, 200, 60), "red": (230, 40, 40)}


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (50, 70), colour).save(folder / "one.png")
    out = tmp_path / "devkit"
    result = CliRunner().invoke(main, [str(tmp_path / "images"), str(out), "--trainval", "9", "--test", "8"])
    assert result.exit_code == 0, result.output
    return out


def labels(folder: Path, split: str) -> dict[str, set[str]]:
    """Classes present, by image, as the lists have them."""
    found = {image_id: set[str]() for image_id in (folder / f"ImageSets/Main/{split}.txt").read_text().split()}
    for name in COLOURS:
        for line in (folder / f"ImageSets/Main/{name}_{split}.txt").read_text().splitlines():
            image_id, sign = line.split()
            if sign == "1":
                found[image_id].add(name)
    return found


def test_lists_boxes_masks_and_pixels_agree(devkit: Path) -> None:
    names = sorted(COLOURS)
    for split, other, count in (("trainval", "train", 9), ("test", "val", 8)):
        present = labels(devkit / "VOC2007", split)
        assert len(present) == count
        assert list(present) == (devkit / f"VOC2012/ImageSets/Segmentation/{other}.txt").read_text().split()
        for image_id, classes in present.items():
            root = ElementTree.parse(devkit / f"VOC2007/Annotations/{image_id}.xml").getroot()
            pixels = np.asarray(Image.open(devkit / f"VOC2007/JPEGImages/{image_id}.jpg")).astype(int)
            mask = np.asarray(Image.open(devkit / f"VOC2012/SegmentationClass/{image_id}.png"))
            boxes = {}
            for found in root.iter("object"):
                left, top, right, bottom = (
                    int(found.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")
                )
                assert (right - left, bottom - top) == (CELL - 1, CELL - 1)
                boxes[left - 1, top - 1] = name = found.findtext("name", "")
                inside = mask[top - 1 : bottom, left - 1 : right]
                assert (inside == names.index(name) + 1).sum() == (CELL - 2 * BORDER) ** 2
                assert (inside == 255).sum() == CELL**2 - (CELL - 2 * BORDER) ** 2
                middle = pixels[top - 1 + CELL // 2, left - 1 + CELL // 2]
                assert np.abs(middle - COLOURS[name]).max() < 12
            assert set(boxes.values()) == classes
            assert (mask == 0).sum() == (4 - len(boxes)) * CELL**2


def test_a_folder_that_is_there_is_kept(devkit: Path) -> None:
    result = CliRunner().invoke(main, [str(devkit.parent / "images"), str(devkit)])
    assert result.exit_code == 2
    assert f"{devkit} exists; name a folder that does not" in result.output
