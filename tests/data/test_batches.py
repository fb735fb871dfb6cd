"""Batches of very large images are cut, by their pixels alone; all others stay as they are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shard_sets import ShardMaker, encode_jpeg, textured_image
from test_pipeline import a_plan

from bowstore.config import ViewConfig
from bowstore.data import batches
from bowstore.data.batches import TrainingPixels, bounded
from bowstore.data.file_reader import FileReader
from bowstore.data.pipeline import clean_batches
from bowstore.data.plan import Plan
from bowstore.data.reader import ShardReader
from bowstore.data.views import clean_view


class Sizes:
    """Images of given numbers of megapixels."""

    def __init__(self, *megapixels: float) -> None:
        self._pixels = (np.array(megapixels) * 1e6).astype(np.int64)

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        raise AssertionError("sizes come from the index")

    def name(self, row: int) -> str:
        return f"photo{row}"

    def pixels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._pixels[rows]


def cut(*megapixels: float) -> list[list[int]]:
    return [part.tolist() for part in bounded(Sizes(*megapixels), [np.arange(len(megapixels))])]


@pytest.mark.parametrize(
    ("megapixels", "parts"),
    [
        ([12.4] * 16, [list(range(16))]),  # photographs of a telephone
        ([0.2] * 256, [list(range(256))]),  # ImageNet on a GPU
        ([81.0] * 5, [[0, 1], [2, 3], [4]]),
        ([200.0, 1.0], [[0], [1]]),
        ([1.0, 199.0, 1.0], [[0, 1], [2]]),
        ([100.0, 100.0], [[0, 1]]),
        ([], [[]]),
    ],
)
def test_batches_are_cut_by_pixels(megapixels: list[float], parts: list[list[int]]) -> None:
    assert cut(*megapixels) == parts


def test_an_image_too_large_for_a_batch_is_alone_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cut(1, 300, 1, 1) == [[0], [1], [2, 3]]
    assert capsys.readouterr().err == (
        "warning: image 'photo1' has 300 megapixels and takes 0.9 GB or more to decode; make the shards of a smaller "
        "copy if memory runs out\n"
    )


def test_rows_keep_their_order_and_pixels(
    make_shard_set: ShardMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    index = make_shard_set(23)
    source, view = ShardReader(index), clean_view(ViewConfig(size=32, resize=32))
    assert source.pixels(np.array([4, 3])).tolist() == [
        int(index.height[row]) * int(index.width[row]) for row in (4, 3)
    ]

    def run() -> tuple[list[int], torch.Tensor, list[int]]:
        found = [(rows, images.clone()) for rows, images in clean_batches(
            source, view, np.arange(23), batch=8, device=torch.device("cpu")
        )]  # fmt: skip
        return (
            [row for rows, _ in found for row in rows.tolist()],
            torch.cat([images for _, images in found]),
            [len(rows) for rows, _ in found],
        )

    rows, images, lengths = run()
    assert lengths == [8, 8, 7]
    monkeypatch.setattr(batches, "MAX_BATCH_PIXELS", 3 * 36 * 34)
    some_rows, some_images, some_lengths = run()
    assert some_rows == rows == list(range(23))
    assert torch.equal(some_images, images)
    assert max(some_lengths) <= 4
    assert len(some_lengths) > 6


def test_files_tell_their_pixels(tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "a.jpg").write_bytes(encode_jpeg(textured_image(0, 20, 31)))
    (folder / "b.jpg").write_bytes(b"no image")
    reader = FileReader([folder / "a.jpg", folder / "b.jpg", folder / "gone.jpg"])
    assert reader.pixels(np.array([2, 0, 1])).tolist() == [0, 620, 0]


@pytest.mark.parametrize("whole", [False, True])
def test_a_training_batch_of_very_large_images_is_told_once(capsys: pytest.CaptureFixture[str], whole: bool) -> None:
    """Where whole images are decoded and cut, it is their size that counts."""

    def plan(images: int, side: int) -> Plan:
        rows, window = np.arange(images), np.tile(np.array([0, 0, side, side], np.int32), (images, 1))
        return a_plan(images, ViewConfig(), rows=rows, window=window)

    seen = TrainingPixels(Sizes(*[81.0] * 16), whole=whole)
    seen.look(plan(8, 300))
    assert capsys.readouterr().err == ""
    for _ in range(2):
        seen.look(plan(16, 300 if whole else 9000))
    where = "" if whole else " in their windows"
    assert capsys.readouterr().err == (
        f"warning: the 16 images of a training batch have 1296 megapixels{where}, 3.9 GB when decoded, and up to three "
        "batches are held; lower optim.batch, or make the shards of a smaller copy of the images\n"
    )
