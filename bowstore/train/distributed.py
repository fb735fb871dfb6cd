"""Processes of one job: who am I, and the few collectives that training needs."""

import _thread
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from bowstore.environment import choose_device, cores_per_rank, device_name, warn_of_kinds
from bowstore.errors import BowstoreError, BusyError, MismatchError, MissingError, UsageError
from bowstore.torchrun import Ranks, ranks
from bowstore.train.lifeline import REMEDY, Lifeline, connect

_HANG_SECONDS = 600.0
_INTERRUPTED = "it was interrupted"
_REFUSALS = (UsageError, MissingError, MismatchError, BusyError)  # what torchrun's next attempt would meet again
_REFUSED = "bowstore/refused"
_TIMEOUT = timedelta(seconds=_HANG_SECONDS + 60)  # of a collective; the lifeline is first, and names the rank


@dataclass(frozen=True)
class World:
    """This process's place among the job's processes.

    Attributes:
        rank: 0 to size - 1.
        size: number of processes.
        device: this process's device.
        lifeline: to the other processes.
        store: the job's c10d store.
        token: a number of this attempt, the same on every rank: keys in the store outlive a restart of the processes.
    """

    rank: int
    size: int
    device: torch.device
    lifeline: Lifeline | None = None
    store: Any = None
    token: int = 0
    _calls: Iterator[int] = field(default_factory=count, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def at(self, step: int) -> None:
        """Note that this process has the images of a step, so that one that never gets there can be named."""
        if self.lifeline:
            self.lifeline.at(step)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the ranks, on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return values

    def wrapping_sum(self, value: int) -> int:
        """Sum over the ranks modulo 2**64, on every rank."""
        signed = torch.tensor((value + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=self.device)
        if self.size > 1:
            dist.all_reduce(signed)
        return int(signed.item()) % 2**64

    def same(self, text: str) -> bool:
        """Whether all ranks hold the same text; the same answer on every rank."""
        mine = xxhash.xxh3_64_intdigest(text.encode())
        return not self.any(self.wrapping_sum(mine) != mine * self.size % 2**64)

    def gathered(self, values: Tensor) -> list[Tensor]:
        """The values of all ranks, of one shape, in order of rank; on every rank."""
        if self.size == 1:
            return [values]
        found = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(found, values)
        return found

    def take_first(self, values: Tensor) -> Tensor:
        """Overwrite the values with those of rank 0."""
        if self.size > 1:
            dist.broadcast(values, src=0)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank raised its flag; the same answer on every rank."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def assembled(self, poll_seconds: float = 0.2) -> None:
        """Wait for all ranks however long they take, for data to arrive on their machines; a collective times out.

        Raises:
            BowstoreError: another rank has ended.
        """
        if self.size == 1:
            return
        key = f"bowstore/assembled/{self.token}/{next(self._calls)}"
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.size:
            if self.lifeline and self.lifeline.verdict:
                raise BowstoreError(f"{self.lifeline.verdict}; {REMEDY}")
            time.sleep(poll_seconds)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(setting: str) -> Iterator[World]:
    """Join the job that torchrun started (NCCL on GPUs, gloo on CPUs), or be alone without it.

    When a process ends by an error or is killed, or hangs, all others end within seconds.

    Raises:
        BowstoreError: the others cannot be joined, or another one has ended; the message names it.
    """
    place = ranks()
    device = choose_device(setting, place.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.size == 1:
        yield World(0, 1, device)
        return
    if device.type == "cpu":
        # torchrun pins each process to one thread unless told; share the cores out instead.
        torch.set_num_threads(cores_per_rank())
    with _lifeline(place) as (store, lifeline):
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            store.set(f"gpu {place.rank}", device_name(device))
        with _explained(place, lifeline):
            dist.init_process_group(
                backend, store=store, rank=place.rank, world_size=place.size, timeout=_TIMEOUT,
                device_id=device if device.type == "cuda" else None,  # barriers of NCCL would guess it
            )  # fmt: skip
        if device.type == "cuda" and place.first:
            warn_of_kinds([store.get(f"gpu {rank}").decode() for rank in range(place.size)])
        try:
            world = World(place.rank, place.size, device, lifeline, store)
            yield replace(world, token=world.wrapping_sum(secrets.randbits(62)))
        finally:
            dist.destroy_process_group()  # the lifeline sees to it that this ends when another rank has ended


@contextmanager
def beside_others() -> Iterator[None]:
    """End with the other processes that torchrun started, for work without collectives; nothing without torchrun.

    The main thread learns of another's end by the process's own handler of SIGTERM, which should raise
    KeyboardInterrupt.

    Raises:
        BowstoreError: the others cannot be joined, or another one has ended; the message names it.
    """
    place = ranks()
    if place.size == 1:
        yield
        return
    with _lifeline(place, on_verdict=lambda: _thread.interrupt_main(signal.SIGTERM)):
        try:
            yield
        except BaseException:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the others end, too: no word of that in place of the cause
            raise


@contextmanager
def _lifeline(place: Ranks, on_verdict: Callable[[], None] | None = None) -> Iterator[tuple[Any, Lifeline]]:
    """The job's store and a lifeline to its ranks; an error in the block ends them, too.

    torchrun starts all ranks again whatever ended one. What would be refused each time is told once on each machine,
    and later attempts end without a word.

    Raises:
        BowstoreError: another rank has ended, in place of the error that followed from it.
        SystemExit: the job was refused, and the user knows.
    """
    with _explained(place):
        store, _, _ = next(rendezvous("env://", timeout=_TIMEOUT))
        if store.check([_REFUSED]):
            raise SystemExit(1)
        host, within = os.environ["MASTER_ADDR"], threading.Event()

        def on_known() -> None:
            within.wait()  # an interruption before the block would not be taken for what it is
            if on_verdict:
                on_verdict()

        lifeline = connect(place.rank, place.size, host, store, hang_seconds=_HANG_SECONDS, on_verdict=on_known)
    try:
        within.set()
        yield store, lifeline
    except SystemExit:  # agreed upon
        raise
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if (seconds := _verdict_seconds(error)) and (verdict := lifeline.wait_for_verdict(seconds)):
            if interrupted and _INTERRUPTED in verdict:  # Ctrl-C reaches all ranks, and each knows best what is kept
                raise
            if _refused(place, store):
                raise BowstoreError(verdict) from error  # it has a remedy of its own
            raise BowstoreError(f"{verdict}; {REMEDY}") from error
        text = _INTERRUPTED if interrupted else " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, _REFUSALS):
            store.set(_REFUSED, text)
        lifeline.failed(text)
        _refused(place, store)
        if isinstance(error, dist.DistError) or "gloo" in text:
            raise BowstoreError(
                f"rank {place.rank} of {place.size} has lost the others ({text[:200]}); {REMEDY}"
            ) from error
        raise
    finally:
        lifeline.close()


def _refused(place: Ranks, store: Any) -> bool:
    """Whether the job was refused; ends this rank if another one of its machine is about to tell it."""
    try:
        if not store.check([_REFUSED]):
            return False
        asked = store.add(f"{_REFUSED}/{place.rank - place.local_rank}", 1)
    except RuntimeError:  # without torchrun the store ends with rank 0
        return False
    if asked > 1:
        raise SystemExit(1)
    return True


@contextmanager
def _explained(place: Ranks, lifeline: Lifeline | None = None) -> Iterator[None]:
    """Say in one line that a rank cannot join the others, or which one it waited for in vain."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, BowstoreError):
            raise
        if lifeline and (verdict := lifeline.wait_for_verdict(_verdict_seconds(error))):
            raise BowstoreError(f"{verdict}; {REMEDY}") from error
        raise BowstoreError(
            f"rank {place.rank} of {place.size} cannot join the others at {os.environ['MASTER_ADDR']}, port "
            f"{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]}); start all of them, with torchrun"
        ) from error


def _verdict_seconds(error: BaseException) -> float:
    """How long to wait for word of another rank's end, of which an error may be the consequence; 0 if it cannot be."""
    if isinstance(error, KeyboardInterrupt):  # also SIGTERM, by which torchrun ends the others
        return 0.5
    return 3.0 if isinstance(error, RuntimeError) and not isinstance(error, BowstoreError) else 0.0
