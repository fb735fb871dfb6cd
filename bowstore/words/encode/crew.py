"""A crew of processes: rank 0 deals out numbered units of work, and every rank, itself too, gives it what it made.

All of it goes through the c10d store of the job that torchrun started; a process alone runs the same code on a store in
its memory. Only rank 0 needs to see where results go. Three facts shape this (measured with PyTorch 2.14):

    torchrun keeps the store through a restart of the processes, with all keys and counters of the dead attempt, and no
    process can tell from its environment which attempt it belongs to: rank 0 draws a token, under which all else lies

    a value of 8 MiB breaks the connection: bytes travel in pieces of half that

    a push to a queue is whole or absent, and comes after what its client pushed before: a rank pushes a result's pieces
    to a queue of its own, and then its key; a rank that dies, or is stopped for minutes, leaves nothing half said

Rank 0 counts what it has kept of each rank, by which that one sees that it may send another. A unit that is dealt
out may never come back, because its rank hangs. When none is left to deal, ranks that have nothing to do make those
anew that are outstanding; the first result counts, so units must give the same on every rank.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed
from torch.distributed.rendezvous import rendezvous

from bowstore.errors import MismatchError
from bowstore.torchrun import Ranks

dist: Any = torch.distributed  # its stubs do not export the stores

Work = Callable[[Iterator[int], Callable[[int], bool]], Iterable[tuple[int, bytes]]]
Keep = Callable[[int, bytes], None]

PIECE_BYTES = 4 << 20
UNACKNOWLEDGED = 2  # units of a rank that rank 0 has not kept yet: they bound what waits in the store
_JOIN_SECONDS = 60.0  # that rank 0 waits for the others before it begins; who comes later is served all the same
_TIMEOUT = timedelta(seconds=300)
_PAUSES = 0.002, 0.2  # the first and the longest: with hundreds of ranks, polls are what the store has most to do with
_IDLE_SECONDS = 0.01  # of rank 0's thread
_HELLO, _WELCOME = "bowstore/crew/hello", "bowstore/crew/welcome"


@contextmanager
def join(place: Ranks, given: Mapping[str, str], store: Any = None) -> Iterator["Crew"]:
    """Join the other processes of the job.

    Args:
        place: of this process.
        given: what all ranks must have been given alike, by the names that messages use.
        store: the job's; None to connect to it, or to make one in memory where this process is alone.

    Raises:
        MismatchError: a rank was given something else; it and rank 0 say what, before any work.
    """
    if store is None:
        store = dist.HashStore() if place.size == 1 else next(rendezvous("env://", timeout=_TIMEOUT))[0]
    if place.rank:
        yield Crew(place, dist.PrefixStore(_welcome(store, place.rank, given), store))
        return
    desk = _Desk(store.clone(), given)  # a client of its own: it must not wait while another thread sends
    with ThreadPoolExecutor(1, "crew") as thread:
        crew = Crew(place, dist.PrefixStore(desk.token, store), desk, thread.submit(desk.serve))
        try:
            for waited in crew.pauses():
                if len(desk.joined) >= place.size - 1 or waited > _JOIN_SECONDS:
                    break
            yield crew
        finally:
            desk.closing.set()


class Crew:
    """This process's part in the job.

    Attributes:
        rank: 0 to size - 1.
        size: number of processes.
    """

    def __init__(
        self, place: Ranks, store: Any, desk: "_Desk | None" = None, served: Future[None] | None = None
    ) -> None:
        self.rank, self.size, self._store, self._desk, self._served = place.rank, place.size, store, desk, served

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def tell(self, what: str, value: bytes) -> None:
        """Give all ranks some bytes, once for each name; for rank 0."""
        pieces = _pieces(value)
        for number, piece in enumerate(pieces):
            self._store.set(f"told/{what}/{number}", piece)
        self._store.set(f"told/{what}", str(len(pieces)))

    def hear(self, what: str) -> bytes:
        """The bytes that rank 0 tells; waits for them."""
        pauses = self.pauses()
        while not self._store.check([f"told/{what}"]):  # to wait in the store would hold it
            next(pauses)
        pieces = range(int(self._store.get(f"told/{what}")))
        return b"".join(self._store.get(f"told/{what}/{number}") for number in pieces)

    def share(self, stage: str, units: int, work: Work, keep: Keep | None = None) -> None:
        """Do a stage together with the other ranks; returns when rank 0 has kept all units.

        Args:
            stage: its name.
            units: their number, the same on every rank.
            work: makes units: gets their numbers, which it may ask for ahead and in another thread, and a function that
                says whether a unit is still wanted; yields number and result of those that it made.
            keep: rank 0's, called with number and result of every unit, once each, in a thread of its own.

        Raises:
            Exception: whatever `work` and, on rank 0, `keep` raise.
        """
        if self._desk:
            assert keep, "rank 0 keeps what is made"
            self._desk.stage = _Stage(dist.PrefixStore(stage, self._desk.store), units, keep)
        _Deal(self, dist.PrefixStore(stage, self._store), units).run(work)

    def pauses(self) -> Iterator[float]:
        """Seconds waited so far, with longer and longer pauses; raises what ended rank 0's thread."""
        for waited in _pauses():
            if self._served and self._served.done():
                self._served.result()
            yield waited


class _Deal:
    """A rank's units of a stage, under whose name the store's keys lie."""

    def __init__(self, crew: Crew, store: Any, units: int) -> None:
        self._crew, self._store, self._units = crew, store, units
        self._mine: list[int] = []  # units that this rank has made

    def run(self, work: Work) -> None:
        begun = time.monotonic()
        self._send(work(self._dealt(), self._wanted))
        # Others are about to end the units that they have, each in the time that this rank took for one of its own.
        patient_until = time.monotonic() + (time.monotonic() - begun) / max(1, len(self._mine))
        while (unit := self._outstanding(patient_until)) is not None:
            self._send(work(iter([unit]), self._wanted))

    def _dealt(self) -> Iterator[int]:
        # `add` is one step of the store: no two ranks get one number, and nobody has to deal them out.
        while (unit := self._store.add("next", 1) - 1) < self._units:
            yield unit

    def _left(self) -> list[int] | None:
        """Units that rank 0 does not have; None before the last of them was dealt."""
        return np.frombuffer(self._store.get("left"), "<u4").tolist() if self._store.check(["left"]) else None

    def _wanted(self, unit: int) -> bool:
        left = self._left()
        return left is None or unit in left

    def _outstanding(self, patient_until: float) -> int | None:
        """A unit that another rank has not given back, each rank another one if it can be; None once all are kept."""
        for _ in self._crew.pauses():
            left = self._left()
            if left == []:
                break
            others = [unit for unit in left or () if unit not in self._mine]
            if others and time.monotonic() >= patient_until:
                return others[self._crew.rank % len(others)]
        return None

    def _send(self, made: Iterable[tuple[int, bytes]]) -> None:
        """Hand over units; while too many of this rank are not kept, it makes no others."""
        for unit, result in made:
            key = f"{unit}/{self._crew.rank}"  # two ranks may make one unit: their pieces must not mix
            for piece in _pieces(result):
                self._store.queue_push(key, piece)
            self._store.queue_push("done", key)
            self._mine.append(unit)
            for _ in self._crew.pauses():
                waiting = len(self._mine) - self._store.add(f"kept/{self._crew.rank}", 0)
                if waiting < UNACKNOWLEDGED or self._left() == []:  # what comes after the end is not looked at
                    break


class _Desk:
    """What rank 0's thread does: it receives other ranks, and what all of them made.

    Attributes:
        token: of this attempt.
        store: what lies under it.
        joined: the other ranks that were welcomed.
        stage: what is under way.
        closing: ends it.
    """

    def __init__(self, root: Any, given: Mapping[str, str]) -> None:
        self.token, self.joined = secrets.token_hex(8), set[int]()
        self.store, self._root, self._given = dist.PrefixStore(self.token, root), root, given
        self.stage: _Stage | None = None
        self.closing = threading.Event()

    def serve(self) -> None:
        while not self.closing.is_set():
            received, stage = self._receive(), self.stage
            if not (stage and stage.take()) and not received:
                self.closing.wait(_IDLE_SECONDS)

    def _receive(self) -> bool:
        """Answer a rank that wants to join, be it one of an attempt that is over: it never reads the answer."""
        if (message := _pop(self._root, _HELLO)) is None:
            return False
        hello = json.loads(message)
        rank, theirs, ours = hello["rank"], hello["given"], self._given
        other = next((name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)), None)
        refusal = other and (
            f"rank {rank} was given {other} {theirs.get(other)}, rank 0 {ours.get(other)}; give all ranks the same"
        )
        answer = json.dumps({"token": self.token, "refusal": refusal})
        self._root.queue_push(f"{_WELCOME}/{hello['nonce']}", answer)
        if refusal:
            raise MismatchError(refusal)
        self.joined.add(rank)
        return True


class _Stage:
    """What rank 0 knows of a stage."""

    def __init__(self, store: Any, units: int, keep: Keep) -> None:
        self._store, self._units, self._keep = store, units, keep
        self._left, self._published = set(range(units)), units + 1

    def take(self) -> bool:
        """Keep a result, if there is one, and say which units are left once all are dealt."""
        found = _pop(self._store, "done")
        if found is not None:
            key = found.decode()
            unit, rank = map(int, key.split("/"))
            result = b"".join(iter(lambda: _pop(self._store, key), None))
            if unit in self._left:  # or another rank was faster
                self._keep(unit, result)
                self._left.discard(unit)
            # Only now: until a rank sees this it sends no more than one further result.
            self._store.add(f"kept/{rank}", 1)
        if self._published > len(self._left) and self._store.add("next", 0) >= self._units:
            self._published = len(self._left)
            self._store.set("left", np.array(sorted(self._left), "<u4").tobytes())
        return found is not None


def _welcome(store: Any, rank: int, given: Mapping[str, str]) -> str:
    """The attempt's token, once rank 0 has found that this rank was given what it was."""
    key = f"{_WELCOME}/{(nonce := secrets.token_hex(8))}"
    store.queue_push(_HELLO, json.dumps({"rank": rank, "nonce": nonce, "given": dict(given)}))
    pauses = _pauses()
    while (message := _pop(store, key)) is None:
        next(pauses)
    answer = json.loads(message)
    if answer["refusal"]:
        raise MismatchError(answer["refusal"])
    return str(answer["token"])


def _pauses() -> Iterator[float]:
    begun, (pause, longest) = time.monotonic(), _PAUSES
    while True:
        yield time.monotonic() - begun
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _pieces(value: bytes) -> list[bytes]:
    return [value[start : start + PIECE_BYTES] for start in range(0, len(value), PIECE_BYTES)]


def _pop(store: Any, queue: str) -> bytes | None:
    """The next value of a queue; None if there is none."""
    try:
        value: bytes = store.queue_pop(queue, False)
    except dist.QueueEmptyError:
        return None
    return value
