"""A small VOC devkit: coloured shapes on noise, several an image, some of them marked difficult."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"blue": (40, 60, 230), "green": (30, 200, 60), "red": (230, 40, 40)}
SIZES = ((60, 44), (44, 60), (96, 40), (33, 33), (24, 50))  # width, height: any shape has to do


def write_devkit(
    root: Path, *, trainval: int = 24, test: int = 15, seed: int = 0, classes: tuple[str, ...] = tuple(COLOURS)
) -> Path:
    """Write a devkit below `root` and return its VOC2007 folder.

    Each class is in about half of the images; image 2 of each split has the first class as a difficult object only.

    Args:
        root: an existing folder.
        trainval: images of that split.
        test: images of that split.
        seed: of labels, places and noise.
        classes: among `COLOURS`.
    """
    voc = root / "VOCdevkit" / "VOC2007"
    images, lists = voc / "JPEGImages", voc / "ImageSets" / "Main"
    images.mkdir(parents=True)
    lists.mkdir(parents=True)
    draws = np.random.default_rng(seed)
    number = 0
    for split, count in (("trainval", trainval), ("test", test)):
        labels = np.where(draws.random((count, len(classes))) < 0.5, 1, -1)
        for k in range(len(classes)):  # at least three of each sign, whatever was drawn
            labels[4 + k : 10 + k, k] = (1, -1, 1, -1, 1, -1)
        labels[2, 0] = 0
        ids = [f"{number + place:06d}" for place in range(1, count + 1)]
        number += count
        for place, image_id in enumerate(ids):
            _image(draws, dict(zip(classes, labels[place], strict=True)), SIZES[place % len(SIZES)]).save(
                images / f"{image_id}.jpg", quality=95
            )
        for k, name in enumerate(classes):
            lines = [f"{image_id} {labels[place, k]:2d}\n" for place, image_id in enumerate(ids)]
            (lists / f"{name}_{split}.txt").write_text("".join(lines))
        (lists / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
    return voc


def _image(draws: np.random.Generator, labels: dict[str, int], size: tuple[int, int]) -> Image.Image:
    """Noise with one disc of the class's colour for each present class, a speck for each difficult one."""
    width, height = size
    image = Image.fromarray(draws.integers(90, 150, (height, width, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    for name, label in labels.items():
        if label < 0:
            continue
        radius = min(size) / 4 if label == 1 else 2
        x, y = draws.uniform(radius, width - radius), draws.uniform(radius, height - radius)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[name])
    return image


def write_masked_devkit(root: Path, *, train: int = 16, val: int = 4, seed: int = 0) -> Path:
    """Write images of two halves, each in the colour of a class, and their masks; return the devkit's VOC2012 folder.

    Classes 0 to 2 are grey, red and blue; the halves lie beside or above each other, void where they meet. Images have
    different sizes.

    Args:
        root: an existing folder.
        train: images of that split.
        val: images of that split.
        seed: of classes and noise.
    """
    voc = root / "VOCdevkit" / "VOC2012"
    images, masks, lists = voc / "JPEGImages", voc / "SegmentationClass", voc / "ImageSets" / "Segmentation"
    for folder in (images, masks, lists):
        folder.mkdir(parents=True)
    draws = np.random.default_rng(seed)
    colours = np.array([(128, 128, 128), COLOURS["red"], COLOURS["blue"]])
    for split, count in (("train", train), ("val", val)):
        ids = [f"2007_{split}_{number:02d}" for number in range(count)]
        for number, name in enumerate(ids):
            width, height = SIZES[number % 3]
            first, second = draws.permutation(3)[:2]
            mask = np.full((height, width), first, np.uint8)
            across = mask if number % 2 else mask.T
            middle = len(across) // 2
            across[middle:] = second
            pixels = colours[mask] + draws.integers(-20, 21, (height, width, 3))
            across[middle - 4 : middle + 4] = 255
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(images / f"{name}.jpg", quality=95)
            as_file = Image.fromarray(mask)
            as_file.putpalette(bytes(range(256)) * 3)  # of colours, as the devkit's: what counts is the places in it
            as_file.save(masks / f"{name}.png")
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
    return voc


def write_boxed_devkit(
    root: Path, *, trainval: int = 12, test: int = 6, years: tuple[int, ...] = (2007,), seed: int = 0, side: int = 128
) -> Path:
    """Write a devkit with annotations below `root` and return it: one or two discs an image, with their boxes.

    The first test images show what the first train images do, so that a network can be tested on what it has seen.
    Every fifth image is higher than wide; image 2 has a speck that is difficult.

    Args:
        root: an existing folder.
        trainval: images of that part, a year.
        test: images of 2007's other part; at most so many.
        years: of the devkit's folders.
        seed: of places and noise.
        side: long side of images, pixels.
    """
    names, devkit = tuple(COLOURS), root / "VOCdevkit"
    for year in years:
        voc, draws = devkit / f"VOC{year}", np.random.default_rng([seed, year])
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (voc / folder).mkdir(parents=True)
        parts: dict[str, list[str]] = {"trainval": [], **({"test": []} if year == 2007 else {})}
        for number in range(1, trainval + 1):
            size = (side, 3 * side // 4) if number % 5 else (3 * side // 4, side)
            image, objects = _boxed_image(draws, names, number, size)
            for part, first in zip(parts, (0, 5000), strict=False):
                if part == "trainval" or number <= test:
                    image_id = f"{year}_{first + number:06d}" if year > 2007 else f"{first + number:06d}"
                    image.save(voc / f"JPEGImages/{image_id}.jpg", quality=95)
                    (voc / f"Annotations/{image_id}.xml").write_text(annotation(size, objects))
                    parts[part].append(image_id)
        for part, ids in parts.items():
            (voc / f"ImageSets/Main/{part}.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
            for name in names:
                (voc / f"ImageSets/Main/{name}_{part}.txt").write_text("".join(f"{image_id}  1\n" for image_id in ids))
    return devkit


Object = tuple[str, tuple[float, float, float, float], bool]  # class; xmin ymin xmax ymax, from 1; difficult


def _boxed_image(
    draws: np.random.Generator, names: tuple[str, ...], number: int, size: tuple[int, int]
) -> tuple[Image.Image, list[Object]]:
    image = Image.fromarray(draws.integers(90, 150, (size[1], size[0], 3), dtype=np.uint8))
    pen, objects = ImageDraw.Draw(image), []
    for place in range(1 + number % 2):  # each in a half of its own
        across = draws.integers(min(size) // 3, size[0] // 2 + 1)
        left = place * (size[0] // 2) + draws.integers(0, size[0] // 2 - across + 1)
        top = draws.integers(0, size[1] - across + 1)
        name = names[(number + place) % len(names)]
        pen.ellipse((left, top, left + across - 1, top + across - 1), fill=COLOURS[name])
        objects.append((name, (left + 1, top + 1, left + across, top + across), False))
    if number == 2:
        pen.ellipse((1, 1, 6, 6), fill=COLOURS[names[0]])
        objects.append((names[0], (2, 2, 7, 7), True))
    return image, objects


def annotation(size: tuple[int, int], objects: list[Object]) -> str:
    """An image's annotation as VOC writes it; `size` is width and height, pixels."""
    texts = [
        f"<object><name>{name}</name><pose>Unspecified</pose><truncated>1</truncated>"
        f"<difficult>{int(difficult)}</difficult><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
        f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>999</xmax><ymax>2</ymax></bndbox></part>"
        "</object>"
        for name, box, difficult in objects
    ]
    width, height = size
    sides = f"<width>{width}</width><height>{height}</height><depth>3</depth>"
    return f"<annotation><size>{sides}</size>{''.join(texts)}</annotation>"
