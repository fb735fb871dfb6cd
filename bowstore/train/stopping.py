"""How a run is stopped from outside: SIGTERM saves first, and Ctrl-C says what it cost."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from bowstore.train.checkpoint import Checkpoints
from bowstore.train.distributed import World


@contextmanager
def interrupts(kept: Checkpoints, world: World) -> Iterator[None]:
    """Ctrl-C says what it cost; on rank 0, which knows."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not world.first:
            raise
        raise KeyboardInterrupt(kept.interrupted()) from error


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGTERM into a flag; a second one ends the process at once."""
    flag = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal flag
        flag = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    try:
        before = signal.signal(signal.SIGTERM, on_signal)
    except ValueError:  # not in the main thread: a caller of the Python interface keeps its own handling
        yield lambda: False
        return
    try:
        yield lambda: flag
    finally:
        signal.signal(signal.SIGTERM, before)
