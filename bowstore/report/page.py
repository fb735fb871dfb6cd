"""One self-contained HTML page of a store's words: thumbnails of the clean view with what a cell sees, and plots.

All positions on a thumbnail are in pixels of the clean view; the page scales them. Each picture is embedded once,
however often it is shown. `words.html` beside this file is the page's template.

Legend: B batch, C channels, H W pixels of the clean view, h w word grid, K words.
"""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

import bowstore
from bowstore.config import SomePaths, StorageConfig, places
from bowstore.data.index import Index, open_index
from bowstore.data.pipeline import clean_batches
from bowstore.data.reader import ShardReader
from bowstore.data.views import CleanView
from bowstore.files import atomic_file, check_free
from bowstore.progress import Progress
from bowstore.remote import fetch_store, is_remote, local_only
from bowstore.remote.urls import shown, url_of
from bowstore.report import plots
from bowstore.report.config import Wish
from bowstore.report.words import MIN_COMMON_IMAGES, Example, LayerWords, Neighbour, Word, collect
from bowstore.words.store.store import open_store

_PIXEL_ART = 64  # views up to this side are embedded whole, and enlarged without blur
_SIDE, _SIDE_OF_NAMED, _SIDE_OF_PATCH = 112, 224, 56  # pixels that are embedded of a larger view
_QUALITY, _QUALITY_OF_PIXEL_ART = 82, 95  # of JPEG
_BATCH = 16


@dataclass(frozen=True)
class WordsReport:
    """A page that was written.

    Attributes:
        file: the page.
        size_bytes: of it.
        store: its path, or its URL without secrets.
        shards: likewise.
        images: of the store.
        other_shards: whether these are not the shards that were encoded; images were then found by their keys.
        layers: what is on it.
    """

    file: Path
    size_bytes: int
    store: str
    shards: str
    images: int
    other_shards: bool
    layers: tuple[LayerWords, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "file": str(self.file),
            "bytes": self.size_bytes,
            "store": self.store,
            "shards": self.shards,
            "images": self.images,
            "other_shards": self.other_shards,
            "layers": [layer.as_dict() for layer in self.layers],
        }

    def text(self) -> str:
        """A few lines for people."""
        words = ", ".join(f"{len(layer.words)} words of {layer.layer.name}" for layer in self.layers)
        lines = [f"{self.file}: {words} ({self.size_bytes / 1e6:.1f} MB)"]
        if self.other_shards:
            lines.append(f"  {self.shards} are not the shards that were encoded: images were found by their keys")
        for layer in self.layers:
            lines += [f"  {layer.layer.name}: {line}" for line in layer.warnings]
            if layer.missing:
                lines.append(
                    f"  {layer.layer.name}: {layer.missing} of {layer.looked_up} images are not in {self.shards} and "
                    "were left out"
                )
        return "\n".join(lines)


def write_words_page(
    store: Path, shards: SomePaths, out: Path, wish: Wish, storage: StorageConfig | None = None
) -> WordsReport:
    """Write a page that shows words of a store; `out` is replaced whole or not at all.

    Args:
        store: the word store, a folder or a URL.
        shards: folder or URL of indexed shards that hold its images, or some of them; or several.
        out: the page.
        wish: which words.
        storage: how remote data are read, and where local copies lie; None for the defaults.

    Raises:
        MissingError: no store, layer, shards or folder to write into; none of the images is in the shards.
        MismatchError: no word store, one that is not complete, or shards that changed after indexing.
        UsageError: a word that a layer does not have, or a folder at the page's place.
        DataError: an image that does not decode, or a damaged chunk.
    """
    local_only(out, "write the page into a local --out, then copy it there")
    check_free(out, mark=b"Made by bowstore ", command="bowstore words", example="words.html")
    opened = open_store(fetch_store(store, storage), wish.layer)
    index = open_index(shards, storage)
    layers = collect(opened, index, wish)
    # Another split may use the same keys for other images: the reader has to know how images were found.
    other_shards = index.fingerprint != opened.fingerprint
    folders = [_place(folder) for folder in places(shards)]
    html = render(
        layers,
        index,
        store=_last(_place(store), 1),
        shards=", ".join(_last(folder, 2) for folder in folders),
        named=bool(wish.words),
        other_shards=other_shards,
    )
    encoded = html.encode()
    with atomic_file(out) as file:
        file.write(encoded)
    return WordsReport(out, len(encoded), _place(store), ", ".join(folders), len(opened), other_shards, layers)


def _place(path: Path) -> str:
    return shown(url_of(path)) if is_remote(path) else str(path)


def _last(place: str, parts: int) -> str:
    """The end of a path or URL: elsewhere, the rest would say nothing."""
    return "/".join((place if "://" in place else str(Path(place).resolve())).split("/")[-parts:])


def render(
    layers: tuple[LayerWords, ...], index: Index, *, store: str, shards: str, named: bool, other_shards: bool
) -> str:
    """The page.

    Args:
        layers: what is on it, a section each.
        index: of the shards that the images come from.
        store: its name for people.
        shards: their name for people.
        named: whether the words were named, and are to be shown larger.
        other_shards: whether these are not the shards that were encoded.
    """
    albums: dict[CleanView, _Album] = {}
    sections = []
    for number, layer in enumerate(layers):
        album = albums.setdefault(layer.view, _Album(layer.view, f"v{len(albums)}"))
        sections.append(_section(layer, album, f"l{number}", named=named))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("words.html").render(
        store=store,
        shards=shards,
        images=layers[0].layer.images,
        version=bowstore.__version__,
        named=named,
        other_shards=other_shards,
        least_common=MIN_COMMON_IMAGES,
        sections=sections,
        pictures=[picture for album in albums.values() for picture in album.pictures(index)],
    )
    return page.lstrip()


class Box(NamedTuple):
    """A rectangle in pixels of the clean view."""

    x: float
    y: float
    width: float
    height: float

    def __str__(self) -> str:
        return " ".join(f"{value:.5g}" for value in self)

    def clipped(self, size: int) -> "Box":
        """The part of it within the view."""
        left, top = max(self.x, 0.0), max(self.y, 0.0)
        right, bottom = min(self.x + self.width, size), min(self.y + self.height, size)
        return Box(left, top, right - left, bottom - top)

    def covers(self, size: int) -> bool:
        """Whether all of the view lies within it."""
        return self.x <= 0 and self.y <= 0 and self.x + self.width >= size and self.y + self.height >= size


@dataclass(frozen=True)
class Geometry:
    """Where the cells of a layer lie in the clean view.

    Attributes:
        size: side of the view, pixels.
        grid: (h, w), without the border.
        border: cells left out at each side.
        effective: side of what a cell mostly sees, pixels; None if unknown.
    """

    size: int
    grid: tuple[int, int]
    border: int
    effective: int | None

    def cell(self, cell: tuple[int, int]) -> Box:
        """The cell's own share of the view."""
        height, width = (self.size / (count + 2 * self.border) for count in self.grid)
        return Box((cell[1] + self.border) * width, (cell[0] + self.border) * height, width, height)

    def field(self, cell: tuple[int, int]) -> Box:
        """What the cell mostly sees: the effective receptive field around its middle, which may exceed the view."""
        box = self.cell(cell)
        side = max(self.effective or 0, box.width, box.height)
        return Box(box.x + (box.width - side) / 2, box.y + (box.height - side) / 2, side, side)

    def patch(self, cell: tuple[int, int]) -> Box:
        """The field, moved into the view."""
        x, y, side, _ = self.field(cell)
        side = min(side, self.size)
        return Box(min(max(x, 0), self.size - side), min(max(y, 0), self.size - side), side, side)


class Picture(NamedTuple):
    """An embedded picture: its id on the page, where it lies in the view, its bytes as a data URI."""

    name: str
    box: Box
    uri: str
    pixelated: bool


class Thumbnail(NamedTuple):
    """A picture as it is shown.

    Attributes:
        picture: id of the picture.
        frame: what of the view is shown.
        cell: that holds the word.
        field: what the cell sees, if less than the whole view; the rest is dimmed.
        title: for the tooltip.
    """

    picture: str
    frame: Box
    cell: Box
    field: Box | None
    title: str


@dataclass
class _Album:
    """The pictures of a page that show one view, each once."""

    view: CleanView
    prefix: str
    _wanted: dict[tuple[int, Box, int], str] = field(default_factory=dict)

    def add(self, index_row: int, box: Box, side: int) -> str:
        """The id of a picture of `box` of an image, `side` pixels large or less."""
        size = self.view.size
        if size <= _PIXEL_ART:
            box, side = Box(0, 0, size, size), size
        side = min(side, round(box.width))
        return self._wanted.setdefault((index_row, box, side), f"{self.prefix}i{len(self._wanted)}")

    def pictures(self, index: Index) -> Iterator[Picture]:
        """Decode the requested images, some at a time."""
        wanted: dict[int, list[tuple[str, Box, int]]] = {}
        for (index_row, box, side), name in self._wanted.items():
            wanted.setdefault(index_row, []).append((name, box, side))
        rows = np.array(sorted(wanted), np.int64)
        batches = clean_batches(ShardReader(index), self.view, rows, batch=_BATCH, device=torch.device("cpu"))
        with Progress("thumbnails", len(rows)) as progress:
            for rows_B, images_BCHW in batches if len(rows) else ():
                for row, pixels_HWC in zip(rows_B.tolist(), _pixels(images_BCHW, self.view), strict=True):
                    image = Image.fromarray(pixels_HWC)
                    for name, box, side in wanted[row]:
                        yield Picture(name, box, _data_uri(image, box, side), self.view.size <= _PIXEL_ART)
                progress.advance(len(rows_B))


def _pixels(images_BCHW: torch.Tensor, view: CleanView) -> NDArray[np.uint8]:
    """Normalised images as they look, uint8 (B, H, W, C)."""
    values_BHWC = images_BCHW.permute(0, 2, 3, 1) * torch.tensor(view.std) + torch.tensor(view.mean)
    pixels_BHWC: NDArray[np.uint8] = (255 * values_BHWC).round().clamp(0, 255).to(torch.uint8).numpy()
    return pixels_BHWC


def _data_uri(image: Image.Image, box: Box, side: int) -> str:
    """A JPEG; with full colour resolution where single pixels will be seen."""
    x, y, width, height = box
    part = image.resize((side, side), Image.Resampling.LANCZOS, box=(x, y, x + width, y + height))
    buffer = io.BytesIO()
    if image.width <= _PIXEL_ART:
        part.save(buffer, "jpeg", quality=_QUALITY_OF_PIXEL_ART, subsampling=0, optimize=True)
    else:
        part.save(buffer, "jpeg", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class _Framer:
    """Makes thumbnails of one layer's examples."""

    def __init__(self, layer: LayerWords, album: _Album) -> None:
        found = layer.layer.attributes.get("receptive_field") or {}
        self.geometry = Geometry(layer.view.size, layer.layer.grid, layer.layer.border, found.get("effective"))
        self._album = album

    def whole(self, example: Example, side: int) -> Thumbnail:
        """The whole view."""
        return self._frame(example, Box(0, 0, self.geometry.size, self.geometry.size), side)

    def patch(self, example: Example, side: int | None, title: str | None = None) -> Thumbnail:
        """What the cell sees; cut out of the whole view's picture if there is no `side`."""
        return self._frame(example, self.geometry.patch(example.cell), side, title)

    def _frame(self, example: Example, frame: Box, side: int | None, title: str | None = None) -> Thumbnail:
        size = self.geometry.size
        box, side = (Box(0, 0, size, size), _SIDE_OF_NAMED) if side is None else (frame, side)
        seen = self.geometry.field(example.cell)
        seen_part = None if self.geometry.effective is None or seen.covers(size) else seen.clipped(size)
        i, j = example.cell
        return Thumbnail(
            self._album.add(example.index_row, box, side),
            frame,
            self.geometry.cell(example.cell),
            seen_part if frame.width == size else None,
            title or f"{example.key}\ncell ({i}, {j}), distance {example.distance:.4g}",
        )


def _section(layer: LayerWords, album: _Album, name: str, *, named: bool) -> dict[str, Any]:
    """What the template needs of a layer."""
    framer = _Framer(layer, album)
    vocabulary = layer.layer.attributes["vocabulary"]
    figures = [
        ("How often words occur", plots.rank_frequency(layer.usage.count_K, layer.document_frequency_K, f"{name}f")),
        ("How many words an image holds", plots.distinct_words(layer.usage.distinct, f"{name}d")),
    ]
    if vocabulary.get("inertia_history"):
        drawn = plots.inertia(vocabulary["inertia_history"], vocabulary.get("inertia"), f"{name}k")
        figures.append(("How k-means settled", drawn))
    placed: set[int] = set()
    galleries = []
    for gallery in layer.galleries:
        cards = []
        for word in gallery.words:
            cards.append({**_card(layer.words[word], layer, framer, named=named), "anchored": word not in placed})
            placed.add(word)
        galleries.append({"title": gallery.title, "about": gallery.about, "cards": cards})
    return {
        "name": name,
        "layer": layer,
        "geometry": framer.geometry,
        "figures": [(title, Markup(svg)) for title, svg in figures],  # matplotlib's own, no text of users
        "galleries": galleries,
    }


def _card(word: Word, layer: LayerWords, framer: _Framer, *, named: bool) -> dict[str, Any]:
    side = _SIDE_OF_NAMED if named else _SIDE
    examples = [(example, framer.whole(example, side)) for example in word.examples]
    return {
        "word": word,
        "examples": [(example, whole, framer.patch(example, None) if named else None) for example, whole in examples],
        "neighbours": [
            (
                found,
                framer.patch(found.example, _SIDE_OF_PATCH, _bond(word, found)) if found.example else None,
                found.word in layer.words,
            )
            for found in word.neighbours
        ],
    }


def _bond(word: Word, found: Neighbour) -> str:
    return (
        f"word {found.word}: in {found.common:,} of the {word.images:,} images that hold word {word.word}, "
        f"{found.lift:.3g} times as many as by chance; normalised PMI {found.npmi:.2f}"
    )
