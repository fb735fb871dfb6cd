"""The embedded data set: rendered colour images of upright objects, ten classes, any number, any size.

Every picture is a pure function of (seed, split, index). The classes share their parts (wheels on cars,
trucks, planes; windows on houses and boats too; legs under dogs, birds, chairs; leaves on trees, flowers, as
ears): a bag of parts tells the class, no single part does, and colours, textures, backgrounds and light say
nothing. Objects stand upright within a small tilt, while backgrounds mostly have no preferred direction: a
network has to look at the objects to tell how an image was turned.
"""

import io
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from bowstore.data.workers import Report, run_jobs
from bowstore.errors import MismatchError
from bowstore.files import atomic_file, read_json, sweep_temporary, write_json
from bowstore.progress import Progress

# In alphabetical order: readers that number folders by name find the same labels.
CLASSES: tuple[str, ...] = tuple("bird boat car chair dog flower house plane tree truck".split())
SPLITS = ("train", "val")
MARKER = "synthetic.json"
VERSION = 1  # raise it with any change to the pixels: folders of another version are refused

_JPEG_QUALITY = 92
_CHUNK_IMAGES = 250

Colour: TypeAlias = tuple[int, int, int]
Floats: TypeAlias = npt.NDArray[np.float64]
Rows: TypeAlias = list[tuple[str, int]]  # split and index of images

_ramp = cache(partial(np.linspace, -1.0, 1.0))  # never written to
_CIRCLE_N2 = np.array([(math.cos(n * math.pi / 10), math.sin(n * math.pi / 10)) for n in range(20)])

# What each object is made of: parts from back to front, as `_draw_part` reads them, in a frame with x to the
# right, y down, both from -1 to 1. "0.6?" stands before a part that only so many objects have; "{sail}" is
# one of the choices below, which "|" separates.
_RECIPES = """
bird = leg dark -.12 .3 .85 .05; leg dark .15 .3 .85 .05; fan accent -.45 .05 .5 .1; oval body 0 .08 .58 .38;
 wing accent .05 0 .55 {fold}; head body .52 -.38 .26 .24
boat = bar dark 0 -.9 .35 .05; {sail}; 0.6? box accent -.6 -.03 -.12 .35; 0.6? window dark -.35 .17 .12 .1;
 poly body -.95 .35 .95 .35 .6 .8 -.6 .8; 0.6? oval light -.35 .5 .08 .08; oval light 0 .5 .08 .08;
 0.6? oval light .35 .5 .08 .08
car = poly accent -.65 -.05 -.4 -.5 .3 -.5 .6 -.05; window dark -.22 -.25 .16 .14;
 window dark .2 -.25 .16 .14; poly body -.95 -.05 .65 -.05 .95 .15 .95 .42 -.95 .42; wheel dark -.55 .42 .24;
 wheel dark .55 .42 .24
chair = leg accent -.5 .12 .88 .07; leg accent .5 .12 .88 .07; 0.5? leg accent -.15 .12 .88 .07;
 0.5? leg accent .2 .12 .88 .07; {back}; box body -.6 .1 .6 .28
dog = leg body -.55 .1 .85 .08; leg body -.3 .1 .85 .08; leg body .25 .1 .85 .08; leg body .48 .1 .85 .08;
 fan body -.55 -.05 .45 {tail}; oval body 0 .05 .7 .3; bar body .55 -.4 .1 .16; head body .6 -.4 .25 .2;
 leaf accent .5 -.5 .4 {ear}
flower = bar accent 0 -.4 .95 .05; leaf accent 0 .6 .65 -.5; leaf accent 0 .5 .65 -2.6;
 leaf body 0 -.42 .55 .3; leaf body 0 -.42 .55 1.5; leaf body 0 -.42 .55 2.8; leaf body 0 -.42 .55 4;
 leaf body 0 -.42 .55 5.2; 0.5? leaf body 0 -.42 .5 .9; 0.5? leaf body 0 -.42 .5 3.4; oval {eye} 0 -.42 .2 .2
house = 0.5? bar dark .4 -.85 -.1 .11; box body -.68 -.1 .68 .85; {roof}; box dark -.13 .35 .13 .85;
 0.7? window dark -.42 .3 .15 .15; 0.7? window dark .42 .3 .15 .15
plane = bar dark -.15 .1 .4 .03; wheel dark -.15 .42 .1; bar dark .5 .1 .4 .03; wheel dark .5 .42 .1;
 wing accent .1 -.05 .45 -.4; fan accent -.55 0 .4 .6; oval body 0 0 .95 .22;
 0.6? oval light -.35 -.06 .06 .06; 0.8? oval light -.1 -.06 .06 .06; oval light .15 -.06 .06 .06;
 oval light .4 -.06 .06 .06; oval light .65 -.06 .06 .06; wing accent .1 .08 .6 .35
tree = bar accent 0 -.25 .95 .12; {crown}
truck = box dark -.95 .38 .9 .5; box body -.95 -.65 .22 .4; poly accent .32 -.2 .8 -.2 .95 .15 .95 .5 .32 .5;
 window dark .56 0 .18 .14; wheel dark -.65 .55 .2; 0.6? wheel dark -.2 .55 .2; wheel dark .65 .55 .2
fold = -.75 | .3
sail = poly accent .08 -.85 .75 .2 .08 .2 | box accent .05 -.85 .55 -.5 | poly accent -.1 -.8 -.7 .2 -.1 .2
back = box body -.55 -.85 -.34 .12 | box body -.5 -.85 .5 -.55; bar accent -.43 -.8 .12 .06;
 bar accent 0 -.8 .12 .06; bar accent .43 -.8 .12 .06
tail = .4 | .7 | .05
ear = 1.3 | 3.2 | 4.6
eye = dark | light
roof = poly accent -.88 -.1 0 -.85 .88 -.1 | poly accent -.88 -.1 -.45 -.7 .45 -.7 .88 -.1
crown = oval body -.35 -.15 .38 .36; oval body .35 -.15 .38 .36; oval body -.2 -.5 .38 .36;
 oval body .2 -.45 .38 .36; 0.6? leaf dark -.3 -.3 .3 1; 0.6? leaf dark .2 -.5 .3 2.5;
 0.6? leaf dark .1 -.1 .3 4 | poly body 0 -.95 .35 -.35 -.35 -.35; poly body 0 -.53 .5 .07 -.5 .07;
 poly body 0 -.11 .65 .49 -.65 .49 | oval body 0 -.35 .5 .55; 0.6? leaf dark -.2 -.3 .3 1;
 0.6? leaf dark .2 -.5 .3 2.5
"""
_LINES = [line.split(" = ") for line in _RECIPES.replace("\n ", " ").strip().splitlines()]
_CHOICES = {name: options.split("|") for name, options in _LINES}


class _Draws:
    """Random numbers of one image, all made from plain uniform doubles, whose stream NumPy keeps stable."""

    def __init__(self, seed: int, split: str, index: int) -> None:
        sequence = np.random.SeedSequence([seed, zlib.crc32(split.encode()), index])
        self._generator = np.random.Generator(np.random.PCG64(sequence))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._generator.random())

    def chance(self, probability: float) -> bool:
        return float(self._generator.random()) < probability

    def below(self, bound: int) -> int:
        return int(float(self._generator.random()) * bound)

    def array(self, *shape: int) -> Floats:
        return self._generator.random(shape)

    def colour(self) -> Colour:
        hue, saturation, value = self.between(0, 6), self.between(0.05, 0.9), self.between(0.15, 0.95)
        falls = (min(1, max(0, 2 - abs((hue + shift) % 6 - 3))) for shift in (0, 2, 4))
        return _to_colour([value * (1 - saturation * fall) for fall in falls])

    def colour_away_from(self, other: Colour) -> Colour:
        """A colour that differs visibly from `other` (the best of a few)."""
        tries = [self.colour() for _ in range(3)]
        return max(tries, key=lambda colour: sum(abs(a - b) for a, b in zip(colour, other, strict=True)))


def _to_colour(channels: Sequence[float]) -> Colour:
    red, green, blue = (int(255 * min(1.0, max(0.0, channel))) for channel in channels)
    return red, green, blue


@dataclass
class _Pen:
    """Draws in the object's frame, which it bends, turns and scales onto the canvas."""

    canvas: Image.Image
    paints: dict[str, Colour | Image.Image]
    bend_62: Floats
    frame_22: Floats
    origin_2: Floats

    def shape(self, points: Sequence[tuple[float, float]] | Floats, paint: str) -> None:
        points_N2 = np.asarray(points, dtype=np.float64)
        x, y = points_N2[:, 0], points_N2[:, 1]
        bent_N2 = points_N2 + np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], axis=1) @ self.bend_62
        placed = (bent_N2 @ self.frame_22.T + self.origin_2).ravel().tolist()
        mask = Image.new("1", self.canvas.size)
        ImageDraw.Draw(mask).polygon(placed, fill=1)
        self.canvas.paste(self.paints[paint], None, mask)

    def box(self, x0: float, y0: float, x1: float, y1: float, paint: str) -> None:
        self.shape([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], paint)

    def oval(self, x: float, y: float, rx: float, ry: float, paint: str, turn: float = 0.0) -> None:
        self.shape(_turned(_CIRCLE_N2 * (rx, ry), turn) + np.array((x, y)), paint)


def _turned(points_N2: Floats, turn: float) -> Floats:
    cos, sin = math.cos(turn), math.sin(turn)
    turned_N2: Floats = points_N2 @ np.array([[cos, sin], [-sin, cos]])
    return turned_N2


def _draw_part(pen: _Pen, kind: str, paint: str, n: list[float]) -> None:
    """Draw one part from its numbers `n`: corners, or what the case unpacks."""
    if kind == "poly":
        pen.shape(np.array(n).reshape(-1, 2), paint)
    elif kind == "box":
        pen.box(n[0], n[1], n[2], n[3], paint)
    elif kind == "oval":
        pen.oval(n[0], n[1], n[2], n[3], paint)
    elif kind == "wheel":
        x, y, r = n
        pen.oval(x, y, r, r, paint)
        pen.oval(x, y, r / 2, r / 2, "light")
    elif kind == "window":
        x, y, rx, ry = n
        pen.box(x - rx, y - ry, x + rx, y + ry, "light")
        pen.box(x - 0.15 * rx, y - ry, x + 0.15 * rx, y + ry, paint)
    elif kind in ("bar", "leg"):
        x, top, foot, half = n
        pen.shape([(x - 0.8 * half, top), (x + 0.8 * half, top), (x + half, foot), (x - half, foot)], paint)
        if kind == "leg":
            pen.box(x - half, foot - 0.08, x + 1.8 * half, foot, "dark")
    elif kind == "leaf":
        x, y, length, turn = n
        middle = (x + length / 2 * math.cos(turn), y + length / 2 * math.sin(turn))
        pen.oval(*middle, length / 2, length / 5, paint, turn)
    elif kind == "wing":
        x, y, length, drop = n
        pen.shape([(x - 0.22, y), (x + 0.25, y), (x - 0.1, y + drop), (x - length, y + drop)], paint)
    elif kind == "fan":  # a tail, or the fin of a plane
        x, y, length, rise = n
        pen.shape([(x, y - 0.12), (x - length, y - rise), (x - 0.8 * length, y + 0.05), (x, y + 0.12)], paint)
    elif kind == "head":  # looks to the right; a beak and a snout are the same wedge
        x, y, r, muzzle = n
        wedge = [(x + 0.5 * r, y - 0.5 * r), (x + r + muzzle, y + 0.2 * r), (x + 0.4 * r, y + 0.7 * r)]
        pen.shape(wedge, "accent")
        pen.oval(x, y, r, r, paint)
        pen.oval(x + 0.35 * r, y - 0.2 * r, 0.25 * r, 0.25 * r, "dark")


def _draw_object(draws: _Draws, pen: _Pen, name: str) -> None:
    chosen = {slot: options[draws.below(len(options))] for slot, options in _CHOICES.items()}
    for part in chosen[name].format_map(chosen).split(";"):
        probability, words = part.split("?") if "?" in part else ("1", part)
        kind, paint, *numbers = words.split()
        varied = [float(number) * draws.between(0.92, 1.08) for number in numbers]
        if draws.chance(float(probability)):
            _draw_part(pen, kind, paint, varied)


def _texture(draws: _Draws, colour: Colour, side: int, contrast: float) -> Image.Image:
    """`colour` under stripes, checks, clouds or a ramp, at a random angle: (side, side) RGB."""
    kind, turn, shade = draws.below(4), draws.between(0, 2 * math.pi), draws.between(0, contrast)
    ramp = _ramp(side)
    if kind == 0:
        cells = 4 + draws.below(9)
        clouds = Image.fromarray((draws.array(cells, cells) * 255).astype(np.uint8))
        tones = clouds.resize((side, side), Image.Resampling.BICUBIC)
    else:
        pattern = math.cos(turn) * ramp[None, :] + math.sin(turn) * ramp[:, None]
        rate = draws.between(8, 26)
        if kind == 1:
            pattern = np.sin(rate * pattern)
        elif kind == 2:
            pattern = np.sin(rate * ramp)[None, :] * np.sin(rate * ramp)[:, None]
        tones = Image.fromarray((pattern * 90 + 127.5).astype(np.uint8))
    # One palette look-up per pixel is several times cheaper than arithmetic on three channels.
    palette = np.clip((1 + shade * _ramp(256))[:, None] * np.asarray(colour), 0, 255).astype(np.uint8)
    tones.putpalette(palette.ravel().tolist())
    return tones.convert("RGB")


def _backdrop(draws: _Draws, side: int) -> tuple[Image.Image, Colour]:
    """What lies behind the object, and its main colour."""
    colour = draws.colour()
    canvas = _texture(draws, colour, side, 0.25)
    if draws.chance(0.35):
        # Ground under sky, either of them the lighter one: of some use to a network, never enough.
        level, slope = draws.between(0.45, 0.85) * side, draws.between(-0.15, 0.15) * side
        corners = [(0, level - slope), (side, level + slope), (side, side), (0, side)]
        mask = Image.new("1", canvas.size)
        ImageDraw.Draw(mask).polygon(corners, fill=1)
        canvas.paste(_texture(draws, draws.colour(), side, 0.25), mask=mask)
    return canvas, colour


def _clutter(draws: _Draws, canvas: Image.Image, count: int, largest: float) -> None:
    """`count` blobs and slabs with no upright direction, anywhere in the picture."""
    side, pen = canvas.width, ImageDraw.Draw(canvas)
    for _ in range(count):
        centre, radii = draws.array(2) * side, (0.03 + (largest - 0.03) * draws.array(2)) * side
        outline = _CIRCLE_N2 if draws.chance(0.5) else _CIRCLE_N2[:: 5 + draws.below(2)]
        placed = _turned(outline * radii, draws.between(0, 2 * math.pi)) + centre
        pen.polygon(placed.ravel().tolist(), fill=draws.colour())


def _place(draws: _Draws, canvas: Image.Image, behind: Colour) -> _Pen:
    """A pen with the object's size, tilt, side and place in the picture, its bend and its colours."""
    side = canvas.width
    scale = draws.between(0.32, 0.5) * side
    centre_2 = 0.5 * side + (0.5 * side - 0.85 * scale) * (2 * draws.array(2) - 1)
    scale_x = -scale if draws.chance(0.5) else scale
    stretch = np.diag([scale_x * draws.between(0.85, 1.1), scale * draws.between(0.85, 1.1)])
    dark, pale = draws.between(0.0, 0.3), draws.between(0.7, 1.0)
    if draws.chance(0.3):
        dark, pale = pale, dark
    paints: dict[str, Colour | Image.Image] = {
        "body": _texture(draws, draws.colour_away_from(behind), side, 0.35),
        "accent": _texture(draws, draws.colour_away_from(behind), side, 0.35),
        "dark": _to_colour([0.75 * dark + 0.25 * channel / 255 for channel in draws.colour()]),
        "light": _to_colour([0.75 * pale + 0.25 * channel / 255 for channel in draws.colour()]),
    }
    bend_62 = 0.12 * (2 * draws.array(6, 2) - 1)
    return _Pen(canvas, paints, bend_62, _turned(np.eye(2), draws.between(-0.2, 0.2)).T @ stretch, centre_2)


def _exposed(draws: _Draws, picture: Image.Image) -> Image.Image:
    """The finished picture under a light from any side, with the camera's noise."""
    turn, strength, ramp = draws.between(0, 2 * math.pi), draws.between(0, 0.35), _ramp(picture.width)
    slope = math.cos(turn) * ramp[None, :] + math.sin(turn) * ramp[:, None]
    light = draws.between(0.75, 1.2) * (1 + strength * slope)
    noise = draws.between(2, 8) * (2 * draws.array(*picture.size, 3) - 1)
    return Image.fromarray(np.clip(np.asarray(picture) * light[:, :, None] + noise, 0, 255).astype(np.uint8))


def render(seed: int, split: str, index: int, size: int) -> tuple[Image.Image, int]:
    """Render one image, the same for the same arguments, whatever was rendered before.

    Args:
        seed: the data set's seed, 0 or more.
        split: "train" or "val".
        index: the image's number in its split, 0 or more.
        size: height and width in pixels, 16 to 1024.

    Returns:
        The picture, RGB uint8, size x size pixels; and its label, `index` modulo the number of classes.
    """
    draws, label = _Draws(seed, split, index), index % len(CLASSES)
    oversampling = 3 if size <= 64 else 2
    canvas, behind = _backdrop(draws, size * oversampling)
    _clutter(draws, canvas, draws.below(4), 0.16)
    _draw_object(draws, _place(draws, canvas, behind), CLASSES[label])
    _clutter(draws, canvas, draws.below(3), 0.07)
    return _exposed(draws, canvas.reduce(oversampling)), label


def write_images(out: Path, *, train: int, val: int, size: int = 32, seed: int = 0, workers: int | None = None) -> None:
    """Write the data set as `out/train/<class>/<index>.jpg` and `out/val/<class>/<index>.jpg`.

    A second run with the same arguments does nothing; an interrupted one goes on. A file's bytes depend on
    `size`, `seed`, split and index alone.

    Args:
        out: folder to write into; made if it is not there.
        train: number of training images, 10 or more.
        val: number of validation images, 10 or more.
        size: height and width in pixels, 16 to 1024.
        seed: the data set's seed, 0 or more.
        workers: number of processes; None for one on each core that this process may use.

    Raises:
        MismatchError: `out` holds other images.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    arguments = {"version": VERSION, "train": train, "val": val, "size": size, "seed": seed}
    if _is_complete(out, arguments):
        return
    for folder in [out / split / name for split in SPLITS for name in CLASSES]:
        folder.mkdir(parents=True, exist_ok=True)
        sweep_temporary(folder)
    write_json(out / MARKER, arguments | {"complete": False})
    rows = [(split, index) for split, count in (("train", train), ("val", val)) for index in range(count)]
    missing = [(split, index) for split, index in rows if not _is_written(_image_path(out, split, index))]
    with Progress("render", len(rows), done=len(rows) - len(missing)) as progress:
        _write_rows(out, missing, size, seed, workers, progress)
    write_json(out / MARKER, arguments | {"complete": True})


def _is_complete(out: Path, arguments: dict[str, int]) -> bool:
    """Whether `out` holds exactly these images; False if they are absent or only partly there."""
    if not (out / MARKER).exists():
        if any((out / split).exists() for split in SPLITS):
            raise MismatchError(f"{out} holds images that bowstore did not render; name another folder")
        return False
    held: dict[str, Any] = read_json(out / MARKER)
    for name, value in arguments.items():
        if held.get(name) != value:
            raise MismatchError(f"{out} holds images of {name} {held.get(name)}, not {value}; name another folder")
    return bool(held.get("complete"))


def _is_written(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0  # after a power cut a file may be there and empty


def _image_path(out: Path, split: str, index: int) -> Path:
    return out / split / CLASSES[index % len(CLASSES)] / f"{index:06d}.jpg"


def _write_rows(out: Path, rows: Rows, size: int, seed: int, workers: int, progress: Progress) -> None:
    chunks = [rows[start : start + _CHUNK_IMAGES] for start in range(0, len(rows), _CHUNK_IMAGES)]
    work = partial(_write_chunk, out, size, seed)
    for _ in run_jobs(work, chunks, max(1, min(workers, len(chunks))), progress.advance):
        pass


def _write_chunk(out: Path, size: int, seed: int, rows: Rows, report: Report) -> None:
    for split, index in rows:
        buffer, path = io.BytesIO(), _image_path(out, split, index)
        render(seed, split, index, size)[0].save(buffer, format="JPEG", quality=_JPEG_QUALITY)
        # Renamed but not forced to the disk, which would cost more than the rendering: a picture that a power
        # cut took can be rendered again.
        with atomic_file(path, durable=False) as file:
            file.write(buffer.getvalue())
        report(1)
