"""Progress of long steps: a bar with items/s and time left on a terminal, plain lines in a log.

Everything goes to stderr; stdout is for results alone.
"""

import errno
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType

QUIET_BYTES = 1 << 28  # less than this is read or checked before anyone asks for progress
_LOG_EVERY_SECONDS = 10.0


def say(message: str) -> None:
    """Print one line for the user, on stderr; where it cannot be written (a log on a full disk), the work goes on."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno == errno.EPIPE:  # nobody reads on
            raise
        # What is still in the old one's buffer would turn the exit code of the whole command into 120.
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


@cache
def say_once(message: str) -> None:
    """Print a line that holds for the whole command, however often it comes up."""
    say(message)


def reader_is_gone() -> bool:
    """Whether nobody reads what this process prints: its results or messages went to a `head` that has had enough.

    Errors of other pipes look the same and are no reason to be silent.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            watched = select.poll()
            watched.register(stream.fileno(), 0)  # errors are told unasked
            if any(event & select.POLLERR for _, event in watched.poll(0)):
                return True
        except (OSError, ValueError, AttributeError):  # no file of the system's: nothing that could tell
            return True
    return False


_silent = False


@contextmanager
def without_progress() -> Iterator[None]:
    """Steps that begin inside the block show nothing."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


class Progress:
    """One long step of `total` items; use as a context manager and call `advance`.

    Args:
        what: the step's name, for example "encode".
        total: number of items.
        unit: what an item is, for example "images".
        done: items that an earlier run finished; they count as done but not for the rate.
        shown: False silences it (ranks other than 0).
    """

    def __init__(self, what: str, total: int, unit: str = "images", *, done: int = 0, shown: bool = True) -> None:
        self.what, self.total, self.unit, self.count = what, total, unit, done
        self._first = done
        self._shown = shown = shown and not _silent
        self._note = ""
        self._start = self._last_line = time.monotonic()
        self._bar = _TerminalBar(what, total, unit) if shown and sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start(self.count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if self._shown and kind is None:
            say(self._line(final=True))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Other work may show its own progress inside the block, whose time does not count for the rate."""
        begun = time.monotonic()
        if self._bar:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar:
                self._bar.start(self.count)
            self._start += time.monotonic() - begun

    @property
    def rate(self) -> float:
        """Items a second since the start of this process's part."""
        return (self.count - self._first) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, items: int = 1, note: str = "") -> None:
        """Count `items` more; `note` is a short text shown behind (a loss, what binds)."""
        self.count += items
        self._note = note or self._note
        if self._bar:
            self._bar.update(self.count, self.rate, self._note)
        elif self._shown and time.monotonic() - self._last_line >= _LOG_EVERY_SECONDS:
            self._last_line = time.monotonic()
            say(self._line(final=False))

    def _line(self, *, final: bool) -> str:
        seconds = time.monotonic() - self._start
        parts = [f"{self.what}: {self.count}/{self.total} {self.unit}", f"{self.rate:.1f} {self.unit}/s"]
        if final:
            parts.append(f"{seconds:.1f} s")
        elif self.rate > 0:
            parts.append(f"{format_seconds((self.total - self.count) / self.rate)} left")
        if self._note:
            parts.append(self._note)
        return ", ".join(parts)


class _TerminalBar:
    """The rich bar behind `Progress`; rich is imported only when there is a terminal."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        from rich.console import Console  # a tenth of a second
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f} " + unit + "/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(what, total=total, rate=0.0, note="")

    def start(self, count: int) -> None:
        self._progress.start()
        self._progress.update(self._task, completed=count)

    def update(self, count: int, rate: float, note: str) -> None:
        self._progress.update(self._task, completed=count, rate=rate, note=note)

    def stop(self) -> None:
        self._progress.stop()


def format_seconds(seconds: float) -> str:
    """Time left as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


@contextmanager
def timed(stages: dict[str, float], name: str) -> Iterator[None]:
    """Add the block's wall-clock seconds to `stages[name]`."""
    start = time.monotonic()
    try:
        yield
    finally:
        stages[name] = stages.get(name, 0.0) + time.monotonic() - start
