"""Connections between ranks, in one process: a rank is a thread here, and its death is a closed socket."""

import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bowstore.errors import BowstoreError, BusyError, DataError, MismatchError, MissingError, UsageError
from bowstore.train import distributed, lifeline
from bowstore.train.distributed import World
from bowstore.train.lifeline import Lifeline, connect

HashStore: Any = dist.HashStore  # type: ignore[attr-defined]


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Iterator[queue.Queue[int]]:
    """Exit codes of ranks whose main thread does not come back."""
    codes: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(lifeline, "_GRACE_SECONDS", 0.05)
    monkeypatch.setattr(lifeline.os, "_exit", codes.put)
    return codes


def pair() -> tuple[Lifeline, socket.socket]:
    ours, theirs = socket.socketpair()
    return Lifeline(0, {1: ours}, hang_seconds=60), theirs


def test_a_blocked_rank_ends_with_the_line(exits: queue.Queue[int], capsys: pytest.CaptureFixture[str]) -> None:
    line, other = pair()
    other.close()
    assert exits.get(timeout=5) == 1
    assert capsys.readouterr().err == (
        "Error: rank 1 has died: it was killed, or its machine is gone; this rank ends with it; run the same command "
        "again to go on\n"
    )
    line.close()


def test_a_rank_that_leaves_alarms_nobody(exits: queue.Queue[int]) -> None:
    line, other = pair()
    line.at(7)
    other.sendall(b'{"step": 6}\n{"step": 7, "ended": true}\n')
    other.close()
    assert line.wait_for_verdict(0.2) is None
    line.close()
    assert exits.empty()


def test_what_a_rank_says_may_come_in_pieces_and_its_error_is_bounded(exits: queue.Queue[int]) -> None:
    line, other = pair()
    message = json.dumps({"failed": "no \u00e9"}).encode()
    other.sendall(b'{"step": 3}\n' + message[:9])
    time.sleep(0.05)
    other.sendall(message[9:] + b"\n")
    assert line.wait_for_verdict(5) == "rank 1 failed: no \u00e9"
    other.setblocking(False)
    assert json.loads(other.recv(1000)) == {"verdict": "rank 1 failed: no \u00e9"}
    line.close()
    other.close()
    line, other = pair()
    line.failed("x" * 10_000)
    assert len(json.loads(other.recv(10_000))["verdict"]) < 600
    line.close()
    other.close()


class Board:
    """A store of one job; it first gives what an earlier attempt of the job has left there."""

    def __init__(self, left: str) -> None:
        self.left, self.posted = [left], threading.Event()

    def set(self, key: str, value: str) -> None:
        self.value = value
        self.posted.set()

    def get(self, key: str) -> bytes:
        if self.left:
            return self.left.pop().encode()
        assert self.posted.wait(5)
        return self.value.encode()


def test_strangers_and_predecessors_are_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "_TICK_SECONDS", 0.2)
    with socket.create_server(("", 0)) as server:
        closed = server.getsockname()[1]
    board = Board(json.dumps([closed, "another token"]))
    lines: dict[int, Lifeline] = {}

    def join(rank: int) -> None:
        lines[rank] = connect(rank, 2, "localhost", board, hang_seconds=60)

    zero = threading.Thread(target=join, args=(0,))
    zero.start()
    assert board.posted.wait(5)
    strangers = []
    for text in (b"GET / HTTP/1.0\r\n\r\n", b'{"token": "0", "rank": 1}\n', b"[1]\n", b""):
        stranger = socket.create_connection(("localhost", json.loads(board.value)[0]))
        stranger.sendall(text)
        strangers.append(stranger)
    join(1)
    zero.join(5)
    for stranger in strangers:
        stranger.close()
    lines[1].failed("it was me")
    assert lines[0].wait_for_verdict(5) == "rank 1 failed: it was me"
    for line in lines.values():
        line.close()


def test_a_rank_that_does_not_connect_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "_CONNECT_SECONDS", 0.1)
    with pytest.raises(BowstoreError, match="ranks 1, 2 did not connect to rank 0 within 0 s; ranks need to reach"):
        connect(0, 3, "localhost", Board(""), hang_seconds=60)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    board = Board("")
    board.left = [json.dumps([port, "token"])] * 9
    with pytest.raises(BowstoreError, match=rf"rank 1 cannot reach rank 0 at localhost, port {port} \(Connection ref"):
        connect(1, 3, "localhost", board, hang_seconds=60)


def test_a_verdict_can_interrupt_the_main_thread(exits: queue.Queue[int]) -> None:
    ours, theirs = socket.socketpair()
    called = threading.Event()
    line = Lifeline(0, {1: ours}, hang_seconds=60, on_verdict=called.set)
    theirs.close()
    assert called.wait(5)
    line.close()


class Deaf:
    """A lifeline over which nothing comes but one verdict."""

    def __init__(self, verdict: str | None = None) -> None:
        self.told: list[str] = []
        self.verdict = verdict

    def wait_for_verdict(self, seconds: float) -> str | None:
        assert seconds >= 0
        return self.verdict

    def failed(self, reason: str) -> None:
        self.told.append(reason)

    def close(self) -> None:
        self.told.append("closed")


def rank_1_of_2(monkeypatch: pytest.MonkeyPatch, line: Deaf, store: Any = None, *, local_rank: int = 1) -> Deaf:
    job = HashStore() if store is None else store
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(job, 1, 2)]))
    monkeypatch.setattr(distributed, "connect", lambda *_, **__: line)
    monkeypatch.setattr(distributed.signal, "signal", lambda *_: None)  # this process does not end by an error
    variables = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    return line


def test_ctrl_c_reaches_all_ranks_and_each_says_what_it_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    line = rank_1_of_2(monkeypatch, Deaf())
    with pytest.raises(KeyboardInterrupt, match="go on from step 7"), distributed.beside_others():
        raise KeyboardInterrupt("go on from step 7")
    said = line.told[0]
    assert said == "it was interrupted"
    rank_1_of_2(monkeypatch, Deaf(f"rank 0 failed: {said}"))
    with pytest.raises(KeyboardInterrupt, match="go on from step 7"), distributed.beside_others():
        raise KeyboardInterrupt("go on from step 7")
    rank_1_of_2(monkeypatch, Deaf("rank 0 has died"))
    with pytest.raises(BowstoreError, match="rank 0 has died; this rank ends"), distributed.beside_others():
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out\nwaiting 660000ms"),
         r"rank 1 of 2 has lost the others \(\[gloo.* Timed out waiting 660000ms\); this rank ends with it"),
        (DataError("image 'x' is damaged"), r"^image 'x' is damaged$"),
        (ZeroDivisionError("a fault of ours"), r"^a fault of ours$"),
    ],
)  # fmt: skip
def test_errors_of_collectives_are_one_line_and_others_stay_what_they_are(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = rank_1_of_2(monkeypatch, Deaf())
    with pytest.raises(Exception, match=message) as caught, distributed.beside_others():
        raise error
    assert "\n" not in str(caught.value)
    assert line.told == [" ".join(str(error).split()), "closed"]


@pytest.mark.parametrize("kind", [UsageError, MissingError, MismatchError, BusyError])
def test_a_refusal_is_told_once_on_each_machine_and_never_again(
    kind: type[BowstoreError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun starts all ranks again; what another attempt may cure is told in each."""
    store = HashStore()

    def end(error: BaseException, verdict: str | None = None, local_rank: int = 1) -> tuple[str, list[str]]:
        line = rank_1_of_2(monkeypatch, Deaf(verdict), store, local_rank=local_rank)

        def work() -> None:
            if verdict:  # another rank was refused
                store.set("bowstore/refused", "")
            raise error

        with pytest.raises((BowstoreError, SystemExit)) as caught, distributed.beside_others():
            work()
        store.delete_key("bowstore/refused/0")
        return f"{caught.type.__name__}: {caught.value}", line.told

    for _ in range(2):
        assert end(DataError("damaged")) == ("DataError: damaged", ["damaged", "closed"])
    refusal = kind("give all the same")
    assert end(refusal) == (f"{kind.__name__}: give all the same", ["give all the same", "closed"])
    assert end(refusal) == ("SystemExit: 1", []), "the next attempt"
    store.delete_key("bowstore/refused")
    verdict = "rank 0 failed: give all the same"
    assert end(KeyboardInterrupt(), verdict, local_rank=0) == (f"BowstoreError: {verdict}", ["closed"])
    store.delete_key("bowstore/refused")
    store.add("bowstore/refused/0", 1)
    assert end(KeyboardInterrupt(), verdict) == ("SystemExit: 1", ["closed"]), "the same machine's second rank"


def test_ranks_wait_for_each_other_without_a_collective() -> None:
    store, there = HashStore(), list[int]()
    store.set_timeout(timedelta(seconds=5))
    ranks = [World(rank, 2, torch.device("cpu"), store=store, token=7) for rank in range(2)]

    def late(world: World) -> None:
        for _ in range(2):  # each call is a meeting of its own
            there.append(world.rank)
            world.assembled(poll_seconds=0.01)

    thread = threading.Thread(target=late, args=(ranks[1],))
    thread.start()
    time.sleep(0.1)
    assert there == [1]
    late(ranks[0])
    thread.join(5)
    assert not thread.is_alive()
    assert sorted(there) == [0, 0, 1, 1]
    ended: Any = SimpleNamespace(verdict="rank 1 has died")
    with pytest.raises(BowstoreError, match=r"^rank 1 has died; this rank ends with it"):
        World(0, 2, torch.device("cpu"), ended, store, token=8).assembled(poll_seconds=0.01)


def test_nccl_is_told_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its barriers guess one, and its communicators come up in the first collective."""
    told: dict[str, Any] = {}

    class Told(Exception):
        pass

    @contextmanager
    def lifeline(place: Any) -> Iterator[tuple[Any, None]]:
        yield SimpleNamespace(set=lambda *_: None), None

    def init(backend: str, **kwargs: Any) -> None:
        told.update(kwargs, backend=backend)
        raise Told

    for name, device in (("gloo", torch.device("cpu")), ("nccl", torch.device("cuda", 1))):
        monkeypatch.setattr(distributed, "ranks", lambda: SimpleNamespace(rank=1, size=2, local_rank=1, first=False))
        monkeypatch.setattr(distributed, "choose_device", lambda *_, device=device: device)
        monkeypatch.setattr(distributed, "device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(distributed, "_lifeline", lifeline)
        monkeypatch.setattr(dist, "init_process_group", init)
        with pytest.raises(Told), distributed.joined("auto"):
            pass
        assert told["backend"] == name
        assert told["device_id"] == (device if name == "nccl" else None)


def test_word_of_another_end_waits_for_the_work_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """What interrupts the main thread before that would be told as an interruption by the user."""
    heard: list[str] = []

    def connect(*_: Any, on_verdict: Any, **__: Any) -> Deaf:
        threading.Thread(target=on_verdict, daemon=True).start()
        time.sleep(0.2)
        heard.append("connected")
        return Deaf("rank 0 failed: no such layer")

    rank_1_of_2(monkeypatch, Deaf())
    monkeypatch.setattr(distributed, "connect", connect)
    monkeypatch.setattr(distributed._thread, "interrupt_main", lambda _signal: heard.append("interrupted"))
    with distributed.beside_others():
        heard.append("at work")
        time.sleep(0.2)
    assert heard in (["connected", "at work", "interrupted"], ["connected", "interrupted", "at work"])
