"""The embedded data set: deterministic, balanced, resumable, refusing what does not fit."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from left_behind import left_behind
from PIL import Image

from bowstore.data import synthetic
from bowstore.data.synthetic import CLASSES, write_images
from bowstore.errors import MismatchError
from bowstore.files import read_json


def render(seed: int, split: str, index: int, size: int) -> tuple[np.ndarray, int]:
    picture, label = synthetic.render(seed, split, index, size)
    assert picture.mode == "RGB"
    return np.asarray(picture), label


def digests(folder: Path) -> dict[str, str]:
    paths = sorted(folder.rglob("*.jpg"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_classes_are_ten_and_in_the_order_of_their_folders() -> None:
    assert len(CLASSES) == 10
    assert list(CLASSES) == sorted(set(CLASSES))


@pytest.mark.parametrize("size", [16, 32, 65, 96])
def test_images_have_the_asked_size_and_some_contrast(size: int) -> None:
    for index in range(10):
        pixels, label = render(0, "train", index, size)
        assert pixels.shape == (size, size, 3)
        assert pixels.dtype == np.uint8
        assert label == index
        assert pixels.std() > 3


def test_an_image_depends_on_its_arguments_alone() -> None:
    first = [render(5, "val", index, 32)[0] for index in range(20)]
    again = [render(5, "val", index, 32)[0] for index in reversed(range(20))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_seed_split_and_index_each_change_the_image() -> None:
    pictures = [
        render(0, "train", 0, 32)[0],
        render(1, "train", 0, 32)[0],
        render(0, "val", 0, 32)[0],
        render(0, "train", 10, 32)[0],
    ]
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_labels_are_balanced() -> None:
    counts = Counter(render(0, "train", index, 16)[1] for index in range(100))
    assert counts == dict.fromkeys(range(10), 10)


def test_mean_colour_tells_neither_the_class_nor_the_rotation() -> None:
    means_N3 = np.stack([render(0, "train", index, 16)[0].mean(axis=(0, 1)) for index in range(400)])
    by_class = means_N3.reshape(40, 10, 3).mean(axis=0)
    standard_error = means_N3.std(axis=0) / np.sqrt(40)
    assert (np.abs(by_class - means_N3.mean(axis=0)) < 4.5 * standard_error).all()
    rows_NS = np.stack([render(0, "train", index, 16)[0].mean(axis=(1, 2)) for index in range(400)])
    brighter_above = (rows_NS[:, :4].mean(axis=1) > rows_NS[:, -4:].mean(axis=1)).mean()
    assert 0.4 < brighter_above < 0.6


def test_writing_is_complete_and_the_same_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "_CHUNK_IMAGES", 10)
    write_images(tmp_path / "one", train=33, val=12, size=16, seed=3, workers=1)
    write_images(tmp_path / "two", train=33, val=12, size=16, seed=3, workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert len(digests(tmp_path / "one")) == 45
    assert {path.name for path in (tmp_path / "one" / "train").iterdir()} == set(CLASSES)
    with Image.open(tmp_path / "one" / "val" / "boat" / "000011.jpg") as picture:
        assert picture.size == (16, 16)
        assert picture.format == "JPEG"


def test_a_second_run_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, train=10, val=10, size=16, workers=1)
    monkeypatch.setattr(synthetic, "render", lambda *_: pytest.fail("rendered again"))
    write_images(tmp_path, train=10, val=10, size=16, workers=1)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "whole", train=20, val=10, size=16, workers=1)
    rendered: list[int] = []

    def failing(seed: int, split: str, index: int, size: int) -> tuple[Image.Image, int]:
        if len(rendered) == 13:
            raise KeyboardInterrupt
        rendered.append(index)
        return real(seed, split, index, size)

    real = synthetic.render
    monkeypatch.setattr(synthetic, "render", failing)
    with pytest.raises(KeyboardInterrupt):
        write_images(tmp_path / "cut", train=20, val=10, size=16, workers=1)
    assert len(digests(tmp_path / "cut")) == 13
    assert read_json(tmp_path / "cut" / synthetic.MARKER)["complete"] is False
    leftover = left_behind(tmp_path / "cut" / "train" / "bird" / "000000.jpg")

    rendered.clear()
    monkeypatch.setattr(synthetic, "render", lambda *rest: rendered.append(rest[2]) or real(*rest))
    write_images(tmp_path / "cut", train=20, val=10, size=16, workers=1)
    assert len(rendered) == 17
    assert not leftover.exists()
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_other_images_in_the_folder_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "mine", train=10, val=10, size=16, workers=1)
    with pytest.raises(MismatchError, match=r"size 16, not 32; name another folder"):
        write_images(tmp_path / "mine", train=10, val=10, size=32, workers=1)
    (tmp_path / "foreign" / "train").mkdir(parents=True)
    with pytest.raises(MismatchError, match="did not render"):
        write_images(tmp_path / "foreign", train=10, val=10, size=16, workers=1)
