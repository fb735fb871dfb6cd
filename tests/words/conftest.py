import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from PIL import Image

from bowstore.config import TrainConfig
from bowstore.data.index import build_index
from bowstore.models.registry import build_backbone
from bowstore.models.saved import save_backbone
from bowstore.words import layer

IMAGES = 96


def write_shards(folder: Path, images: int, *, seed: int = 0, prefix: str = "img") -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for shard, rows in enumerate(np.array_split(np.arange(images), 3)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in rows:
                coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
                buffer = io.BytesIO()
                coarse.resize((20, 18)).save(buffer, "png")
                member = tarfile.TarInfo(f"{prefix}{row:04d}.png")
                member.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(member, buffer)
    build_index(folder)
    return folder


def write_teacher(path: Path, *, seed: int = 0, **values: object) -> Path:
    config = TrainConfig.model_validate(
        {
            "name": "tiny-rotnet",
            "task": "rotation",
            "view": {"size": 16, "resize": 16, "cutmix": False},
            "model": {"arch": "wrn-10-1"},
            "student": "tiny-bownet",
            **values,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_backbone(path, build_backbone(config.model), config)
    return path


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
