"""The same run on 1, 2 and 4 ranks, and on fewer ranks after each stop."""

import os
import signal
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import xxhash
from coloured_keys import distinct_keys, training_config, write_coloured_store, write_coloured_tars
from recorded_training import (
    Record,
    exit_codes,
    next_sitting,
    read_record,
    recorded_train,
    start_ranks,
    whole_batches,
)

from bowstore.config import places
from bowstore.data.index import build_index
from bowstore.errors import BowstoreError, DataError, MismatchError
from bowstore.progress import say
from bowstore.runs import checkpoints, read_metrics
from bowstore.train import distributed, lifeline
from bowstore.train.config import TrainConfig

KEYS = distinct_keys(90)  # 5 steps of 16 an epoch, 10 images left over
STEPS = 15


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("elastic")
    index = build_index(write_coloured_tars(folder / "shards", KEYS, per_shard=40))
    store = write_coloured_store(folder / "words.zarr", KEYS, fingerprint=index.fingerprint)
    return training_config(index.root, store, optim={"batch": 16, "epochs": 3})


@pytest.fixture(scope="module")
def alone(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, list[str]]:
    """What one rank without a stop is given, and the digests that it logs."""
    folder = tmp_path_factory.mktemp("alone")
    recorded_train(config, folder / "runs", folder / "record")
    return read_record(folder / "record"), orders(folder / "runs" / "run")


def orders(run: Path) -> list[str]:
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["order"] for line in lines]


def four_ranks(rank: int, config: TrainConfig, folder: Path) -> None:
    """A whole run of its own; then the elastic run, which the scheduler stops by a signal to one of the ranks."""
    recorded_train(config.model_copy(update={"name": "four"}), folder, folder / f"four-{rank}")
    next_sitting()

    def preempt(step: int) -> None:
        if (rank, step) == (2, 3):
            os.kill(os.getpid(), signal.SIGTERM)

    recorded_train(config, folder, folder / f"first-{rank}", preempt)


def two_ranks(rank: int, config: TrainConfig, folder: Path) -> None:
    """A whole run of its own; then the elastic run, in which rank 1 dies in mid-epoch."""
    recorded_train(config.model_copy(update={"name": "two"}), folder, folder / f"two-{rank}")
    next_sitting()

    def die(step: int) -> None:
        if (rank, step) == (1, 12):
            os.kill(os.getpid(), signal.SIGKILL)

    recorded_train(config, folder, folder / f"second-{rank}", die)


@pytest.fixture(scope="module")
def sittings(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that 4, then 2 ranks, then 1 rank went on with; and of whole runs on 4 and 2 ranks."""
    folder = tmp_path_factory.mktemp("runs")
    codes = exit_codes(start_ranks(four_ranks, 4, (config, folder), sittings=2))
    assert codes == [143] * 4, "a signal to one rank stops all of them"
    assert checkpoints(folder / "run")[0].name == "step-000000008.pt"
    zero, one = exit_codes(start_ranks(two_ranks, 2, (config, folder), sittings=2))
    assert one == -signal.SIGKILL
    assert zero not in (0, None), "the other rank must end too, and not wait"
    assert checkpoints(folder / "run")[0].name == "step-000000010.pt"
    recorded_train(config, folder, folder / "third-0")
    return folder


def test_elastic_runs_log_the_same_order_on_1_2_and_4_ranks(sittings: Path, alone: tuple[Record, list[str]]) -> None:
    assert len(alone[1]) == len(set(alone[1])) == STEPS
    for name in ("four", "two", "run"):
        assert orders(sittings / name) == alone[1], name


@pytest.mark.parametrize("name", ["four", "two"])
def test_elastic_ranks_are_given_the_bits_of_one(sittings: Path, alone: tuple[Record, list[str]], name: str) -> None:
    """Keys, pixels, words and weights, in the same global order."""
    world = {"four": 4, "two": 2}[name]
    assert whole_batches([sittings / f"{name}-{rank}" for rank in range(world)]) == alone[0]


def test_elastic_run_on_4_then_2_then_1_ranks_sees_what_an_uninterrupted_run_sees(
    sittings: Path, alone: tuple[Record, list[str]]
) -> None:
    first = whole_batches([sittings / f"first-{rank}" for rank in range(4)])
    second = whole_batches([sittings / f"second-{rank}" for rank in range(2)])
    third = read_record(sittings / "third-0")
    assert [len(first), second[0]["step"], second[-1]["step"], third[0]["step"]] == [8, 8, 11, 10]
    sequence = first + second[: third[0]["step"] - second[0]["step"]] + third
    assert sequence == alone[0]
    assert second[2:] == alone[0][10:12]  # steps whose weights were lost are repeated with the same images


def test_alignment_holds_on_real_ranks(sittings: Path, config: TrainConfig) -> None:
    """Every picture shows the bag that its rank trained on, over shuffles, CutMix, ranks and stops."""
    lines = [line for path in sittings.glob("*-[0-3]") for line in read_record(path)]
    assert len(lines) >= 6 * STEPS + 4 * 8 + 2 * 4 + 5
    assert [line["misaligned"] for line in lines if line["misaligned"]] == []


def test_elastic_order_digest_tells_one_exchanged_pair(alone: tuple[Record, list[str]]) -> None:
    """The digest in the log is of the keys and their places, as the documentation says."""

    def order(keys: list[str]) -> str:
        hashes = [xxhash.xxh3_64_intdigest(key.encode()) for key in keys]
        return f"{sum(value * (2 * place + 1) for place, value in enumerate(hashes)) % 2**64:016x}"

    assert [order(line["keys"]) for line in alone[0]] == alone[1]
    keys = alone[0][0]["keys"]
    assert order([keys[1], keys[0], *keys[2:]]) != alone[1][0]


def with_its_own_shards(rank: int, config: TrainConfig, folder: Path) -> None:
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # a machine each: each of them is told
    try:
        own = config.model_copy(update={"shards": places(folder / f"shards-{rank}")})
        recorded_train(own, folder, folder / f"own-{rank}")
    except MismatchError as error:
        (folder / f"refused-{rank}").write_text(str(error))


def test_elastic_ranks_with_other_shards_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    """One path, another copy on each machine: each rank would follow the plan through other rows."""
    for rank, keys in enumerate((KEYS, KEYS[::-1])):
        build_index(write_coloured_tars(tmp_path / f"shards-{rank}", keys, per_shard=40))
    assert exit_codes(start_ranks(with_its_own_shards, 2, (config, tmp_path))) == [0, 0]
    for rank in range(2):
        text = (tmp_path / f"refused-{rank}").read_text()
        assert text.startswith(f"rank {rank} has other images or targets than the others: all machines need the same")


def three_ranks(rank: int, how: str, folder: Path) -> None:
    """Steps of which one goes wrong; what a rank has to say at its end goes to a file."""
    log = os.open(folder / f"rank-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    sys.stderr = open(2, "w", closefd=False)
    with patch.object(distributed, "_HANG_SECONDS", 1.5), patch.object(lifeline, "_GRACE_SECONDS", 1.0):
        try:
            with distributed.joined("cpu") as world:
                for step in range(4):
                    if step == 3:
                        misfortune(rank, how)
                    world.at(step)
                    world.any(False)
        except BowstoreError as error:
            say(f"raised: {error}")
            raise SystemExit(1) from error


def beside_each_other(rank: int, folder: Path) -> None:
    """Work without collectives, of which rank 1 dies."""

    def interrupted(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    try:
        with distributed.beside_others():
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            for _ in range(600):
                time.sleep(0.1)
    except BowstoreError as error:
        (folder / f"rank-{rank}").write_text(str(error))


def misfortune(rank: int, how: str) -> None:
    who, what = how.split()
    if rank == int(who):
        if what == "raises":
            raise DataError("image 'cat' cannot be decoded")
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "leaves":
            raise SystemExit(1)
        time.sleep(60)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("2 raises", "rank 2 failed: image 'cat' cannot be decoded"),
        ("0 raises", "rank 0 failed: image 'cat' cannot be decoded"),
        ("2 dies", "rank 2 has died: it was killed, or its machine is gone"),
        ("0 dies", "rank 0 has died: it was killed, or its machine is gone"),
        ("1 leaves", "rank 1 has left before step 3, at which others are"),
        ("0 leaves", "rank 0 has left before step 3, at which others are"),
        ("1 hangs", "rank 1 hangs: for 2 s it has not had the images of step 3, for which the others wait; look at"),
    ],
)
def test_elastic_ranks_end_with_the_one_that_ends(how: str, line: str, tmp_path: Path) -> None:
    begun = time.monotonic()
    processes = start_ranks(three_ranks, 3, (how, tmp_path))
    codes = exit_codes(processes, timeout_s=40)
    assert time.monotonic() - begun < 40
    cause = int(how.split()[0])
    assert codes[cause] == (-signal.SIGKILL if how.endswith("dies") else 1)
    assert [code for rank, code in enumerate(codes) if rank != cause] == [1, 1]
    for rank in {0, 1, 2} - {cause}:
        told = [text for text in (tmp_path / f"rank-{rank}").read_text().splitlines() if line in text]
        assert len(told) == 1
        assert told[0].endswith("; this rank ends with it; run the same command again to go on")


def test_ranks_without_collectives_end_with_the_one_that_ends(tmp_path: Path) -> None:
    assert exit_codes(start_ranks(beside_each_other, 3, (tmp_path,)), timeout_s=40) == [0, -signal.SIGKILL, 0]
    for rank in (0, 2):
        text = (tmp_path / f"rank-{rank}").read_text()
        assert text.startswith("rank 1 has died: it was killed, or its machine is gone; this rank ends with it")
