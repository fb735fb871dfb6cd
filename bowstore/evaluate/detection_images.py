"""Images and boxes as detection takes them: which when, how large, and decoded by worker processes.

Legend: N images, M objects of an image, C H W.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bowstore.data.image_header import check_before_decoding
from bowstore.data.images import FORMATS
from bowstore.errors import BowstoreError, DataError, MissingError, is_machine_error
from bowstore.evaluate.protocols.voc0712_detection import Schedule
from bowstore.evaluate.voc_boxes import BoxedSplit

_ORDER, _LOOK = 0, 1  # streams of random numbers


class Draw(NamedTuple):
    """An image of a batch: its row, the short side that it gets, pixels, and whether it is mirrored."""

    row: int
    short: int
    mirrored: bool = False


class Shown(NamedTuple):
    """An image as the network gets it.

    Attributes:
        image: uint8 (3, H, W).
        target: "boxes" float32 (M, 4), pixels of that image, and "labels" int64 (M,), from 1.
        row: in the split.
    """

    image: Tensor
    target: dict[str, Tensor]
    row: int


def train_draws(split: BoxedSplit, plan: Schedule, seed: int, *, start: int = 0) -> Iterator[list[Draw]]:
    """The images of each iteration over all ranks, for ever: a function of seed and iteration alone.

    Images are shuffled once a pass. Those of an iteration are all wider than high, or none is, so that little is
    padded; the others wait for the next of their kind. Images without an object are left out.

    Args:
        split: of train images.
        plan: how many, how large.
        seed: of everything.
        start: the first iteration that is given.
    """
    for iteration, rows in islice(enumerate(_orders(split, plan.batch, seed)), start, None):
        draws = np.random.default_rng([seed, _LOOK, iteration])
        short = draws.choice(plan.sides, len(rows))
        mirrored = draws.random(len(rows)) < 0.5
        yield [Draw(*each) for each in zip(rows, short.tolist(), mirrored.tolist(), strict=True)]


def _orders(split: BoxedSplit, batch: int, seed: int) -> Iterator[list[int]]:
    rows = np.array([row for row, each in enumerate(split.objects) if len(each.labels)])
    wide_N = split.sizes[:, 1] > split.sizes[:, 0]
    waiting: tuple[list[int], list[int]] = ([], [])
    for pass_number in count():
        for row in np.random.default_rng([seed, _ORDER, pass_number]).permutation(rows).tolist():
            kind = waiting[int(wide_N[row])]
            kind.append(row)
            if len(kind) == batch:
                yield kind.copy()
                kind.clear()


def resized(height: int, width: int, *, short: int, longest: int) -> tuple[int, int]:
    """Height and width for a short side, or less where the long side would be too long; as Detectron2 rounds."""
    scale = min(short / min(height, width), longest / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


@dataclass(frozen=True)
class Images(Dataset["Shown | BowstoreError"]):
    """Decodes, resizes (bilinear, with antialias) and mirrors; what is wrong with an image is given back, not raised.

    Attributes:
        split: the images.
        longest: bound of the long side, pixels.
    """

    split: BoxedSplit
    longest: int

    def __getitem__(self, draw: Draw) -> "Shown | BowstoreError":
        """The image of a draw; `Dataset` calls it in a worker, whose exceptions would come with its traceback."""
        try:
            return self._shown(draw)
        except BowstoreError as error:
            return error

    def _shown(self, draw: Draw) -> Shown:
        image = _decoded(self.split, draw.row)
        height, width = resized(image.height, image.width, short=draw.short, longest=self.longest)
        scale = np.array([width / image.width, height / image.height] * 2, np.float32)
        objects = self.split.objects[draw.row]
        boxes_M4 = objects.boxes * scale
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        if draw.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes_M4 = np.stack([width - boxes_M4[:, 2], boxes_M4[:, 1], width - boxes_M4[:, 0], boxes_M4[:, 3]], 1)
        pixels_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        target = {"boxes": torch.from_numpy(boxes_M4), "labels": torch.from_numpy(objects.labels + 1)}
        return Shown(pixels_CHW, target, draw.row)


def _decoded(split: BoxedSplit, row: int) -> Image.Image:
    """RGB, as it lies in the file (no EXIF rotation): boxes are in these pixels."""
    path = split.paths[row]
    try:
        check_before_decoding(path.read_bytes(), str(path))
        with Image.open(path, formats=FORMATS) as image:
            rgb = image.convert("RGB")
    except FileNotFoundError as error:
        raise MissingError(f"no image {path}; it was there when the evaluation began") from error
    except BowstoreError:
        raise
    except Exception as error:  # decoders meet damaged bytes with any exception there is
        if is_machine_error(error):
            raise
        raise DataError(
            f"image {path} cannot be decoded ({' '.join(str(error).split())}); extract the devkit again"
        ) from error
    if (rgb.height, rgb.width) != tuple(split.sizes[row]):
        raise DataError(
            f"image {path} has another size than when the evaluation began; leave it alone, and start again"
        )
    return rgb


def loaded(images: Images, draws: Iterable[list[Draw]], workers: int) -> Iterator[list[Shown]]:
    """Batches of images in the order of their draws, made ahead by worker processes.

    Args:
        images: what is drawn from.
        draws: of each batch.
        workers: processes; 0 for none.

    Raises:
        BowstoreError: what was wrong with an image.
    """
    loader: Any = DataLoader(images, batch_sampler=draws, num_workers=workers, collate_fn=list)
    for batch in loader:
        for each in batch:
            if isinstance(each, BowstoreError):
                raise each
        yield batch
