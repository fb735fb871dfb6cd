"""Masks of VOC segmentation: which images have one, what may stand in it, and how it is brought to a size.

Legend: N images, H W pixels of an image, K classes.
"""

import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from bowstore.errors import DataError, MissingError, is_machine_error
from bowstore.evaluate.voc_layout import IMAGES, extract, header_size, read_ids, refuse_missing
from bowstore.progress import Progress

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOID = 255  # the borders of objects, and objects that are hard to tell: neither learned nor counted
Split = Literal["train", "trainaug", "val"]
_LISTS: Mapping[Split, tuple[str, ...]] = {
    "train": ("ImageSets/Segmentation/train.txt",),
    "val": ("ImageSets/Segmentation/val.txt",),
    # The augmented list (Hariharan et al., 2011) is no part of the devkit, and lies where its archives put it.
    "trainaug": tuple(
        f"ImageSets/{folder}/{name}.txt"
        for folder in ("Segmentation", "SegmentationAug")
        for name in ("trainaug", "train_aug")
    ),
}
_FOLDERS: Mapping[Split, str] = {"trainaug": "SegmentationClassAug"}
_REMEDIES: Mapping[Split, str] = {
    "trainaug": "put the augmented list there and its masks into SegmentationClassAug, or leave --trainaug out"
}


@dataclass(frozen=True)
class Listed:
    """The images of a split and their masks, in the order of the list.

    Attributes:
        source: the list.
        images: JPEG files.
        masks: PNG files.
    """

    source: Path
    images: tuple[Path, ...]
    masks: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Masks:
    """Masks of a split, uint8: a place in `CLASSES`, or `VOID`. They are kept packed: a few KB each.

    Attributes:
        packed: shape and deflated pixels of each.
        present_NK: int8, 1 where the class is in the mask as its file has it.
        fingerprint: of list and files, whatever size the masks are brought to.
    """

    packed: tuple[tuple[tuple[int, int], bytes], ...]
    present_NK: NDArray[np.int8]
    fingerprint: str

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        """The mask (H, W) of an image."""
        shape, data = self.packed[row]
        return np.frombuffer(bytearray(zlib.decompress(data)), np.uint8).reshape(shape)  # torch wants it writable


def read_listed(voc: Path, split: Split) -> Listed:
    """The images that a list of a devkit names, each with its mask.

    Args:
        voc: the folder with JPEGImages and ImageSets, for example VOCdevkit/VOC2012.
        split: which list; "trainaug" has masks of its own.

    Raises:
        MissingError: no such folder or list; an image or a mask is not there.
        DataError: as `voc_layout.read_ids`.
    """
    if not (voc / IMAGES).is_dir():
        raise MissingError(f"no folder {voc / IMAGES}; name the devkit (VOCdevkit) or its folder VOCdevkit/VOC2012")
    remedy = _REMEDIES.get(split, extract(2012, "trainval"))
    source = next((voc / name for name in _LISTS[split] if (voc / name).is_file()), None)
    if source is None:
        raise MissingError(f"no list {voc / _LISTS[split][0]}; {remedy}")
    ids = read_ids(source)
    images = tuple(voc / IMAGES / f"{name}.jpg" for name in ids)
    masks = tuple(voc / _FOLDERS.get(split, "SegmentationClass") / f"{name}.png" for name in ids)
    for what, paths in (("image", images), ("mask", masks)):
        refuse_missing(source, what, paths, remedy)
    return Listed(source, images, masks)


def read_masks(listed: Listed, side: int | None, what: str) -> Masks:
    """Read the masks of a split, and check each against its image.

    Args:
        listed: as `read_listed` gives it.
        side: they are squashed to side x side pixels, each taking the value of the nearest; None leaves them as they
            are.
        what: for the line of progress.

    Raises:
        DataError: a mask that is no palette or grey PNG, with other values than 0 to 20 and 255, or of another size
            than its image; named by its file.
    """
    packed = []
    present_NK = np.zeros((len(listed), len(CLASSES)), np.int8)
    digest = xxhash.xxh3_128(" ".join(path.stem for path in listed.images).encode())
    with Progress(what, len(listed)) as progress:
        for row, (image, path) in enumerate(zip(listed.images, listed.masks, strict=True)):
            data = path.read_bytes()
            digest.update(data)
            digest.update(str(image.stat().st_size).encode())
            mask_HW, present_NK[row] = _read_mask(data, path)
            height, width = header_size(image)
            if mask_HW.shape != (height, width):
                raise DataError(
                    f"mask {path} has {mask_HW.shape[0]} x {mask_HW.shape[1]} pixels, and its image {height} x "
                    f"{width}; they must be of one size: extract the devkit again"
                )
            if side is not None:
                mask_HW = np.asarray(Image.fromarray(mask_HW).resize((side, side), Image.Resampling.NEAREST))
            packed.append((mask_HW.shape, zlib.compress(mask_HW.tobytes(), 1)))
            progress.advance()
    return Masks(tuple(packed), present_NK, digest.hexdigest())


def _read_mask(data: bytes, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The pixels (H, W), and which classes are among them (K,)."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            mode, mask_HW = image.mode, np.asarray(image)
    except Exception as error:  # damaged bytes end in errors of any kind
        if is_machine_error(error):
            raise
        raise DataError(f"mask {path} is no PNG that can be decoded ({error}); extract the devkit again") from error
    if mode not in ("P", "L"):
        raise DataError(
            f"mask {path} has pixels of mode {mode}; masks are palette or grey PNG of 8 bits, a class a pixel"
        )
    counts = np.bincount(mask_HW.ravel(), minlength=VOID + 1)
    known, others = counts[: len(CLASSES)], counts[len(CLASSES) : VOID]
    if others.any():
        raise DataError(
            f"mask {path} has {others.sum()} pixels of other values than 0 to {len(CLASSES) - 1} and {VOID} (the least "
            f"is {len(CLASSES) + np.flatnonzero(others)[0]}); masks of VOC12 hold those of its 21 classes and void"
        )
    return mask_HW, known > 0
