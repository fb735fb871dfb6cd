"""Processes of one job: who am I, and the few collectives that training needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from bowstore.environment import choose_device, cores_per_rank
from bowstore.torchrun import ranks

_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process's place among the job's processes.

    Attributes:
        rank: 0 to size - 1.
        size: number of processes.
        device: this process's device.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

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
    """Join the job that torchrun started (NCCL on GPUs, gloo on CPUs), or be alone without it."""
    size = ranks().size
    device = choose_device(setting, ranks().local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(0, 1, device)
        return
    if device.type == "cpu":
        # torchrun pins each process to one thread unless told; share the cores out instead.
        torch.set_num_threads(cores_per_rank())
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()
