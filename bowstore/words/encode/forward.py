"""Images through the teacher: decoding, network and use of its maps run side by side, in order, in bounded memory.

Ranks share the images by units, which are runs of batches. Batches are cut before any rank takes one, and a batch is
never split: what is made of an image does not depend on who makes it, nor on how many ranks there are. How many batches
a unit has does; a rank gets several units, however few images there are, so that all ranks end at nearly the same time.

Legend: B batch, C channels, H W pixels, c channels of a map, h w its cells.
"""

import threading
import time
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor

from bowstore.data.index import Index
from bowstore.data.pipeline import clean_batches
from bowstore.data.reader import ShardReader
from bowstore.errors import DataError
from bowstore.exact import cpu_threads, exact_float32
from bowstore.progress import Progress
from bowstore.words.encode.crew import Crew
from bowstore.words.encode.job import Job
from bowstore.words.encode.workers import compute_workers, workers

Maps = Mapping[str, Tensor]
Arrays = dict[str, NDArray[Any]]
Use = Callable[[NDArray[np.int64], Maps], Arrays]
_UNITS_A_RANK = 16  # at least, where there are so many batches: the last one to end is late by a small part of it


@dataclass
class Clock:
    """Where the time of a pass goes.

    Attributes:
        workers: threads that compute.
        seconds: by stage. `teacher` and what the maps are used for are the workers' own time, on a GPU with that for
            which each waits for the others' work; `start`, `images` and `write` are the time that the pass waited for
            the first images, for further ones, or for the disk.
    """

    workers: int
    seconds: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _begun: float = field(default_factory=time.perf_counter)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add a block's seconds to a stage."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun

    def shares(self) -> dict[str, float]:
        """Each stage's share, 0 to 1: of the workers' time for computing, of the pass's time for waiting."""
        elapsed = max(time.perf_counter() - self._begun, 1e-9)
        with self._lock:
            found = dict(self.seconds)
        alone = {"start", "images", "write"}
        return {
            stage: min(1.0, spent / elapsed / (1 if stage in alone else self.workers)) for stage, spent in found.items()
        }

    def binds(self) -> str:
        """The stage that the others wait for."""
        shares = {stage: share for stage, share in self.shares().items() if stage != "start"}
        return max(shares, key=lambda stage: shares[stage], default="")

    def text(self) -> str:
        """One line: what binds, and all shares."""
        shares = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in self.shares().items() if share >= 0.005)
        return f"{_SAID.get(self.binds(), self.binds())} binds ({shares})" if shares else ""


_SAID = {"images": "decoding", "write": "the disk"}


def forward(
    job: Job,
    batches: Iterable[NDArray[np.int64]],
    use: Use,
    *,
    clock: Clock,
    stage: str,
) -> Iterator[tuple[NDArray[np.int64], Arrays]]:
    """Rows (B,) and what `use` makes of their maps, in order.

    Args:
        job: says which teacher, images and device, and how many images a batch has at most; batches of very large
            images are split further, by the index alone.
        batches: rows of each batch; asked for a few batches ahead, in another thread.
        use: called with rows and maps (B, c, h, w) by layer, all finite, in a worker's thread.
        clock: counts the time.
        stage: the clock's name for the time of `use`.

    Raises:
        DataError: an image that does not decode, or maps that are not finite; names the images.
    """
    own, index, device = threading.local(), job.index, job.device
    # Workers launch one trunk after the other: two at once would hold twice the memory.
    launching: Any = threading.Lock() if device.type == "cuda" else nullcontext()

    def work(rows_B: NDArray[np.int64], images_BCHW: Tensor) -> Arrays:
        if not hasattr(own, "teacher"):
            own.teacher = job.teacher.replica()
        with clock.time("teacher"):
            with launching:
                maps: Maps = own.teacher.maps(images_BCHW)
            # On a GPU this waits for the trunk; the other worker's lies behind it meanwhile.
            _check_finite(index, rows_B, maps)
        with clock.time(stage):
            return use(rows_B, maps)

    view, threads = job.teacher.view, job.config.threads
    images = clean_batches(ShardReader(index), view, batches, batch=job.batch, device=device, threads=threads)
    waiting: deque[tuple[NDArray[np.int64], Future[Arrays]]] = deque()
    with cpu_threads(device, 1), exact_float32(), workers(clock.workers) as pool:
        try:
            wait_for = "start"
            while True:
                with clock.time(wait_for):
                    found = next(images, None)
                wait_for = "images"
                if found is None:
                    break
                rows_B, images_BCHW = found
                # A copy: the pipeline refills its buffer while workers still read.
                waiting.append((rows_B, pool.submit(work, rows_B, images_BCHW.clone())))
                # One batch more than there are workers lies ready: none of them waits for this thread.
                if len(waiting) > clock.workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _check_finite(index: Index, rows_B: NDArray[np.int64], maps: Maps) -> None:
    for layer, map_Bchw in maps.items():
        # Finite values may have an infinite sum, others never a finite one; a sum takes a quarter of the time.
        if not bool(map_Bchw.sum().isfinite()) and not bool(map_Bchw.isfinite().all()):
            finite_B = map_Bchw.flatten(1).isfinite().all(dim=1).cpu().numpy()
            bad = [index.key(row) for row in rows_B[~finite_B].tolist()]
            raise DataError(
                f"layer {layer!r} of the teacher gives NaN or infinity for {len(bad)} images of a batch, "
                f"for example {', '.join(bad[:5])}; check the teacher's weights and these images"
            )


def cut_units(blocks: Sequence[slice], batch: int, ranks: int, most: int | None = None) -> list[slice]:
    """Cut blocks of rows into units of whole batches.

    Args:
        blocks: no batch goes beyond the end of one.
        batch: images.
        ranks: that share the work.
        most: batches of a unit; None for no bound but the block.
    """
    batches = sum(-(-(block.stop - block.start) // batch) for block in blocks)
    size = max(1, min(batches // (_UNITS_A_RANK * ranks), most or batches)) * batch
    return [
        slice(start, min(start + size, block.stop))
        for block in blocks
        for start in range(block.start, block.stop, size)
    ]


def through_teacher(
    job: Job,
    crew: Crew,
    units: Sequence[NDArray[np.int64]],
    use: Use,
    *,
    pack: Callable[[NDArray[np.int64], Arrays], Arrays] = lambda _rows, arrays: arrays,
    keep: Callable[[NDArray[np.int64], Arrays], None] | None,
    stage: str,
    progress: Progress,
) -> Clock:
    """Make something of the images of all units, together with the other ranks (`Crew.share`).

    Args:
        job: teacher, images, batch.
        crew: the ranks.
        units: index rows of each, ascending, as are the units.
        use: as of `forward`.
        pack: what is sent of a unit, of its rows and the arrays of all its batches, joined; in this thread, because
            what workers take of the memory for arrays of many lengths stays theirs.
        keep: rank 0's, called with the rows of every unit and what was sent of it.
        stage: as of `forward`, and of the crew.
        progress: of the images.

    Returns:
        Where this rank's time went; that of waiting for rank 0 is "write".
    """
    firsts, clock = [int(rows[0]) for rows in units], Clock(compute_workers(job.device))

    def work(numbers: Iterator[int], wanted: Callable[[int], bool]) -> Iterator[tuple[int, bytes]]:
        def batches() -> Iterator[NDArray[np.int64]]:
            for number in numbers:  # asked for by the thread that reads ahead: it is dealt before the last is made
                rows = units[number]
                for start in range(0, len(rows), job.batch):
                    if not wanted(number):  # another rank was faster
                        break
                    yield rows[start : start + job.batch]

        made: list[Arrays] = []
        for rows_B, found in forward(job, batches(), use, clock=clock, stage=stage):
            number = bisect(firsts, int(rows_B[0])) - 1  # batches come in order, those of very large images in parts
            if rows_B[0] == firsts[number]:
                made = []  # what is there is of a unit that another rank was faster with
            made.append(found)
            if rows_B[-1] == units[number][-1]:
                arrays = {name: np.concatenate([part[name] for part in made]) for name in found}
                result = save(pack(units[number], arrays))
                with clock.time("write"):
                    yield number, result

    def kept(number: int, result: bytes) -> None:
        assert keep, "rank 0 keeps what is made"
        keep(units[number], load(result))
        progress.advance(len(units[number]), clock.text())

    crew.share(stage, len(units), work, kept)
    return clock
