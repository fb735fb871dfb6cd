"""Processes of one job: who am I, and the few collectives that training needs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from bowstore.environment import choose_device, cores_per_rank
from bowstore.errors import BowstoreError
from bowstore.torchrun import Ranks, ranks
from bowstore.train.lifeline import REMEDY, Lifeline, connect

_HANG_SECONDS = 600.0
_TIMEOUT = timedelta(seconds=_HANG_SECONDS + 60)  # of a collective; the lifeline is first, and names the rank
_VERDICT_SECONDS = 3.0  # a broken collective may be known before its reason


@dataclass(frozen=True)
class World:
    """This process's place among the job's processes.

    Attributes:
        rank: 0 to size - 1.
        size: number of processes.
        device: this process's device.
        lifeline: to the other processes.
    """

    rank: int
    size: int
    device: torch.device
    lifeline: Lifeline | None = None

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

    def any(self, flag: bool) -> bool:
        """Whether any rank raised its flag; the same answer on every rank."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

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
    _init(place, device)
    lifeline = None
    try:
        lifeline = connect(
            place.rank,
            place.size,
            os.environ["MASTER_ADDR"],
            lambda told: dist.broadcast_object_list(told, device=device),
            hang_seconds=_HANG_SECONDS,
        )
        yield World(place.rank, place.size, device, lifeline)
    except SystemExit:  # agreed upon
        raise
    except BaseException as error:
        if lifeline is None:
            raise
        broken = isinstance(error, RuntimeError) and not isinstance(error, BowstoreError)
        verdict = lifeline.wait_for_verdict(_VERDICT_SECONDS) if broken else None
        if verdict:
            raise BowstoreError(f"{verdict}; {REMEDY}") from error
        lifeline.failed(" ".join(str(error).split()) or type(error).__name__)
        raise
    finally:
        dist.destroy_process_group()  # the lifeline sees to it that this ends when another rank has ended
        if lifeline:
            lifeline.close()


def _init(place: Ranks, device: torch.device) -> None:
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise BowstoreError(
            f"rank {place.rank} of {place.size} cannot join the others at {os.environ['MASTER_ADDR']}, port "
            f"{os.environ['MASTER_PORT']} ({first}); start all of them, with torchrun"
        ) from error
