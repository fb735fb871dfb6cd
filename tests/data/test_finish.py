"""Finishing on a CPU: buffers that are lent until nobody has them, groups, order and errors."""

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bowstore.config import ViewConfig
from bowstore.data.finish import AHEAD, Buffers, Workers, finished
from bowstore.data.mix import Mixing
from bowstore.data.plan import Origin, generator, perturb


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("kept", ["tensor", "view", "slice", "array", "array of a slice", "detached"])
def test_memory_is_lent_again_only_when_nobody_has_any_part_of_it(kept: str) -> None:
    buffers = Buffers(4, 8)
    batch = buffers.lend(4)
    first = address(batch)
    holders: dict[str, Any] = {
        "tensor": batch,
        "view": batch.permute(0, 3, 1, 2),
        "slice": batch[1:2, ::2],
        "array": batch.numpy(),
        "array of a slice": batch[3].numpy()[1:],
        "detached": batch.detach(),
    }
    holder = holders[kept]
    del holders, batch
    gc.collect()
    assert address(buffers.lend(4)) != first
    del holder
    gc.collect()
    assert address(buffers.lend(3)) == first


def test_no_more_memory_is_kept_than_is_in_flight() -> None:
    buffers = Buffers(4, 8)
    lent = [buffers.lend(4) for _ in range(20)]
    memory = [weakref.ref(batch.numpy().base) for batch in lent]
    assert len({address(batch) for batch in lent}) == 20
    del lent
    gc.collect()
    assert [tensor() for tensor in memory] == [None] * 20
    buffers.lend(1)
    assert (len(buffers._free), len(buffers._lent)) == (3, 1)


def test_what_is_lent_may_die_in_another_thread() -> None:
    buffers = Buffers(2, 8)
    batches = [buffers.lend(2)]
    first = address(batches[0])
    thread = threading.Thread(target=batches.clear)
    thread.start()
    thread.join()
    assert address(buffers.lend(2)) == first


def test_each_part_is_done_once_by_several_threads_and_the_first_error_is_told() -> None:
    workers, done, meet = Workers(3), [], threading.Barrier(3, timeout=20)

    def work(part: int) -> None:
        if part < 3:
            meet.wait()  # three at a time
        done.append(part)
        if part == 5:
            raise RuntimeError("part 5")

    workers.each(range(5), work)
    assert sorted(done) == list(range(5))
    with pytest.raises(RuntimeError, match="part 5"):
        workers.each([5], work)


def test_batches_are_finished_ahead_in_order_and_no_further() -> None:
    taken = []

    def made() -> Iterator[tuple[int, int]]:
        for number in range(10):
            taken.append(number)
            yield number, 10 * number

    for number, (what, value) in enumerate(finished(made(), lambda what, decoded: what + decoded)):
        assert (what, value) == (number, 11 * number)
        assert len(taken) <= number + 1 + AHEAD
    assert number == 9


def test_a_pass_that_checks_no_bounds_is_given_none_to_break() -> None:
    view = ViewConfig(size=16, resize=None)
    side = np.full(8, 32, np.int32)
    plan = perturb(np.arange(8), side, side, generator(0, 0, 1).random((8, 32)), view, Origin(0, 0, 0))
    Mixing.of(plan, view)
    plan.partner[1] = 6
    with pytest.raises(ValueError, match="not in their groups of 4"):
        Mixing.of(plan, view)
    plan.partner[1], plan.box[2] = 2, (9, 0, 8, 4)
    with pytest.raises(ValueError, match="do not lie in a view of 16 pixels"):
        Mixing.of(plan, view)
    Mixing.of(plan.unmixed(), view)
