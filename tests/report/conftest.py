from pathlib import Path

import pytest
from page_reader import Page
from teacher_sets import IMAGES, write_shards, write_teacher
from word_stores import make_store, small_chunks

from bowstore.report.config import Wish
from bowstore.report.page import WordsReport, write_words_page


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", IMAGES)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Two layers of 96 images in five chunks; not to be changed."""
    folder = tmp_path_factory.mktemp("store")
    teacher = write_teacher(folder / "teacher.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch)
        return make_store(folder / "words.zarr", shards, teacher)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, store: Path, shards: Path) -> WordsReport:
    """The galleries of both layers."""
    out = tmp_path_factory.mktemp("page") / "words.html"
    return write_words_page(store, shards, out, Wish(per_gallery=5))


@pytest.fixture(scope="module")
def page(report: WordsReport) -> Page:
    return Page(report.file.read_text())
