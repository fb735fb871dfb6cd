"""A source: a NumPy archive of `train_images` uint8 (N, H, W, 3) and `train_labels` (N,), and of other splits."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from bowstore.data.sources.base import SPLIT_NAMES, ImageFile, Kind, Listing, Options, Reader, Split


def recognise(source: Path) -> bool:
    """Whether a path has this layout; looks at names and first bytes only."""
    return source.suffix == ".npz" and source.is_file()


def list_splits(source: Path, _options: Options) -> Listing:
    """The images without their pixels, in one fixed order."""
    stamp = source.stat().st_mtime_ns
    with np.load(source) as arrays:
        labels = {split: arrays[f"{split}_labels"] for split in SPLIT_NAMES if f"{split}_labels" in arrays}
    classes = tuple(f"class-{number}" for number in range(max(map(np.max, labels.values())) + 1))
    splits = [
        Split(
            split,
            classes,
            [ImageFile(f"{split}/{row}.png", f"{split}-{row}", int(label_N[row]), 0, stamp, source.name, row)
             for row in range(len(label_N))],
        )
        for split, label_N in labels.items()
    ]  # fmt: skip
    return Listing(splits)


def open_source(source: Path) -> Reader:
    """A function that returns an image's bytes, here lossless; it opens nothing until it is called."""

    @cache
    def pixels(split: str) -> np.ndarray:
        with np.load(source) as arrays:
            return arrays[f"{split}_images"]

    def read(image: ImageFile) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels(image.path.partition("/")[0])[image.place]).save(buffer, "png")
        return buffer.getvalue()

    return read


KIND = Kind(
    name="npz",
    expects="a file NAME.npz with train_images and train_labels, perhaps val_ and test_ as well",
    example="bowstore shards images.npz data/shards",
    recognise=recognise,
    list_splits=list_splits,
    open=open_source,
)
