"""The graphs read the memory that they are fed from, and it lives as long as they do."""

import subprocess
import sys
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from in_memory import Memory
from numpy.typing import NDArray
from shard_sets import encode_jpeg, textured_image

from bowstore.config import ViewConfig
from bowstore.data.feed import Feed
from bowstore.data.pipeline import clean_batches
from bowstore.data.views import clean_view
from bowstore.errors import DataError

CPU = torch.device("cpu")
VIEW = ViewConfig(size=64, resize=None)
ROWS, BATCH = 96, 8


class Lender(Memory):
    """Encoded images, read into memory that a test may write over."""

    def __init__(self, images: list[bytes], *, keep: bool = True) -> None:
        super().__init__(images)
        self._keep = keep
        self.lent: list[list[NDArray[np.uint8]]] = []
        self.seen: list[list[weakref.ref[NDArray[np.uint8]]]] = []

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        found = [self.images[row % len(self)].copy() for row in rows.tolist()]
        self.seen.append([weakref.ref(image) for image in found])
        if self._keep:
            self.lent.append(found)
        return found


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """Large enough that a batch is still decoded when the one before is there."""
    return [encode_jpeg(textured_image(number, 600, 500)) for number in range(BATCH)]


def views(source: Lender, *, spoilt: int) -> list[torch.Tensor]:
    """The batches of a source whose memory is written over: of each batch, when the one `spoilt` before it is there."""
    found = []
    batches = clean_batches(source, clean_view(VIEW), np.arange(ROWS), batch=BATCH, device=CPU, threads=1)
    for number, (_, images_BCHW) in enumerate(batches):
        found.append(images_BCHW.clone())
        for image in source.lent[min(number + spoilt, ROWS // BATCH - 1)]:
            image[:] = 0xFF
    return found


def test_the_memory_that_a_batch_is_read_from_is_free_when_the_batch_is_there(images: list[bytes]) -> None:
    first, *others = views(Lender(images), spoilt=0)
    assert all(torch.equal(batch, first) for batch in others), "each batch shows the same images"


def test_the_memory_of_later_batches_is_not_free_then(images: list[bytes]) -> None:
    """So the test above can fail. (The next batch may be finished already.)"""
    try:
        first, *others = views(Lender(images), spoilt=2)
    except DataError:
        return  # as good: what was left of an image was none
    assert not all(torch.equal(batch, first) for batch in others)


def test_nothing_is_held_for_longer(images: list[bytes]) -> None:
    source = Lender(images, keep=False)
    batches = clean_batches(source, clean_view(VIEW), np.arange(ROWS), batch=BATCH, device=CPU, threads=1)
    for number, _ in enumerate(batches):
        assert [image() for batch in source.seen[: number + 1] for image in batch] == [None] * BATCH * (number + 1)
    assert len(source.seen) == ROWS // BATCH


def test_a_gpu_keeps_it_until_the_device_is_through() -> None:
    """At the seam: on a GPU `take` is told by an event of the stream that waits for the batch."""
    feed: Feed[int] = Feed([partial(job, number) for number in range(5)], ["mirror"])
    through = [False] * 5
    kept = []
    for number in range(4):
        feed._next()
        kept.append(weakref.ref(feed._kept[-1][0]))
        assert feed.take(lambda number=number: through[number]) == number
    through[0] = through[2] = True  # of a stream, which goes in order: what is behind the second waits with it
    feed._next()
    assert feed.take(lambda: False) == 4
    assert [array() is None for array in kept] == [True, False, False, False]


def job(number: int) -> tuple[int, dict[str, NDArray[np.int32]]]:
    return number, {"mirror": np.full(4, number, np.int32)}


# Each image has a map of its own, so that letting go of it is unmapping it: a late read ends the process.
STOPPED = """
import io, mmap, sys
import numpy as np, torch
from PIL import Image
from bowstore.data.pipeline import clean_batches
from bowstore.data.views import CleanView

pixels = np.random.default_rng(0).integers(0, 255, (500, 600, 3), dtype=np.uint8)
buffer = io.BytesIO()
Image.fromarray(pixels).save(buffer, "JPEG")
image = buffer.getvalue()

class Mapped:
    def __len__(self): return 400
    def name(self, row): return str(row)
    def pixels(self, rows): return np.zeros(len(rows), np.int64)
    def read(self, rows): return [self.map() for _ in rows]
    def map(self):
        place = mmap.mmap(-1, len(image))
        place[:] = image
        return np.frombuffer(place, np.uint8)

view = CleanView(64, 72, False, (0, 0, 0), (1, 1, 1))
for end in ("close", "drop", "error", "exit"):
    print(end, flush=True)
    made = clean_batches(Mapped(), view, np.arange(400), batch=32, device=torch.device("cpu"), threads=1)
    next(made)
    if end == "close":
        made.close()
    elif end == "drop":
        del made
    elif end == "error":
        try:
            made.throw(KeyboardInterrupt)
        except KeyboardInterrupt:
            pass
"""


def test_no_memory_is_unmapped_under_a_graph_that_is_stopped() -> None:
    """Stopped in mid-run by closing, by dropping, by an interrupt, and by the end of the program."""
    result = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.split() == ["close", "drop", "error", "exit"]
    assert result.returncode == 0, f"{result.returncode}: {result.stderr[-500:]}"
