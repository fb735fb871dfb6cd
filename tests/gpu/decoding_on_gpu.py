"""Training and encoding from shards on a GPU; test_gpu_sections.py runs each test in a process of its own.

A decoder that crashes takes its process along: so one test is lost, and no more.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from jpeg_writer import write_jpeg
from numpy.typing import NDArray
from shard_sets import ShardMaker, write_store, write_tar

from bowstore.config import ViewConfig, validate
from bowstore.data.gpu_decode import Way, gpu_decoding
from bowstore.data.gpu_probe import decoded, differences, pillow, windows
from bowstore.data.index import Index, build_index, open_index
from bowstore.data.pipeline import clean_batches, train_batches
from bowstore.data.plan import Schedule, plans
from bowstore.data.reader import ShardReader
from bowstore.data.views import CleanView, clean_view
from bowstore.runs import read_metrics
from bowstore.train.config import TrainConfig
from bowstore.train.loop import train
from bowstore.words.encode.config import EncodeConfig
from bowstore.words.encode.encode import encode
from bowstore.words.store.store import open_store
from bowstore.words.store.verify import digest

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("task", ["rotation", "words"])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_on_a_gpu(make_shard_set: ShardMaker, tmp_path: Path, task: str, compiled: bool) -> None:
    index = make_shard_set(64)
    store = write_store(tmp_path / "words.zarr", index)
    config = validate(
        TrainConfig,
        {
            "name": "gpu",
            "task": task,
            "shards": str(index.root),
            "view": {"size": 32, "resize": None, "cutmix": task == "words"},
            "model": {"arch": "resnet18"},
            "words": {"store": str(store), "layer": "block3"} if task == "words" else {},
            "optim": {"batch": 16, "epochs": 2},
            "runtime": {"device": "cuda", "compile": compiled, "log_every_steps": 2},
        },
        "test",
    )
    report = train(config, tmp_path / "runs")
    assert report.steps == 8
    assert all(np.isfinite(line["loss"]) for line in read_metrics(tmp_path / "runs" / "gpu"))


def test_words_of_a_gpu_are_those_of_the_cpu_but_for_near_ties(make_shard_set: ShardMaker, tmp_path: Path) -> None:
    index = make_shard_set(64, size=96)
    layers = ("conv3", "conv4")
    first = EncodeConfig(
        teacher="torchvision:resnet18", size=64, resize=64, layers=layers, num_words=(24,), batch=16, device="cpu"
    )
    encode(first, shards=index.root, store=tmp_path / "cpu.zarr")
    same_words = first.model_copy(update={"vocabulary": tmp_path / "cpu.zarr", "num_words": (), "device": "cuda"})
    for name in ("gpu.zarr", "again.zarr"):
        encode(same_words, shards=index.root, store=tmp_path / name)
    for layer in layers:
        ours, oracle = (open_store(tmp_path / name).load_words(layer) for name in ("gpu.zarr", "cpu.zarr"))
        assert (ours == oracle).mean() > 0.95  # the decoders differ by a level of grey here and there
    assert digest(tmp_path / "gpu.zarr") == digest(tmp_path / "again.zarr")


WAYS: list[Way] = ["slice", "image"]
SUBSAMPLINGS = [(1, 1), (2, 1), (2, 2), (1, 2), (4, 1)]
VIEW = ViewConfig(size=64, resize=80)


def colourful(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """Colours that change within a few pixels, so that it shows how chroma is upsampled: (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (2 + number % 5) + c) * np.cos(y / 3 + 2 * c) for c in range(3)]
    return np.stack([128 + 60 * wave for wave in waves], -1).astype(np.uint8)


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """48 images, most of them 4:2:0."""
    factors = [(2, 2), (2, 2), (2, 2), *SUBSAMPLINGS]
    samples = [
        (f"{n:02}", write_jpeg(colourful(n, 90 + n % 7, 110 - n % 5), *factors[n % len(factors)]), n % 4)
        for n in range(48)
    ]
    write_tar(tmp_path / "shards" / "a.tar", samples)
    build_index(tmp_path / "shards")
    return open_index(tmp_path / "shards")


def works(way: Way) -> Way:
    """The way, if the trial found that it works here."""
    if gpu_decoding(GPU).way == "image" and way == "slice":
        pytest.skip(gpu_decoding(GPU).why)
    return way


@pytest.mark.parametrize("hw_load", [0.0, 1.0])
@pytest.mark.parametrize("way", WAYS)
def test_windows_of_every_subsampling_are_pillows(way: Way, hw_load: float) -> None:
    """Within the rounding of the inverse cosine transform: chroma that is only repeated is several levels away."""
    sides = (90, 111)
    places = np.array(windows(*sides) * len(SUBSAMPLINGS), np.int32)
    images = [np.frombuffer(write_jpeg(colourful(1, *sides), *factors), np.uint8) for factors in SUBSAMPLINGS]
    encoded = [image for image in images for _ in windows(*sides)]
    found, expected = decoded(encoded, places, GPU.index, works(way), hw_load), pillow(encoded, places)
    for ours, theirs, place in zip(found, expected, places.tolist(), strict=True):
        assert differences([ours], [theirs]) < (1.0 if place[2] * place[3] > 500 else 4.0), place


def train_views(index: Index, device: torch.device, way: Way | None = None) -> Iterator[torch.Tensor]:
    steps = plans(Schedule(len(index), 8, 0), index, VIEW, start=0, stop=6)
    for batch in train_batches(ShardReader(index), VIEW, steps, batch=8, device=device, way=way):
        yield batch.images_BCHW


@pytest.mark.parametrize("way", WAYS)
def test_the_train_view_is_the_cpus(index: Index, way: Way) -> None:
    deviation = 255 * torch.tensor(VIEW.std)[:, None, None]
    for ours, oracle in zip(train_views(index, GPU, works(way)), train_views(index, CPU), strict=True):
        assert ours.device.type == GPU.type
        assert ((ours.float().cpu() - oracle).abs() * deviation).mean() < 2.0


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_clean_view_is_the_cpus_and_the_same_in_any_batch(index: Index, way: Way, squash: bool) -> None:
    view: CleanView = clean_view(VIEW, squash=squash)
    deviation = 255 * torch.tensor(VIEW.std)[:, None, None]

    def images(device: torch.device, batch: int, rows: NDArray[np.int64]) -> torch.Tensor:
        made = clean_batches(ShardReader(index), view, rows, batch=batch, device=device, way=works(way))
        return torch.cat([images_BCHW.cpu() for _, images_BCHW in made])

    rows = np.arange(len(index))
    ours = images(GPU, 16, rows)
    assert ((ours - images(CPU, 16, rows)).abs() * deviation).mean() < 1.5
    assert torch.equal(images(GPU, 16, rows[::-1].copy()).flip(0), ours)
    assert torch.equal(images(GPU, 5, rows), ours)


def test_batches_that_are_held_stay_what_they_were(index: Index) -> None:
    """Six of them, through other work on the same stream that takes and frees memory."""
    held, copies = [], []
    for images_BCHW in train_views(index, GPU):
        held.append(images_BCHW)
        copies.append(images_BCHW.clone())
        for _ in range(20):
            torch.randn(1024, 1024, device=GPU).sum()
    assert len(held) == 6
    assert all(torch.equal(one, other) for one, other in zip(held, copies, strict=True))


class Spoilt(ShardReader):
    """A source whose memory is written over once nobody reads it any more."""

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        self.lent: list[list[NDArray[np.uint8]]] = []

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        self.lent.append([image.copy() for image in super().read(rows)])
        return self.lent[-1]


def test_memory_is_read_no_more_once_a_batch_is_made(index: Index) -> None:
    """Spoilt as soon as the stream is through with a batch, which is when `Feed` lets go of it."""
    source, rows, found = Spoilt(index), np.arange(len(index)), []
    for number, (_, images_BCHW) in enumerate(clean_batches(source, clean_view(VIEW), rows, batch=8, device=GPU)):
        if GPU.type == "cuda":
            torch.cuda.current_stream(GPU).synchronize()
        for image in source.lent[number]:
            image[:] = 0xFF
        found.append(images_BCHW.clone())
    expected = clean_batches(ShardReader(index), clean_view(VIEW), rows, batch=8, device=GPU)
    assert all(torch.equal(ours, theirs) for ours, (_, theirs) in zip(found, expected, strict=True))
