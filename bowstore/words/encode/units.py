"""Units of work: runs of batches that one rank takes through the teacher, and what becomes of them.

Batches are cut before any rank takes one, and a batch is never split: what is made of an image does not depend on who
makes it, nor on how many ranks there are. How many batches a unit has does; a rank gets several units, however few
images there are, so that all ranks end at nearly the same time.

Legend: N images, B batch.
"""

from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from bowstore.words.encode.crew import Work
from bowstore.words.encode.forward import Clock, forward
from bowstore.words.encode.job import Job
from bowstore.words.encode.lanes import Maps

T = TypeVar("T")
Made = list[tuple[NDArray[np.int64], T]]  # rows, and what was made of them
_UNITS_A_RANK = 16  # at least, where there are so many batches: the last one to end is late by a small part of it


def in_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays by name, as `safetensors.numpy.load` reads them; saved as they are, slices would lose their strides."""
    return save({name: np.ascontiguousarray(values) for name, values in arrays.items()})


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
    units: Sequence[NDArray[np.int64]],
    use: Callable[[NDArray[np.int64], Maps], T],
    pack: Callable[[Made[T]], bytes],
    *,
    clock: Clock,
    stage: str,
) -> Work:
    """A rank's work of a stage (`Crew.share`).

    Args:
        job: teacher, images, batch.
        units: index rows of each, ascending, as are the units.
        use: as of `forward`.
        pack: a unit's result, of its rows and what `use` gave of them, in order.
        clock: counts the time; that of waiting for rank 0 as "write".
        stage: as of `forward`.
    """
    firsts = [int(rows[0]) for rows in units]

    def work(numbers: Iterator[int], wanted: Callable[[int], bool]) -> Iterator[tuple[int, bytes]]:
        def batches() -> Iterator[NDArray[np.int64]]:
            for number in numbers:
                rows = units[number]
                for start in range(0, len(rows), job.batch):
                    if not wanted(number):  # another rank was faster
                        break
                    yield rows[start : start + job.batch]

        made: Made[T] = []
        for rows_B, found in forward(job, batches(), use, clock=clock, stage=stage):
            number = bisect(firsts, int(rows_B[0])) - 1  # batches come in order, those of very large images in parts
            if rows_B[0] == firsts[number]:
                made = []  # what is there is of a unit that another rank was faster with
            made.append((rows_B, found))
            if rows_B[-1] == units[number][-1]:
                result = pack(made)
                with clock.time("write"):
                    yield number, result

    return work
