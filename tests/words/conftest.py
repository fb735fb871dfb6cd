import shutil
from collections.abc import Iterator
from pathlib import Path

import faiss
import pytest
import torch
from encoding import run_encode
from growing import LAYERS, NEW, small_chunks_patch
from teacher_sets import IMAGES, write_shards, write_teacher

from bowstore.words.store import layer


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny work: threads that spin while they wait for each other would cost more than they give."""
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", IMAGES)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of 20 rows, so that a few images make several."""
    monkeypatch.setattr(layer, "MIN_CHUNK_BYTES", 1)
    monkeypatch.setattr(layer, "CHUNK_STEP_ROWS", 20)
    return 20


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of images that came later."""
    return write_shards(tmp_path_factory.mktemp("more") / "shards", NEW, seed=1, prefix="new")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, shards: Path) -> Path:
    """A store of two layers, in chunks of 20 rows; not to be changed."""
    path = tmp_path_factory.mktemp("first") / "words.zarr"
    with small_chunks_patch():
        run_encode(teacher=teacher_file, shards=shards, store=path, **LAYERS)
    return path


@pytest.fixture
def store(first: Path, tmp_path: Path, small_chunks: int) -> Path:
    return Path(shutil.copytree(first, tmp_path / "words.zarr"))
