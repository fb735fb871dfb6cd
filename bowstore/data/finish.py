"""What a CPU does with decoded images: torch's antialiased resize and one pass over its result, in threads of its own.

DALI's antialiased resize costs more than decoding on a CPU, torch's uint8 kernel a tenth of that; it is the one that
torchvision uses, so that both views are torchvision's to the bit (for the pixels that DALI decodes). Flip, jitter,
CutMix and normalisation are one pass after it (`bowstore.data.mix`). While these threads work, DALI decodes the
batches after, and the caller trains on those before.

Legend: B batch, S side of the view, H W pixels of a decoded image; images are HWC here, which is channels_last.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from bowstore.config import ViewConfig
from bowstore.data.mix import Mixing, mix
from bowstore.data.plan import MIX_GROUP, Plan
from bowstore.data.reader import prefetched
from bowstore.data.resize import centre, resize_into, target
from bowstore.data.views import CleanView, normalisation

AHEAD = 2  # batches finished or in the making before they are asked for
_KEPT = 4  # buffers of batches that nobody refers to any more: what is in flight, and one in use
_CHUNK = 4  # images of the clean view that a thread takes at a time
T = TypeVar("T")


def finished(made: Iterator[tuple[T, Any]], finish: Callable[[T, Any], Any]) -> Iterator[tuple[T, Any]]:
    """Yield what each batch was and what `finish` makes of its decoded images, in order; made in a thread ahead."""

    def job(what: T, decoded: Any) -> tuple[T, Any]:
        return what, finish(what, decoded)

    return prefetched((partial(job, what, decoded) for what, decoded in made), AHEAD - 1)


class Workers:
    """Threads that share the parts of a batch."""

    def __init__(self, threads: int) -> None:
        self._others = threads - 1  # the caller is one of them
        self._pool = ThreadPoolExecutor(max(1, self._others), "finish")

    def each(self, parts: Iterable[int], work: Callable[[int], None]) -> None:
        """Do the `work` of each part; return when all is done."""
        todo = iter(parts)  # shared: each thread takes the next

        def run() -> None:
            for part in todo:
                work(part)

        waiting = [self._pool.submit(run) for _ in range(self._others)]
        try:
            run()
        finally:
            for other in waiting:
                other.result()


class Buffers:
    """Memory of batches, lent as tensors and lent again only when nobody refers to any part of the tensor.

    A fresh buffer for each batch costs the kernel a page fault every 4 KB, more than the normalisation costs. What is
    lent is a NumPy array made for that loan: PyTorch keeps it as long as any tensor or array shares its memory, and
    its end is what brings the memory back.
    """

    def __init__(self, batch: int, size: int) -> None:
        self._shape = (batch, size, size, 3)
        self._free: deque[NDArray[np.float32]] = deque(maxlen=_KEPT)  # appending and popping are atomic

    def lend(self, count: int) -> Tensor:
        """Float32 (count, S, S, 3), whatever it held before."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._shape, np.float32)
        loan = memory[:count]
        weakref.finalize(loan, self._free.append, memory).atexit = False
        return torch.from_numpy(loan)


class _Scratch(threading.local):
    """Pixels of one thread: always the same memory, so that it stays in the core's cache."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def __call__(self, *shape: int) -> NDArray[np.uint8]:
        """Uninitialised uint8 of that shape."""
        need = prod(shape)
        if len(self._memory) < need:
            self._memory = np.empty(need, np.uint8)
        return self._memory[:need].reshape(shape)


def _pixels(decoded: Any, place: int) -> Tensor:
    """One image (H, W, 3) of a batch of DALI's, where it lies."""
    image: Tensor = from_dlpack(decoded[place].__dlpack__())
    return image


def train_finish(
    view: ViewConfig, batch: int, threads: int, *, normalise: bool = True
) -> Callable[[tuple[Plan, Any], Any], Tensor]:
    """What makes a batch of the train view from its decoded windows; `normalise` false ends after the resize.

    A thread takes a group of images that are mixed with each other: their resized pixels are still in its cache when
    they are mixed.
    """
    workers, buffers, scratch, size = Workers(threads), Buffers(batch, view.size), _Scratch(), view.size

    def finish(what: tuple[Plan, Any], decoded: Any) -> Tensor:
        mixing = Mixing.of(what[0], view)
        images_BSS3 = buffers.lend(len(decoded))
        rows = images_BSS3.numpy().reshape(len(decoded), size, 3 * size)

        def work(first: int) -> None:
            count = min(MIX_GROUP, len(decoded) - first)
            resized = scratch(count, size, size, 3)
            for place in range(count):
                resize_into(_pixels(decoded, first + place), resized[place])
            if normalise:
                mix(rows, resized.reshape(count, size, 3 * size), first, mixing)

        workers.each(range(0, len(decoded), MIX_GROUP), work)
        return images_BSS3.permute(0, 3, 1, 2)

    return finish


def clean_finish(view: CleanView, batch: int, threads: int) -> Callable[[Any, Any], Tensor]:
    """What makes a batch of the clean view from whole decoded images."""
    workers, buffers, size = Workers(threads), Buffers(batch, view.size), view.size
    mean, scale = (np.tile(values, size) for values in normalisation(view))
    wide, square = _Scratch(), _Scratch()

    def resized(image_HW3: Tensor) -> NDArray[np.uint8]:
        if view.resize is not None and not view.squash:
            return centre(image_HW3, view.resize, size, wide)
        if view.resize is not None:
            image_HW3 = resize_into(image_HW3, wide(*target(image_HW3.shape, view.resize), 3))
        out = square(size, size, 3)
        resize_into(image_HW3, out)
        return out

    def finish(_: Any, decoded: Any) -> Tensor:
        images_BSS3 = buffers.lend(len(decoded))
        rows = images_BSS3.numpy().reshape(len(decoded), size, 3 * size)

        def work(first: int) -> None:
            for place in range(first, min(first + _CHUNK, len(decoded))):
                np.copyto(rows[place].reshape(size, size, 3), resized(_pixels(decoded, place)))
                np.subtract(rows[place], mean, out=rows[place])
                np.multiply(rows[place], scale, out=rows[place])

        workers.each(range(0, len(decoded), _CHUNK), work)
        return images_BSS3.permute(0, 3, 1, 2)

    return finish
