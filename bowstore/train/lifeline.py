"""Ranks that notice at once when one of them ends: a TCP connection of each to rank 0, and a thread that listens.

Collectives notice late or never: NCCL waits for its timeout, and a rank that hangs in reading its images is alive. A
connection is closed by the kernel when its process ends, however that came about; keep-alive probes notice a machine
that is gone. Over it a rank says at which step it is and why it ends. Rank 0 decides what has happened and tells all; a
rank whose main thread is then still blocked after `_GRACE_SECONDS` leaves with that line.
"""

import hmac
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from bowstore.errors import BowstoreError
from bowstore.progress import say

_CONNECT_SECONDS = 600.0  # ranks of slow machines may still be importing
_ANSWER_SECONDS = 10.0
_RETRY_SECONDS = 0.3
_KEY = "bowstore/lifeline"
_GRACE_SECONDS = 10.0  # a checkpoint that is being written may end
_TICK_SECONDS = 1.0
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a silent machine is gone after 20 s
_MAX_TEXT = 500  # characters of an error that travel
_WELCOME = b"w"
REMEDY = "this rank ends with it; run the same command again to go on"


class Lifeline:
    """This rank's connections, to rank 0 or from all others, and what became known over them.

    Args:
        rank: this process.
        links: open sockets by rank.
        hang_seconds: how long ranks may wait for one that makes no step.
        on_verdict: called in another thread once something happened to a rank.

    Attributes:
        verdict: what happened to which rank, once known.
    """

    def __init__(
        self,
        rank: int,
        links: dict[int, socket.socket],
        *,
        hang_seconds: float,
        on_verdict: Callable[[], None] | None = None,
    ) -> None:
        self.verdict: str | None = None
        self._rank, self._links, self._hang_seconds = rank, links, hang_seconds
        self._on_verdict = on_verdict
        self._unread = dict.fromkeys(links, b"")
        self._steps = {other: (-1, time.monotonic()) for other in (rank, *links)}
        self._gone: set[int] = set()
        self._step = self._told = -1
        self._sending = threading.Lock()
        self._decided, self._left = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def at(self, step: int) -> None:
        """Note that this rank has the images of a step."""
        self._step = step

    def failed(self, reason: str) -> None:
        """Say that this rank ends, and why, so that the others end too."""
        if self._rank == 0:
            self._decide(f"rank 0 failed: {reason[:_MAX_TEXT]}")
        else:
            self._send(0, {"failed": reason[:_MAX_TEXT]})

    def wait_for_verdict(self, seconds: float) -> str | None:
        """What happened to which rank, if that becomes known in time."""
        self._decided.wait(seconds)
        return self.verdict

    def close(self) -> None:
        """Leave, without alarming anybody."""
        self._left.set()
        for other, link in self._links.items():
            self._send(other, {"step": self._step, "ended": True})
            try:
                link.shutdown(socket.SHUT_RDWR)  # wakes the thread
            except OSError:  # the other side was faster
                pass
        self._thread.join()
        for link in self._links.values():
            link.close()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for other, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, other)
            while self.verdict is None and not self._left.is_set():
                for key, _ in selector.select(_TICK_SECONDS):
                    if not self._receive(key.data):
                        selector.unregister(key.fileobj)
                if self._rank and self._step != self._told:
                    self._told = self._step
                    self._send(0, {"step": self._told})
                self._compare_steps()
        if self.verdict is None or self._left.is_set():
            return
        if self._on_verdict:
            self._on_verdict()
        if not self._left.wait(_GRACE_SECONDS):
            say(f"Error: {self.verdict}; {REMEDY}")
            os._exit(1)  # the main thread is blocked in C++, where no exception reaches it

    def _receive(self, other: int) -> bool:
        """Read what a rank has sent; False when there will be no more."""
        try:
            data = self._links[other].recv(1 << 16)
        except OSError:  # reset, or no answer to keep-alive probes
            data = b""
        *lines, self._unread[other] = (self._unread[other] + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "step" in message:
                self._steps[other] = (int(message["step"]), time.monotonic())
            if "verdict" in message:
                self._decide(str(message["verdict"]))
            if "failed" in message:
                self._decide(f"rank {other} failed: {message['failed']}")
            if "ended" in message:
                self._gone.add(other)
                return False
        if not data and not self._left.is_set():
            self._decide(f"rank {other} has died: it was killed, or its machine is gone")
        return bool(data)

    def _compare_steps(self) -> None:
        """Name ranks that have left before the others, and on rank 0 those that all others wait for too long."""
        now = time.monotonic()
        if self._step != self._steps[self._rank][0]:
            self._steps[self._rank] = (self._step, now)
        behind = min(step for step, _ in self._steps.values())
        front = max(step for step, _ in self._steps.values())
        if early := sorted(rank for rank in self._gone if self._steps[rank][0] < front):
            self._decide(f"rank {', '.join(map(str, early))} has left before step {front}, at which others are")
        elif (
            self._rank == 0
            and front > behind
            and all(now - since > self._hang_seconds for _, since in self._steps.values())
        ):
            names = ", ".join(str(rank) for rank, (step, _) in sorted(self._steps.items()) if step == behind)
            self._decide(
                f"rank {names} hangs: for {self._hang_seconds:.0f} s it has not had the images of step {front}, "
                f"for which the others wait; look at its disk and network"
            )

    def _decide(self, text: str) -> None:
        if self.verdict is not None:
            return
        self.verdict = text
        if self._rank == 0:
            for other in self._links:
                self._send(other, {"verdict": text})
        self._decided.set()

    def _send(self, other: int, message: dict[str, Any]) -> None:
        try:
            with self._sending:
                self._links[other].sendall(json.dumps(message).encode() + b"\n")
        except OSError:  # who is gone is known by reading
            pass


def connect(
    rank: int,
    size: int,
    host: str,
    board: Any,
    *,
    hang_seconds: float,
    on_verdict: Callable[[], None] | None = None,
) -> Lifeline:
    """Connect all ranks of a job, which has more than one; every rank calls it.

    Rank 0 runs on `host`, and says on the board, the job's c10d store, how it is reached.

    Raises:
        BowstoreError: ranks cannot reach rank 0.
    """
    end = time.monotonic() + _CONNECT_SECONDS
    if rank:
        links = {0: _reach(rank, host, board, end)}
    else:
        with _listener() as listener:
            token = os.urandom(16).hex()
            board.set(_KEY, json.dumps([listener.getsockname()[1], token]))
            links = _accept(listener, size, token, end)
    return Lifeline(rank, links, hang_seconds=hang_seconds, on_verdict=on_verdict)


def _reach(rank: int, host: str, board: Any, end: float) -> socket.socket:
    """A connection to rank 0, tried again: after a restart the board may still say how its predecessor was reached."""
    while True:
        port, token = json.loads(board.get(_KEY))
        try:
            link = socket.create_connection((host, port), timeout=_ANSWER_SECONDS)
            link.sendall(json.dumps({"token": token, "rank": rank}).encode() + b"\n")
            if link.recv(len(_WELCOME)) == _WELCOME:
                return _alive(link)
            link.close()
            problem = "no answer"
        except OSError as error:
            problem = error.strerror or str(error)
        if time.monotonic() > end:
            raise BowstoreError(
                f"rank {rank} cannot reach rank 0 at {host}, port {port} ({problem}); ranks need to reach each other "
                f"at any port"
            )
        time.sleep(_RETRY_SECONDS)


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        except OSError:  # IPv6 is known here, but switched off
            pass
    return socket.create_server(("", 0), backlog=1024)


def _accept(listener: socket.socket, size: int, token: str, end: float) -> dict[int, socket.socket]:
    """Connections of all other ranks; who does not know the token is no rank."""
    links: dict[int, socket.socket] = {}
    while len(links) < size - 1:
        missing = sorted(set(range(1, size)) - links.keys())
        try:
            listener.settimeout(max(0.0, end - time.monotonic()))
            link, _ = listener.accept()
        except (TimeoutError, BlockingIOError) as error:
            raise BowstoreError(
                f"ranks {', '.join(map(str, missing))} did not connect to rank 0 within {_CONNECT_SECONDS:.0f} s; "
                f"ranks need to reach each other at any port"
            ) from error
        rank = _introduced(link, token)
        if rank in missing:
            link.sendall(_WELCOME)
            links[rank] = _alive(link)
        else:
            link.close()
    return links


def _introduced(link: socket.socket, token: str) -> int:
    """The rank that a connection's first line names; -1 for a stranger."""
    link.settimeout(_TICK_SECONDS)
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < 256 and (data := link.recv(1)):
            line += data
        hello = json.loads(line)
        return int(hello["rank"]) if hmac.compare_digest(str(hello["token"]), token) else -1
    except (OSError, ValueError, LookupError, TypeError):
        return -1


def _alive(link: socket.socket) -> socket.socket:
    """Let the kernel ask whether the other machine is there."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link
