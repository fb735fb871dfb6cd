from collections.abc import Iterator
from pathlib import Path

import faiss
import pytest
import torch
from teacher_sets import IMAGES, write_shards, write_teacher

from bowstore.words import layer


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
