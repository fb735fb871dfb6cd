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
from bowstore.data.resize import as_slot, centre, resize_into, target, without_antialias
from bowstore.data.views import CleanView, normalisation
from bowstore.data.workers import prefetched

AHEAD = 2  # batches finished or in the making before they are asked for
_KEPT = 4  # buffers of batches that nobody refers to any more: what is in flight, and one in use
_AT_ONCE, _CACHE_BYTES = 16, 2**19  # what a thread takes at a time at most: images, and bytes of a core's cache
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


class _Loan(weakref.ref[NDArray[np.float32]]):
    """A reference to what was lent, which outlives it and knows its memory."""

    memory: NDArray[np.float32]


class Buffers:
    """Memory of batches, lent as tensors and lent again only when nobody refers to any part of the tensor.

    A fresh buffer for each batch costs the kernel a page fault every 4 KB, more than the normalisation costs. What is
    lent is a NumPy array made for that loan: PyTorch keeps it as long as any tensor or array shares its memory, and
    its end is what brings the memory back.
    """

    def __init__(self, batch: int, size: int) -> None:
        self._shape = (batch, size, size, 3)
        self._lent: dict[int, _Loan] = {}  # by identity, as arrays have no hash
        self._ended: deque[_Loan] = deque()
        self._free: deque[NDArray[np.float32]] = deque(maxlen=_KEPT)

    def lend(self, count: int) -> Tensor:
        """Float32 (count, S, S, 3), whatever it held before. For one thread; the tensor may die in any."""
        while self._ended:
            ended = self._ended.popleft()
            del self._lent[id(ended)]
            self._free.append(ended.memory)
        memory = self._free.pop() if self._free else np.empty(self._shape, np.float32)
        loan = memory[:count]
        # All that happens at a loan's end is this append, in C: of an interrupt in a callback nobody would learn.
        reference = _Loan(loan, self._ended.append)
        reference.memory = memory
        self._lent[id(reference)] = reference
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


class _Squares(threading.local):
    """Resized images of one thread.

    Attributes:
        rows: uint8 (count, S, 3 S).
        slots: the same memory, an image each.
    """

    def __init__(self, count: int, size: int) -> None:
        self.rows = np.empty((count, size, 3 * size), np.uint8)
        self.slots = [as_slot(row.reshape(size, size, 3)) for row in self.rows]


def _at_once(size: int, value_bytes: int) -> int:
    """How many images a thread takes at a time: of small ones several, because each call costs as much as they do."""
    return max(1, min(_AT_ONCE, _CACHE_BYTES // (3 * size * size * value_bytes)))


def _pixels(decoded: Any, place: int) -> Tensor:
    """One image (H, W, 3) of a batch of DALI's, where it lies."""
    image: Tensor = from_dlpack(decoded[place].__dlpack__())
    return image


def train_finish(
    view: ViewConfig, batch: int, threads: int, *, normalise: bool = True
) -> Callable[[tuple[Plan, Any], Any], Tensor]:
    """What makes a batch of the train view from its decoded windows; `normalise` false ends after the resize.

    A thread takes images that are mixed with each other: what it has resized is still in its cache when it mixes.
    """
    size = view.size
    count = -(-_at_once(size, 1) // MIX_GROUP) * MIX_GROUP
    workers, buffers, squares = Workers(threads), Buffers(batch, size), _Squares(count, size)

    def finish(what: tuple[Plan, Any], decoded: Any) -> Tensor:
        mixing = Mixing.of(what[0], view)
        images_BSS3 = buffers.lend(len(decoded))
        rows = images_BSS3.numpy().reshape(len(decoded), size, 3 * size)

        def work(first: int) -> None:
            places = range(first, min(first + count, len(decoded)))
            for place, slot in zip(places, squares.slots, strict=False):
                resize_into(_pixels(decoded, place), slot)
            if normalise:
                mix(rows, squares.rows[: len(places)], first, mixing)

        workers.each(range(0, len(decoded), count), work)
        return images_BSS3.permute(0, 3, 1, 2)

    return finish


def clean_finish(view: CleanView, batch: int, threads: int) -> Callable[[Any, Any], Tensor]:
    """What makes a batch of the clean view from whole decoded images."""
    size = view.size
    count = _at_once(size, 4)
    workers, buffers, squares, wide = Workers(threads), Buffers(batch, size), _Squares(count, size), _Scratch()
    mean, scale = (np.tile(values, size) for values in normalisation(view))

    def finish(_: Any, decoded: Any) -> Tensor:
        images_BSS3 = buffers.lend(len(decoded))
        images = images_BSS3.numpy()

        def work(first: int) -> None:
            places = range(first, min(first + count, len(decoded)))
            for place, slot in zip(places, squares.slots, strict=False):
                pixels = _pixels(decoded, place)
                if not view.antialias:
                    np.copyto(images[place], without_antialias(pixels, view).numpy())
                elif view.resize is None:
                    resize_into(pixels, slot)
                elif view.squash:
                    whole = as_slot(wide(*target(pixels.shape, view.resize), 3))
                    resize_into(resize_into(pixels, whole)[0].permute(1, 2, 0), slot)
                else:
                    np.copyto(images[place], centre(pixels, view.resize, size, wide))
            rows = images[first : places.stop].reshape(len(places), size, 3 * size)
            if view.antialias and (view.resize is None or view.squash):
                np.copyto(rows, squares.rows[: len(places)])
            np.subtract(rows, mean, out=rows)
            np.multiply(rows, scale, out=rows)

        workers.each(range(0, len(decoded), count), work)
        return images_BSS3.permute(0, 3, 1, 2)

    return finish
