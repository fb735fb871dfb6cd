"""Time of one call on a device, and of several ways in interleaved rounds."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
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


def in_rounds(
    what: str, ways: Mapping[str, Callable[[], float]], rounds: int, shown: Callable[[float], str]
) -> dict[str, list[float]]:
    """What each way returns in interleaved rounds, after one that warms caches, allocators and compilers.

    Machines are noisy: what is compared must run in the same minutes, and ratios are taken within a round.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    with Progress(what, (rounds + 1) * len(ways), "timings") as progress:
        for number in range(rounds + 1):
            for name, way in ways.items():
                value = way()
                if number:
                    found[name].append(value)
                    if listener := _listener.get():
                        listener(name, found[name])
                progress.advance(note=f"{name} {shown(value)}")
    return found


def interleaved(what: str, ways: Mapping[str, Way], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way, `in_rounds`."""
    timed = {name: partial(seconds_of, way, device) for name, way in ways.items()}
    return in_rounds(what, timed, rounds, lambda seconds: f"{1e3 * seconds:.1f} ms")
