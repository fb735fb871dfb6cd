import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from page_reader import Page
from PIL import Image
from teacher_sets import IMAGES, write_shards, write_teacher
from word_stores import add_layer, make_store

from bowstore.data.index import open_index
from bowstore.data.reader import ShardReader
from bowstore.report import plots
from bowstore.report.config import Wish
from bowstore.report.page import Box, Geometry, WordsReport, write_words_page
from bowstore.words.store.store import open_store


def test_the_page_is_whole_and_loads_nothing(page: Page, report: WordsReport) -> None:
    assert page.html.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|@import|<script", page.html)
    assert "url(" not in re.sub(r"url\(#", "", page.html)
    assert all(value.startswith(("#", "data:image/jpeg;base64,")) or value == "data:," for value in page.references)
    assert [name for name, count in page.ids.items() if count > 1] == []
    targets = {value[1:] for value in page.references if value.startswith("#")}
    assert targets <= set(page.ids)
    assert report.size_bytes == report.file.stat().st_size < 1e6
    assert str(report.file.parent) not in page.html


def test_each_picture_is_embedded_once_and_shown(page: Page) -> None:
    pictures = [tag.attributes["id"] for tag in page.all("image")]
    used = {tag.attributes["href"][1:] for tag in page.all("use") if "href" in tag.attributes}
    assert set(pictures) == used
    data = [tag.attributes["href"] for tag in page.all("image")]
    assert len(set(data)) == len(data)


def test_cards_show_their_words(page: Page, report: WordsReport) -> None:
    titles = [tag.text for tag in page.all("h4")]
    shown = [word for layer in report.layers for gallery in layer.galleries for word in gallery.words]
    assert titles == [f"word {word}" for word in shown]
    examples = [
        example
        for layer in report.layers
        for gallery in layer.galleries
        for word in gallery.words
        for example in layer.words[word].examples
    ]
    thumbnails = page.thumbnails()
    assert len(thumbnails) == len(examples)
    for (tag, _), example in zip(thumbnails, examples, strict=True):
        i, j = example.cell
        assert tag.text.strip() == f"{example.key}\ncell ({i}, {j}), distance {example.distance:.4g}"
    assert [tag.text for tag in page.all("nav")] == ["block1block3"]
    for number, layer in enumerate(report.layers):
        assert {f"l{number}w{word}" for word in layer.words} <= set(page.ids)


def test_thumbnails_are_the_clean_view_of_their_images(page: Page, report: WordsReport, shards: Path) -> None:
    index = open_index(shards)
    reader = ShardReader(index)
    rows = {index.key(row): row for row in range(len(index))}
    for tag, name in page.thumbnails()[:30]:
        with Image.open(bytes_of(reader, rows[tag.text.split("\n")[0]])) as image:
            expected = np.asarray(image.resize((17, 16), Image.Resampling.BILINEAR), np.float32)[:, :16]
        pixels = page.picture(name)
        assert pixels.shape == (16, 16, 3)
        assert np.abs(pixels - expected).mean() < 4


def bytes_of(reader: ShardReader, row: int) -> io.BytesIO:
    return io.BytesIO(reader.read(np.array([row]))[0].tobytes())


def test_marks_lie_where_the_cell_is(page: Page, report: WordsReport) -> None:
    cells = [tag.attributes for tag in page.all("rect", class_="cell")]
    word = next(iter(report.layers[0].words.values()))
    i, j = word.examples[0].cell
    assert {name: float(cells[1][name]) for name in ("x", "y", "width", "height")} == {  # the first is the key's
        "x": j,
        "y": i,
        "width": 1,
        "height": 1,
    }


@pytest.mark.parametrize(
    ("border", "cell", "middle"), [(0, (0, 0), (2.0, 2.0)), (0, (3, 1), (6.0, 14.0)), (1, (0, 2), (3.5 * 16 / 6, 4.0))]
)
def test_where_cells_lie(border: int, cell: tuple[int, int], middle: tuple[float, float]) -> None:
    geometry = Geometry(16, (4, 4), border, 9)
    x, y, width, height = geometry.cell(cell)
    assert (x + width / 2, y + height / 2) == pytest.approx(middle)
    x, y, width, height = geometry.field(cell)
    assert (x + width / 2, y + height / 2, width, height) == pytest.approx((*middle, 9, 9))


def test_patches_lie_within_the_view() -> None:
    assert Geometry(16, (4, 4), 0, 9).patch((0, 3)) == Box(7, 0, 9, 9)
    assert Geometry(16, (4, 4), 0, 30).patch((0, 3)) == Box(0, 0, 16, 16)
    assert Geometry(16, (4, 4), 0, None).patch((1, 1)) == Box(4, 4, 4, 4)
    assert Geometry(16, (4, 4), 0, 9).field((0, 0)).clipped(16) == Box(0, 0, 6.5, 6.5)
    assert Geometry(16, (4, 4), 0, 40).field((1, 1)).covers(16)
    assert not Geometry(16, (4, 4), 0, 16).field((0, 0)).covers(16)


def test_what_the_store_is(page: Page) -> None:
    facts = dict(zip([tag.text for tag in page.all("dt")], [tag.text for tag in page.all("dd")], strict=True))
    assert facts["network"] == "wrn-10-1 run tiny-rotnet"
    assert facts["layer"] == "block3 64 channels"
    assert re.fullmatch(r"[0-9a-f]{12} teacher\.safetensors", facts["weights"])
    assert facts["K"] == "24 words"
    assert facts["grid"] == "4 × 4 cells"
    assert facts["images"] == "96"
    assert facts["clean view"] == "16 px short side 16, centre cropped"
    assert facts["never used"] == "0 words"
    assert "of 24" in facts["perplexity"]
    assert facts["dead words"].startswith("0")
    assert len(page.all("svg", class_="plot")) == 6
    assert "Goes with:" in page.html
    assert "normalised pointwise mutual information" in page.html


def test_named_words_are_larger_and_alone(store: Path, shards: Path, tmp_path: Path) -> None:
    report = write_words_page(store, shards, tmp_path / "named.html", Wish(layer="block3", words=(5, 2, 5)))
    (layer,) = report.layers
    assert list(layer.words) == [5, 2]
    assert [len(word.examples) for word in layer.words.values()] == [min(16, w.images) for w in layer.words.values()]
    page = Page(report.file.read_text())
    assert [tag.text for tag in page.all("h4")] == ["word 5", "word 2"]
    examples = [example for word in layer.words.values() for example in word.examples]
    assert [tag.text.split()[0] for tag in page.all("figcaption") if "img" in tag.text] == [e.key for e in examples]
    thumbnails = page.thumbnails()
    assert len(thumbnails) == 2 * len(examples)
    for (whole, picture), (patch, same) in zip(thumbnails[::2], thumbnails[1::2], strict=True):
        assert picture == same  # embedded once
        assert whole.attributes["viewbox"] == "0 0 16 16"
        assert "patch" in patch.attributes["class"]


def test_large_views_are_embedded_smaller_and_patches_cut_out(shards: Path, tmp_path: Path) -> None:
    view = {"size": 160, "resize": 160, "cutmix": False}
    images = write_shards(tmp_path / "shards", 12)
    teacher = write_teacher(tmp_path / "teacher.safetensors", view=view)
    store = make_store(tmp_path / "words.zarr", images, teacher, layers=("block3",), num_words=(6,))
    report = write_words_page(store, images, tmp_path / "words.html", Wish(per_gallery=3))
    page = Page(report.file.read_text())
    assert {page.picture(name).shape for _, name in page.thumbnails()} == {(112, 112, 3)}
    small = {tag.attributes["id"] for tag in page.all("image")} - {name for _, name in page.thumbnails()}
    for name in small:
        assert page.picture(name).shape[0] <= 56
    assert not page.all("image", class_="px")
    assert page.all("path", class_="dim")


def test_keys_are_escaped(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 9, prefix="<img>&\"'")
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    store = make_store(tmp_path / "words.zarr", shards, teacher, layers=("block3",), num_words=(4,))
    page = Page(write_words_page(store, shards, tmp_path / "words.html", Wish()).file.read_text())
    assert not page.all("img")
    assert page.thumbnails()[0][0].text.startswith("<img>&\"'")


def test_the_same_store_gives_the_same_page(store: Path, shards: Path, tmp_path: Path, report: WordsReport) -> None:
    again = write_words_page(store, shards, tmp_path / "words.html", Wish(per_gallery=5))
    assert again.file.read_bytes() == report.file.read_bytes()


def test_a_word_that_no_image_holds(store: Path, shards: Path, tmp_path: Path) -> None:
    copy, opened = tmp_path / "words.zarr", open_store(store)
    shutil.copytree(store, copy)
    add_layer(copy, "sparse", opened.load_words("block3"))
    report = write_words_page(copy, shards, tmp_path / "words.html", Wish(layer="sparse", words=(30,)))
    assert (report.layers[0].words[30].images, report.layers[0].looked_up) == (0, 0)
    page = Page(report.file.read_text())
    assert "no image holds this word" in page.all("article")[0].text
    facts = dict(zip([tag.text for tag in page.all("dt")], [tag.text for tag in page.all("dd")], strict=True))
    assert facts["inertia"].startswith("not recorded")
    assert len(page.all("svg", class_="plot")) == 2  # k-means left no history
    assert "16 of 40 words occur in no image" not in report.text()


def test_warnings_are_shown(store: Path, shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(store, tmp_path / "words.zarr")
    add_layer(copy, "flat", np.full((IMAGES, 4, 4), 5, np.uint16))
    report = write_words_page(copy, shards, tmp_path / "words.html", Wish(layer="flat"))
    warning = "the vocabulary has collapsed: word 5 fills 100 % of all locations"
    assert warning in report.text()
    assert warning in report.file.read_text()
    assert "these shards have none of its nearest images" in report.file.read_text()


def test_plots_take_the_colours_of_the_page() -> None:
    counts = np.random.default_rng(0).zipf(1.3, 60_000).clip(0, 10**6) - 1
    svg = [
        plots.rank_frequency(counts, np.minimum(counts, 500), "one"),
        plots.distinct_words(np.bincount([3, 5, 5, 9], minlength=17), "two"),
        plots.distinct_words(np.bincount([1, 1], minlength=3137), "three"),
        plots.inertia([5.0, 2.0, 1.0], 0.5, "four"),
        plots.inertia([5.0], None, "five"),
    ]
    page = Page("".join(svg))
    assert all(count == 1 for count in page.ids.values())
    for text in svg:
        assert text.startswith('<svg class="plot"')
        assert len(text) < 60_000
        assert not re.search(r"https?:|<style|<\?xml|<!DOCTYPE|font-family|#0102", text)
        assert "var(--one)" in text
    assert "median 5" in svg[1]
