"""A run that stops anywhere and goes on is the run that never stopped, bit for bit."""

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from coloured_keys import distinct_keys, training_config, write_coloured_store, write_coloured_tars
from recorded_training import Record, exit_codes, read_record, recorded_train, start_ranks

from bowstore.config import places
from bowstore.data import feed
from bowstore.data.index import build_index
from bowstore.data.reader import ShardReader
from bowstore.errors import MismatchError
from bowstore.models.saved import newest_checkpoint
from bowstore.train import loop
from bowstore.train.config import TrainConfig
from bowstore.train.tasks.task import Network

KEYS = distinct_keys(90)  # 5 steps of 16 an epoch, 10 images left over
STEPS = 15
EVERY = 4  # a checkpoint every so many steps: in mid-epoch and at other steps than an epoch's end


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("resume")
    index = build_index(write_coloured_tars(folder / "shards", KEYS, per_shard=40))
    store = write_coloured_store(folder / "words.zarr", KEYS, fingerprint=index.fingerprint)
    runtime = {"checkpoint_every_steps": EVERY}
    return training_config(index.root, store, optim={"batch": 16, "epochs": 3}, runtime=runtime)


@pytest.fixture(scope="module")
def whole(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, dict[str, torch.Tensor]]:
    """What an uninterrupted run is given, and the weights that it ends with."""
    folder = tmp_path_factory.mktemp("whole")
    recorded_train(config, folder, folder / "record")
    return read_record(folder / "record"), weights(folder)


def weights(runs: Path) -> dict[str, torch.Tensor]:
    state = newest_checkpoint(runs / "run")
    assert state is not None
    assert state["step"] == STEPS
    momenta = {f"m{n}": values["momentum_buffer"] for n, values in state["optimizer"]["state"].items()}
    return {**state["backbone"], **state["head"], **momenta}


def assert_the_same_run(record: Record, runs: Path, whole: tuple[Record, dict[str, torch.Tensor]]) -> None:
    """Every step taken, those taken twice alike, all equal to the uninterrupted run; and the same end."""
    assert {line["step"] for line in record} == set(range(STEPS))
    for line in record:
        assert line == whole[0][line["step"]]
        assert line["misaligned"] == []
    ours = weights(runs)
    assert ours.keys() == whole[1].keys()
    assert [name for name, value in ours.items() if not torch.equal(value, whole[1][name])] == []


class Stopped(Exception):
    pass


def stopping_at(step: int) -> Callable[[int], None]:
    """What ends a run before a step."""

    def stop(at: int) -> None:
        if at == step:
            raise Stopped

    return stop


@pytest.mark.parametrize("stops", [(2,), (4, 5), (7, 9), (5, 10, 14)])
def test_resume_in_mid_epoch_gives_the_same_bits(
    config: TrainConfig, tmp_path: Path, whole: tuple[Record, dict[str, torch.Tensor]], stops: tuple[int, ...]
) -> None:
    """Before the first checkpoint; on and around the end of an epoch (5, 10) and a checkpoint (4, 8, 12); again."""
    starts = []
    for stop in stops:
        with pytest.raises(Stopped):
            recorded_train(config, tmp_path, tmp_path / "record", stopping_at(stop))
        starts.append(stop // EVERY * EVERY)
    recorded_train(config, tmp_path, tmp_path / "record")
    record = read_record(tmp_path / "record")
    assert_the_same_run(record, tmp_path, whole)
    expected = [*range(stops[0])]
    for start, stop in zip(starts, [*stops[1:], STEPS], strict=True):
        expected += range(start, stop)
    assert [line["step"] for line in record] == expected


def test_resume_where_the_network_lies_otherwise_in_memory(
    config: TrainConfig, tmp_path: Path, whole: tuple[Record, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another kind of device: momenta of one layout added to weights of another would train something else.

    Momenta arrive unchanged (`test_momenta_are_laid_out_as_their_parameters`). In the three steps that are left weights
    part by 0.6 % at most where layouts round apart, and by 97 % if momenta were those of other weights.
    """
    with pytest.raises(Stopped):
        recorded_train(config, tmp_path, tmp_path / "record", stopping_at(STEPS - 1))
    formats = {torch.channels_last: torch.contiguous_format, torch.contiguous_format: torch.channels_last}
    before = Network.memory_format
    monkeypatch.setattr(Network, "memory_format", lambda self, device: formats[before(self, device)])
    recorded_train(config, tmp_path, tmp_path / "record")
    for name, value in weights(tmp_path).items():
        assert (value.double() - whole[1][name].double()).norm() <= 0.01 * whole[1][name].double().norm() + 1e-6, name


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_resume_drops_what_was_read_ahead(
    config: TrainConfig,
    tmp_path: Path,
    whole: tuple[Record, dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    depth: int,
) -> None:
    """Batches of the next epoch are on their way when the run stops in the last step of this one."""
    monkeypatch.setattr(feed, "PREFETCH", depth)
    read: list[int] = []

    class Spy(ShardReader):
        def read(self, rows: np.ndarray) -> list[np.ndarray]:
            read.append(len(rows))
            return super().read(rows)

    with patch.object(loop, "ShardReader", Spy), pytest.raises(Stopped):
        recorded_train(config, tmp_path, tmp_path / "record", stopping_at(4))
    assert len(read) >= 5 + depth
    recorded_train(config, tmp_path, tmp_path / "record")
    assert_the_same_run(read_record(tmp_path / "record"), tmp_path, whole)


@pytest.mark.parametrize(("tier", "threads"), [("host", 1), ("streamed", 2)])
def test_resume_with_other_threads_and_targets_elsewhere(
    config: TrainConfig, tmp_path: Path, whole: tuple[Record, dict[str, torch.Tensor]], tier: str, threads: int
) -> None:
    """What `runtime` says changes no bit, so it may change between sittings."""

    with pytest.raises(Stopped):
        recorded_train(config, tmp_path, tmp_path / "record", stopping_at(8))
    changes = {"targets": tier, "threads": threads, "storage": {"cache": tmp_path / "cache"}}
    runtime = type(config.runtime).model_validate({**config.runtime.model_dump(), **changes})
    recorded_train(config.model_copy(update={"runtime": runtime}), tmp_path, tmp_path / "record")
    assert_the_same_run(read_record(tmp_path / "record"), tmp_path, whole)


def killed(rank: int, config: TrainConfig, runs: Path, step: int, after_s: float) -> None:
    """Train until some moment after the start of a step, or of the first one after it; then be gone."""
    timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL))

    def arm(now: int) -> None:
        if now >= step and not timer.is_alive():
            timer.start()
        if now == STEPS - 1:
            timer.join()  # never to the end

    recorded_train(config, runs, runs / "record", arm)


@pytest.mark.parametrize("seed", [0, 1])
def test_resume_after_kill_9_and_again(
    config: TrainConfig, tmp_path: Path, whole: tuple[Record, dict[str, torch.Tensor]], seed: int
) -> None:
    """At random moments: in a step, while a checkpoint is written, while the log is written."""
    random = np.random.default_rng(seed)
    for low, high in ((1, 7), (8, 12)):
        step, after_s = int(random.integers(low, high)), float(random.uniform(0, 0.05))
        processes = start_ranks(killed, 1, (config, tmp_path, step, after_s))
        assert exit_codes(processes) == [-signal.SIGKILL]
    recorded_train(config, tmp_path, tmp_path / "record")
    assert_the_same_run(read_record(tmp_path / "record"), tmp_path, whole)


def test_resume_on_other_images_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    """The same keys in other shards would be another order: the checkpoint knows the fingerprint."""

    assert config.shards is not None
    shards = tmp_path / "shards"
    shutil.copytree(config.shards[0], shards)
    moved = config.model_copy(update={"shards": places(shards)})
    with pytest.raises(Stopped):
        recorded_train(moved, tmp_path, tmp_path / "record", stopping_at(6))
    for tar in shards.glob("*.tar"):
        tar.unlink()
    build_index(write_coloured_tars(shards, KEYS, per_shard=30))
    with pytest.raises(MismatchError, match=r"^shards changed since the checkpoint of .*run was written; restore them"):
        recorded_train(moved, tmp_path, tmp_path / "record")
