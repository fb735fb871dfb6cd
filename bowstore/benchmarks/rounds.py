"""Time of one call on a device, and of several ways in interleaved rounds."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from bowstore.progress import Progress

Way = Callable[[], Any]
Listener = Callable[[str, list[float]], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Call it with a way's name and its seconds so far after each timed call, lest a run that is killed report none."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def seconds_of(way: Way, device: torch.device) -> float:
    """Seconds of one call, to the end of what it started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def interleaved(what: str, ways: Mapping[str, Way], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way in interleaved rounds, after one that warms caches, allocators and compilers.

    Machines are noisy: what is compared must run in the same minutes, and ratios are taken within a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with Progress(what, (rounds + 1) * len(ways), "timings") as progress:
        for number in range(rounds + 1):
            for name, way in ways.items():
                spent = seconds_of(way, device)
                if number:
                    seconds[name].append(spent)
                    if listener := _listener.get():
                        listener(name, seconds[name])
                progress.advance(note=f"{name} {1e3 * spent:.1f} ms")
    return seconds
