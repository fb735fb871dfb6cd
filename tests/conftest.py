import re
from pathlib import Path

import pytest
import torch
from shard_sets import ShardMaker, encode_jpeg, textured_image, write_tar

from bowstore.data.index import Index, build_index
from bowstore.progress import say_once


def pytest_configure(config: pytest.Config) -> None:
    """With another PyTorch than the one that the Makefile installs, its warnings are shown, and are no errors."""
    if not torch.__version__.startswith(pinned_torch()):
        config.addinivalue_line("filterwarnings", "default")


def pinned_torch() -> str:
    """The version of PyTorch that the tests are free of warnings with."""
    found = re.search(r"torch==([\d.]+)", (Path(__file__).parents[1] / "Makefile").read_text())
    assert found, "the Makefile pins PyTorch"
    return found[1]


@pytest.fixture
def make_shard_set(tmp_path: Path) -> ShardMaker:
    """Makes indexed shards of textured images: make(count, per_shard=..., folder=..., classes=...)."""

    def make(
        count: int, *, per_shard: int = 40, folder: str = "shards", classes: int = 4, size: int = 32, first: int = 0
    ) -> Index:
        root = tmp_path / folder
        samples = []
        for number in range(first, first + count):
            height, width = size + number % 5, size + number % 3
            data = encode_jpeg(textured_image(number, height, width))
            samples.append((f"c{number % classes}/{number:05d}", data, number % classes))
        for shard, start in enumerate(range(0, count, per_shard)):
            write_tar(root / f"train-{shard:06d}.tar", samples[start : start + per_shard])
        return build_index(root, classes=tuple(f"c{n}" for n in range(classes)))

    return make


@pytest.fixture(autouse=True)
def _no_line_is_said_yet() -> None:
    """Each test is a command of its own."""
    say_once.cache_clear()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small networks are quicker on one thread, and the same bits come out on every machine."""
    torch.set_num_threads(1)
