"""Units of work: runs of batches that one rank takes through the teacher, and what becomes of them.

Batches are cut before any rank takes one, and a batch is never split: what is made of an image does not depend on who
makes it, nor on how many ranks there are. How many batches a unit has does; a rank gets several units, however few
images there are, so that all ranks end at nearly the same time.

Legend: N images, B batch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from bowstore.words.encode.crew import Work
from bowstore.words.encode.forward import Clock, forward
from bowstore.words.encode.job import Job
from bowstore.words.encode.lanes import Maps

T = TypeVar("T")
_UNITS_A_RANK = 16  # at least, where there are so many batches: the last one to end is late by a small part of it


def in_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays by name, as `safetensors.numpy.load` reads them; saved as they are, slices would lose their strides."""
    return save({name: np.ascontiguousarray(values) for name, values in arrays.items()})


def cut_units(
    blocks: Iterable[slice],
    batch: int,
    ranks: int,
    *,
    needed: Callable[[slice], bool] = lambda _rows: True,
    most: int | None = None,
) -> list[slice]:
    """Cut blocks of rows into batches, and put those that follow each other into units.

    Args:
        blocks: no batch goes beyond the end of one.
        batch: images.
        ranks: that share the work.
        needed: whether a batch has to be made.
        most: batches of a unit; None for no bound but the block.
    """
    cut = [
        [rows for start in range(block.start, block.stop, batch) if needed(rows := _upto(start, batch, block.stop))]
        for block in blocks
    ]
    size = max(1, min(sum(map(len, cut)) // (_UNITS_A_RANK * ranks), most or np.iinfo(np.int64).max))
    units = list[slice]()
    for batches in cut:
        room = 0  # for further batches in the last unit, of which none is in another block
        for rows in batches:
            if room and units[-1].stop == rows.start:
                units[-1] = slice(units[-1].start, rows.stop)
            else:
                units.append(rows)
                room = size
            room -= 1
    return units


def _upto(start: int, batch: int, stop: int) -> slice:
    return slice(start, min(start + batch, stop))


def through_teacher(
    job: Job,
    units: Sequence[slice],
    rows: Callable[[slice], NDArray[np.int64]],
    use: Callable[[NDArray[np.int64], Maps], T],
    pack: Callable[[slice, list[tuple[NDArray[np.int64], T]]], bytes],
    *,
    clock: Clock,
    stage: str,
) -> Work:
    """A rank's work of a stage (`Crew.share`).

    Args:
        job: teacher, images, batch.
        units: by number.
        rows: index rows of a part of a unit, ascending.
        use: as of `forward`.
        pack: a unit's result, of the unit and what `use` gave of its rows, in order.
        clock: counts the time; that of waiting for rank 0 as "write".
        stage: as of `forward`.
    """

    def work(numbers: Iterator[int], wanted: Callable[[int], bool]) -> Iterator[tuple[int, bytes]]:
        ahead: deque[tuple[int, int, bool]] = deque()  # of batches in flight: unit, last row, whether it ends the unit

        def batches() -> Iterator[NDArray[np.int64]]:
            for number in numbers:
                unit = units[number]
                for start in range(unit.start, unit.stop, job.batch):
                    if not wanted(number):  # another rank was faster
                        break
                    part = _upto(start, job.batch, unit.stop)
                    rows_B = rows(part)
                    ahead.append((number, int(rows_B[-1]), part.stop == unit.stop))
                    yield rows_B

        made: dict[int, list[tuple[NDArray[np.int64], T]]] = {}
        for rows_B, found in forward(job, batches(), use, clock=clock, stage=stage):
            number, last, ends = ahead[0]
            made.setdefault(number, []).append((rows_B, found))
            if rows_B[-1] == last:  # batches of very large images come back in parts
                ahead.popleft()
                if ends:
                    result = pack(units[number], made.pop(number))
                    with clock.time("write"):
                        yield number, result

    return work
