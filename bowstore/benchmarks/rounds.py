"""Time of one call on a device, and of several ways in interleaved rounds."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import torch

from bowstore.progress import Progress

Way = Callable[[], Any]
Listener = Callable[[str, list[Any]], None]
T = TypeVar("T")
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Call it with a way's name and its values so far after each timed call, lest a run that is killed report none."""
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
    what: str, ways: Mapping[str, Callable[[], T]], rounds: int, shown: Callable[[T], str], *, warm: int = 1
) -> dict[str, list[T]]:
    """What each way returns in interleaved rounds, after some that `warm` caches, allocators and compilers.

    Machines are noisy: what is compared must run in the same minutes, and ratios are taken within a round.
    """
    found: dict[str, list[T]] = {name: [] for name in ways}
    with Progress(what, (warm + rounds) * len(ways), "timings") as progress:
        for number in range(warm + rounds):
            for name, way in ways.items():
                value = way()
                if number >= warm:
                    found[name].append(value)
                    if listener := _listener.get():
                        listener(name, found[name])
                progress.advance(note=f"{name} {shown(value)}")
    return found


def interleaved(
    what: str, ways: Mapping[str, Way], rounds: int, device: torch.device, *, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of each way, `in_rounds`."""
    timed = {name: partial(seconds_of, way, device) for name, way in ways.items()}
    return in_rounds(what, timed, rounds, lambda seconds: f"{1e3 * seconds:.1f} ms", warm=warm)
