"""A VOC devkit of mosaics: photographs of class folders, one to four a picture, with labels, boxes and masks.

    python tools/mosaic_devkit.py IMAGES OUT [--trainval 1000] [--test 500] [--seed 0]

Where VOC itself is not at hand: a network that tells the photographs apart must also lead in the protocols on VOC
(`bowstore eval voc07`, `voc07-lowshot`, `segmentation`, `voc0712-detection`), or they measure something else. IMAGES
holds train/CLASS/* and val/CLASS/*; pictures of VOC2007's trainval and VOC2012's train are made of the first, those of
test and val of the second. Figures on mosaics are comparable with each other alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from PIL import Image

CELL = 112  # pixels; a picture has 2 x 2 cells
BORDER = 3  # pixels around a photograph that the masks call void
VOID = 255


class Tile(NamedTuple):
    """One photograph in a picture: its class, counted from 0, its file, and its top left corner in pixels."""

    label: int
    path: Path
    left: int
    top: int


def draw_tiles(files: Sequence[Sequence[Path]], draws: np.random.Generator) -> list[Tile]:
    """One to four photographs of classes drawn with replacement, each in a cell of its own."""
    cells = draws.permutation(4)[: draws.integers(1, 5)]
    labels = draws.integers(len(files), size=len(cells))
    return [
        Tile(label, files[label][draws.integers(len(files[label]))], CELL * (cell % 2), CELL * (cell // 2))
        for label, cell in zip(labels.tolist(), cells.tolist(), strict=True)
    ]


def picture(tiles: Sequence[Tile], draws: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """The picture, RGB on grey noise, and its mask: 0, label + 1, or void around each photograph."""
    image = Image.fromarray(draws.integers(90, 150, (2 * CELL, 2 * CELL, 3), dtype=np.uint8))
    mask = np.zeros((2 * CELL, 2 * CELL), np.uint8)
    for tile in tiles:
        with Image.open(tile.path) as photograph:
            image.paste(
                photograph.convert("RGB").resize((CELL, CELL), Image.Resampling.BILINEAR), (tile.left, tile.top)
            )
        mask[tile.top : tile.top + CELL, tile.left : tile.left + CELL] = VOID
        inner = slice(tile.top + BORDER, tile.top + CELL - BORDER), slice(tile.left + BORDER, tile.left + CELL - BORDER)
        mask[inner] = tile.label + 1
    as_file = Image.fromarray(mask)
    as_file.putpalette(bytes(range(256)) * 3)
    return image, as_file


def annotation(tiles: Sequence[Tile], names: Sequence[str]) -> str:
    """The boxes as VOC writes them: pixels from 1, the last one included."""
    objects = "".join(
        f"<object><name>{names[tile.label]}</name><difficult>0</difficult><bndbox>"
        f"<xmin>{tile.left + 1}</xmin><ymin>{tile.top + 1}</ymin>"
        f"<xmax>{tile.left + CELL}</xmax><ymax>{tile.top + CELL}</ymax></bndbox></object>"
        for tile in tiles
    )
    size = f"<size><width>{2 * CELL}</width><height>{2 * CELL}</height><depth>3</depth></size>"
    return f"<annotation>{size}{objects}</annotation>"


def write_split(
    images: Path, names: Sequence[str], folders: Sequence[tuple[Path, str]], first: int, count: int, seed: int
) -> None:
    """Write pictures first, first + 1, ... made of `images`/CLASS/* into each folder under its split's name."""
    files = [sorted(path for path in (images / name).iterdir() if path.is_file()) for name in names]
    present = np.zeros((count, len(names)), dtype=bool)
    for number in range(count):
        draws = np.random.default_rng([seed, first + number])
        tiles = draw_tiles(files, draws)
        present[number, [tile.label for tile in tiles]] = True
        image, mask = picture(tiles, draws)
        for folder, _ in folders:
            name = f"{first + number:06d}"
            image.save(folder / "JPEGImages" / f"{name}.jpg", quality=92)
            mask.save(folder / "SegmentationClass" / f"{name}.png")
            (folder / "Annotations" / f"{name}.xml").write_text(annotation(tiles, names))
    for folder, split in folders:
        ids = [f"{first + number:06d}" for number in range(count)]
        text = "".join(f"{name}\n" for name in ids)
        for lists in ("Main", "Segmentation"):
            (folder / "ImageSets" / lists / f"{split}.txt").write_text(text)
        for label, name in enumerate(names):
            lines = (
                f"{image_id} {1 if there else -1:2d}\n" for image_id, there in zip(ids, present[:, label], strict=True)
            )
            (folder / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text("".join(lines))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("images", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--trainval", default=1000, show_default=True, type=click.IntRange(8), help="Pictures to train on.")
@click.option("--test", default=500, show_default=True, type=click.IntRange(8), help="Pictures to test on.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of photographs and places.")
def main(images: Path, out: Path, trainval: int, test: int, seed: int) -> None:
    """Write OUT/VOC2007 and OUT/VOC2012 made of the photographs of IMAGES/train and IMAGES/val."""
    if out.exists():
        raise click.UsageError(f"{out} exists; name a folder that does not")
    names = sorted(path.name for path in (images / "train").iterdir() if path.is_dir())
    years = [out / "VOC2007", out / "VOC2012"]
    for year in years:
        for part in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Main", "ImageSets/Segmentation"):
            (year / part).mkdir(parents=True)
    write_split(images / "train", names, [(years[0], "trainval"), (years[1], "train")], 1, trainval, seed)
    write_split(images / "val", names, [(years[0], "test"), (years[1], "val")], trainval + 1, test, seed)
    print(f"{trainval} + {test} pictures of {len(names)} classes in {out}")


if __name__ == "__main__":
    main()
