"""A crew shares units of work out: each is kept once, whoever dies, hangs, or comes from an attempt that is over."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from bowstore.errors import MismatchError
from bowstore.torchrun import Ranks
from bowstore.words.encode import crew as crew_module
from bowstore.words.encode.crew import PIECE_BYTES, UNACKNOWLEDGED, Crew, join

GIVEN = {"shards": "abc", "seed": "0"}
UNITS = 40
Part = Callable[[Crew], Any]


@pytest.fixture
def store() -> Any:
    """The store of a job: a server and, for each caller of `clone`, a connection of its own."""
    return dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)


def place(rank: int, size: int) -> Ranks:
    return Ranks(rank, size, rank, size)


def ranks(store: Any, parts: list[Part], given: dict[int, dict[str, str]] | None = None) -> list[Any]:
    """What the parts of all ranks return, or the error that they raise; each in a thread of its own."""

    def run(rank: int) -> Any:
        client = store.clone()
        try:
            with join(place(rank, len(parts)), (given or {}).get(rank, GIVEN), client) as crew:
                return parts[rank](crew)
        except Exception as error:  # noqa: BLE001
            return error

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))


def result(unit: int) -> bytes:
    return unit.to_bytes(2, "little") * (unit + 1)


def make(units: Iterator[int], wanted: Callable[[int], bool]) -> Iterator[tuple[int, bytes]]:
    for unit in units:
        time.sleep(0.002)
        if wanted(unit):
            yield unit, result(unit)


def sharing(kept: list[tuple[int, bytes]], work: Any = make, units: int = UNITS) -> Part:
    """A rank that does its part of one stage; rank 0 puts what it keeps into the list."""
    return lambda crew: crew.share("stage", units, work, lambda unit, value: kept.append((unit, value)))


@pytest.mark.parametrize("size", [1, 3])
def test_every_unit_is_kept_once(store: Any, size: int) -> None:
    kept: list[tuple[int, bytes]] = []
    made: list[list[int]] = [[] for _ in range(size)]

    def counted(rank: int) -> Any:
        def work(units: Iterator[int], wanted: Callable[[int], bool]) -> Iterator[tuple[int, bytes]]:
            for unit, value in make(units, wanted):
                made[rank].append(unit)
                yield unit, value

        return work

    assert ranks(store, [sharing(kept, counted(rank)) for rank in range(size)]) == [None] * size
    assert sorted(kept) == [(unit, result(unit)) for unit in range(UNITS)]
    assert all(made)


def test_alone_it_needs_no_store_of_others() -> None:
    kept: list[tuple[int, bytes]] = []
    with join(place(0, 1), GIVEN) as crew:
        crew.tell("a", b"")
        assert (crew.hear("a"), crew.first, crew.size) == (b"", True, 1)
        sharing(kept)(crew)
        crew.share("none", 0, make, lambda unit, value: kept.append((unit, value)))
    assert sorted(kept) == [(unit, result(unit)) for unit in range(UNITS)]


def test_bytes_of_any_length_arrive(store: Any) -> None:
    large = bytes(range(256)) * (2 * PIECE_BYTES // 256) + b"end"
    kept: list[tuple[int, bytes]] = []

    def work(units: Iterator[int], _wanted: Callable[[int], bool]) -> Iterable[tuple[int, bytes]]:
        return ((unit, large) for unit in units)

    def first(crew: Crew) -> None:
        crew.tell("large", large)
        sharing(kept, work, 3)(crew)

    def other(crew: Crew) -> bytes:
        heard = crew.hear("large")
        sharing(kept, work, 3)(crew)
        return heard

    assert ranks(store, [first, other])[1] == large
    assert sorted(kept) == [(unit, large) for unit in range(3)]


def test_what_a_rank_never_gives_back_is_made_by_others(store: Any) -> None:
    """A rank takes units and hangs past the end; what it then brings is too late, and it ends like the others."""
    kept: list[tuple[int, bytes]] = []
    over = threading.Event()

    def hang(units: Iterator[int], _wanted: Callable[[int], bool]) -> Iterator[tuple[int, bytes]]:
        taken = [next(units) for _ in range(5)]
        over.wait(60)
        yield from ((unit, b"late") for unit in taken)

    def first(crew: Crew) -> None:
        sharing(kept)(crew)
        over.set()

    assert ranks(store, [first, sharing(kept), sharing([], hang)]) == [None] * 3
    assert sorted(kept) == [(unit, result(unit)) for unit in range(UNITS)]


def test_who_hangs_with_a_unit_is_told_that_it_is_done(store: Any) -> None:
    kept: list[tuple[int, bytes]] = []
    over = threading.Event()
    asked: list[bool] = []

    def hang(units: Iterator[int], wanted: Callable[[int], bool]) -> Iterator[tuple[int, bytes]]:
        unit = next(units)
        asked.append(wanted(unit))
        over.wait(60)
        asked.append(wanted(unit))
        yield from ()

    def first(crew: Crew) -> None:
        sharing(kept)(crew)
        over.set()

    assert ranks(store, [first, sharing([], hang)]) == [None] * 2
    assert asked == [True, False]


def test_a_rank_waits_while_two_of_its_units_are_not_kept(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, going = [0], threading.Event()

    def work(units: Iterator[int], _wanted: Callable[[int], bool]) -> Iterator[tuple[int, bytes]]:
        for unit in units:
            begun[0] += 1
            yield unit, result(unit)

    def keep(_unit: int, _value: bytes) -> None:
        assert going.wait(60)

    with ThreadPoolExecutor(1) as pool:
        ended: Future[Any] = pool.submit(ranks, store, [lambda crew: crew.share("stage", UNITS, work, keep)])
        while begun[0] < UNACKNOWLEDGED:
            time.sleep(0.01)
        time.sleep(0.3)
        assert begun[0] == UNACKNOWLEDGED
        going.set()
        assert ended.result() == [None]
    assert begun[0] == UNITS


def test_what_fails_where_units_are_kept_ends_rank_0(store: Any) -> None:
    def keep(unit: int, _value: bytes) -> None:
        if unit == 7:
            raise OSError(28, "No space left on device")

    (error,) = ranks(store, [lambda crew: crew.share("stage", UNITS, make, keep)])
    assert isinstance(error, OSError)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({**GIVEN, "shards": "xyz"}, "rank 1 was given shards xyz, rank 0 abc; give all ranks the same"),
        ({"shards": "abc"}, "rank 1 was given seed None, rank 0 0; give all ranks the same"),
        ({**GIVEN, "pca": "8"}, "rank 1 was given pca 8, rank 0 None; give all ranks the same"),
    ],
)
def test_a_rank_that_was_given_something_else_is_refused(store: Any, theirs: dict[str, str], message: str) -> None:
    worked: list[int] = []
    found = ranks(store, [lambda crew: worked.append(crew.rank)] * 2, {1: theirs})
    assert [type(error) for error in found] == [MismatchError] * 2
    assert [str(error) for error in found] == [message] * 2
    assert not worked


def test_nothing_of_a_dead_attempt_counts(store: Any) -> None:
    """An attempt ends in the middle: counters, half a result, results and a rank that asked to join are left over."""
    nonce = "of the dead"
    store.queue_push(crew_module._HELLO, json.dumps({"rank": 1, "nonce": nonce, "given": GIVEN}))

    def dies(units: Iterator[int], _wanted: Callable[[int], bool]) -> Iterator[tuple[int, bytes]]:
        yield next(units), b"dead"
        raise KeyError("killed")

    def dead(crew: Crew) -> None:
        crew.tell("plan", b"dead")
        crew._store.queue_push("stage/3/1", b"half of the de")
        crew.share("stage", UNITS, dies, lambda _unit, _value: None)

    assert isinstance(ranks(store, [dead])[0], KeyError)
    kept: list[tuple[int, bytes]] = []

    def first(crew: Crew) -> None:
        crew.tell("plan", b"alive")
        sharing(kept)(crew)

    def other(crew: Crew) -> bytes:
        heard = crew.hear("plan")
        sharing([])(crew)
        return heard

    assert ranks(store, [first, other])[1] == b"alive"
    assert sorted(kept) == [(unit, result(unit)) for unit in range(UNITS)]
    answer = crew_module._pop(store, f"{crew_module._WELCOME}/{nonce}")
    assert json.loads(answer or "")["refusal"] is None  # and read by nobody


def test_rank_0_does_not_wait_for_ever_for_a_rank(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins without; the rank that comes late takes part all the same."""
    monkeypatch.setattr(crew_module, "_JOIN_SECONDS", 0.1)
    begun, kept = threading.Event(), list[tuple[int, bytes]]()

    def first() -> None:
        with join(place(0, 2), GIVEN, store.clone()) as crew:
            begun.set()
            sharing(kept, slow)(crew)

    def slow(units: Iterator[int], wanted: Callable[[int], bool]) -> Iterator[tuple[int, bytes]]:
        for unit in units:
            time.sleep(0.02)
            yield unit, result(unit)

    late: list[int] = []

    def other(units: Iterator[int], wanted: Callable[[int], bool]) -> Iterator[tuple[int, bytes]]:
        for unit, value in make(units, wanted):
            late.append(unit)
            yield unit, value

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    with join(place(1, 2), GIVEN, store.clone()) as crew:
        sharing([], other)(crew)
    thread.join(60)
    assert late
    assert sorted(kept) == [(unit, result(unit)) for unit in range(UNITS)]
