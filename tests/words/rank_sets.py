"""Ranks of a job as torchrun starts them: processes that share the store of an agent, which outlives them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import torch.distributed as dist
from served import SERVER


class Agent:
    """Starts the ranks of attempts, as the agent of torchrun does, and ends them all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.store = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
        self.ranks: list[BaseProcess] = []

    def start(
        self, target: Callable[..., None], *arguments: Any, changes: dict[int, dict[str, Any]] | None = None
    ) -> None:
        """Begin an attempt; `changes` are to the first argument, a dictionary, by rank."""
        self.end()
        first, *others = arguments
        for rank in range(self.size):
            own = {**first, **(changes or {}).get(rank, {})}
            process = SERVER.Process(target=_as_rank, args=(rank, self.size, self.store.port, target, own, *others))
            process.start()
            self.ranks.append(process)

    def end(self) -> None:
        """Kill what is left of the last attempt."""
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()
        self.ranks.clear()

    def wait(self, seconds: float = 300) -> list[int | None]:
        """Exit codes, once all ranks have ended."""
        for process in self.ranks:
            process.join(seconds)
        return [process.exitcode for process in self.ranks]


def _as_rank(rank: int, size: int, port: int, target: Callable[..., None], *arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    target(*arguments)


@contextmanager
def agent(size: int) -> Iterator[Agent]:
    """An agent, and the end of all that it started."""
    found = Agent(size)
    try:
        yield found
    finally:
        found.end()
