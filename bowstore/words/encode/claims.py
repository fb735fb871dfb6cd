"""Who does what: claims on parts of one job, for processes that share nothing but a folder.

A claim is a file `NAME.GENERATION` beside the work, made only where none is and touched while its owner lives. The
highest generation of a name is its owner. Whoever finds an owner dead makes the next generation, which just one
process can; so no claim is ever removed by anybody but its owner, and two heirs cannot both win. An owner is dead if
its process is gone (where this process can tell: same kernel, same process namespace), or if its file was not touched
for a while, measured by the observer's own clock, since clocks of machines differ.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bowstore.errors import BusyError
from bowstore.progress import say

TOUCH_SECONDS = 15.0
# Longer than network file systems may keep attributes of files (acregmax of NFS: 60 s).
SILENT_SECONDS = 120.0
POLL_SECONDS = 0.3
_LEAD, _DRAFT = "lead", ".claim-"


class Board:
    """The claims of one word store; use as a context manager, whose end gives back all that this process holds.

    Args:
        store: the word store; the claims lie beside it in `.NAME.work`, a folder that other files of the job may share.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self.folder = store.with_name(f".{store.name}.work")
        self._held: dict[str, Path] = {}
        self._seen: dict[Path, tuple[int, float]] = {}  # last touch of others' claims, and when it was first seen
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._touching: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._stop.clear()
        self._touching = threading.Thread(target=self._touch, daemon=True, name="claims")
        self._touching.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for name in list(self._held):
            self.release(name)
        self._remove_if_empty()

    def claim(self, name: str) -> bool:
        """Take a part that nobody alive holds; whether it is this process's now."""
        if self._stop.is_set():
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        generation, path = self._newest(name)
        if path and not self._is_dead(path):
            return False
        mine = self.folder / f"{name}.{generation + 1}"
        try:
            _make(mine)
        except FileExistsError:
            return False
        except FileNotFoundError:  # the folder was removed by a process that was the last one in it
            return self.claim(name)
        # A claim that was given back in between makes two processes count from different numbers: look again.
        if any(path != mine and not self._is_dead(path) for path in self._named(name)):
            mine.unlink(missing_ok=True)
            return False
        with self._lock:
            self._held[name] = mine
        return True

    def holds(self, name: str) -> bool:
        """Whether this process still owns a part: nobody took it for dead."""
        mine = self._held.get(name)
        return mine is not None and self._newest(name)[1] == mine

    def release(self, name: str) -> None:
        """Give a part back."""
        with self._lock:
            mine = self._held.pop(name, None)
        if mine:
            mine.unlink(missing_ok=True)

    def owner(self, name: str) -> str | None:
        """Who holds a part, for messages; None if nobody alive does."""
        _, path = self._newest(name)
        return None if path is None or self._is_dead(path) else _describe(path)

    def others(self) -> list[str]:
        """Names of parts that other live processes hold."""
        names = {path.name.rpartition(".")[0] for path in self._claims()}
        return sorted(name for name in names if name not in self._held and self.owner(name))

    @contextmanager
    def lead(self, what: str, *, wait: bool = True) -> Iterator[None]:
        """Be the one process that changes the store's schema, for the length of a block.

        Args:
            what: what the others are told that it does.
            wait: for the process that leads; False refuses.

        Raises:
            BusyError: another live process leads, and `wait` is False.
        """
        told = False
        while not self.claim(_LEAD):
            owner = self.owner(_LEAD)
            if owner and not wait:
                raise BusyError(f"word store {self.store} is in use by {owner}; wait for it to end")
            if owner and not told:
                say(f"waiting: {owner} prepares or finishes word store {self.store} ({what})")
                told = True
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            self.release(_LEAD)

    def check_lead(self) -> None:
        """Refuse to change the schema once another process has taken this one for dead.

        Raises:
            BusyError: it has.
        """
        if not self.holds(_LEAD):
            raise BusyError(
                f"this process was silent for more than {SILENT_SECONDS:.0f} s, and another one leads the work on word "
                f"store {self.store} now; run the same command again"
            )

    def wait_for_the_dead(self) -> None:
        """Refuse to go on while others are at work; claims of other machines are watched until they count as dead.

        Raises:
            BusyError: another process is alive.
        """
        begun, told = time.monotonic(), False
        while names := self.others():
            _, path = self._newest(names[0])
            text = path.read_bytes() if path and path.exists() else b""
            if _is_here(text) or time.monotonic() - begun > SILENT_SECONDS + TOUCH_SECONDS:
                raise BusyError(f"word store {self.store} is in use by {self.owner(names[0])}; wait for it to end")
            if not told:
                say(f"waiting {SILENT_SECONDS:.0f} s for a sign of life of {self.owner(names[0])}")
                told = True
            time.sleep(POLL_SECONDS)

    def clear(self, is_done: Callable[[str], bool]) -> None:
        """Remove claims of the dead, and files of which `is_done` of their name says that they are of no more use.

        For the process that leads. Other jobs on the same store may be under way: their files stay.
        """
        claims = set(self._claims())
        for path in self._files():
            if path in self._held.values():
                continue
            dead = path in claims and self._is_dead(path)
            if dead or path.name.startswith((f"{_LEAD}.", _DRAFT)) or is_done(path.name):
                path.unlink(missing_ok=True)

    def files(self, pattern: str) -> list[Path]:
        """Other files of the job."""
        return sorted(self.folder.glob(pattern))

    def _files(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except FileNotFoundError:
            return []

    def _claims(self) -> list[Path]:
        return [path for path in self._files() if path.name.rpartition(".")[2].isdigit()]

    def _newest(self, name: str) -> tuple[int, Path | None]:
        """The highest generation of a name, and its file; (-1, None) without one."""
        found = [(int(path.name.rpartition(".")[2]), path) for path in self._named(name)]
        return max(found, default=(-1, None))

    def _named(self, name: str) -> list[Path]:
        return [path for path in self._claims() if path.name.rpartition(".")[0] == name]

    def _is_dead(self, path: Path) -> bool:
        try:
            with open(path, "rb") as file:  # opening makes NFS look at the file's attributes anew
                touched, text = os.fstat(file.fileno()).st_mtime_ns, file.read()
        except FileNotFoundError:
            return True  # given back just now
        if _is_gone(text):
            return True
        now = time.monotonic()
        seen, since = self._seen.get(path, (0, now))
        if seen != touched:
            since = now
        self._seen[path] = touched, since
        return now - since > SILENT_SECONDS

    def _touch(self) -> None:
        while not self._stop.wait(TOUCH_SECONDS):
            with self._lock:
                for path in self._held.values():
                    try:
                        os.utime(path)
                    except OSError:
                        continue  # taken over or a passing fault: `holds` tells before anything is written

    def _remove_if_empty(self) -> None:
        try:
            self.folder.rmdir()
        except OSError:
            return  # others are at work, or there is something to go on with


def _make(path: Path) -> None:
    """Make a claim's file, unless it is there: whole at once where the file system has links.

    Raises:
        FileExistsError: it is there.
    """
    text = json.dumps(_myself())
    draft = path.with_name(f"{_DRAFT}{uuid.uuid4().hex}")
    draft.write_text(text)
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:
        with open(path, "x") as file:
            file.write(text)
    finally:
        draft.unlink(missing_ok=True)


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "space": _space()}


def _space() -> str:
    """Within which process numbers mean the same processes: one run of a kernel, one process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks; "" if it is gone (numbers of processes are used again)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _is_gone(text: bytes) -> bool:
    """Whether a claim's owner is known to be gone; False where this process cannot tell."""
    try:
        owner = json.loads(text)
        space = _space()
        return bool(space) and owner["space"] == space and _started(owner["pid"]) != owner["started"]
    except (ValueError, KeyError, TypeError):
        return False  # made, but not written yet: its touches decide


def _is_here(text: bytes) -> bool:
    """Whether a claim's owner is a process whose life this one can tell."""
    try:
        return bool(_space()) and json.loads(text)["space"] == _space()
    except (ValueError, KeyError, TypeError):
        return False


def _describe(path: Path) -> str:
    try:
        owner = json.loads(path.read_bytes())
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
