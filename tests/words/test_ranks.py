"""Ranks of a job encode one store: the words of one process, byte for byte, whoever dies, hangs or comes late."""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoding import encode_as_rank, encode_slowly, run_encode
from growing import LAYERS
from rank_sets import agent
from teacher_sets import IMAGES, write_shards, write_teacher

from bowstore.errors import BusyError, MismatchError
from bowstore.words.store.store import open_store
from bowstore.words.store.verify import digest, verify
from bowstore.words.store.writer import StoreWriter


@pytest.fixture
def clean(first: Path) -> Path:
    """The store of one uninterrupted process: two layers in five chunks each; not to be changed."""
    return first


@pytest.fixture
def values(teacher_file: Path, shards: Path, tmp_path: Path) -> dict[str, Any]:
    return {"teacher": teacher_file, "shards": shards, "store": tmp_path / "words.zarr", **LAYERS}


def check_same(store: Path, clean: Path) -> None:
    assert digest(store) == digest(clean)
    assert verify(store).sound
    found, expected = open_store(store), open_store(clean)
    for layer in LAYERS["layers"]:
        ours, theirs = found.layer(layer), expected.layer(layer)
        assert all(map(np.array_equal, ours.read_nearest()[:2], theirs.read_nearest()[:2]))
        assert np.array_equal(ours.read_array("document_frequency"), theirs.read_array("document_frequency"))
    assert hidden(store.parent) == {f".{store.name}.lock"}, "leftovers of dead writers"


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.name.startswith(".") or path.name.endswith(".partial")}


def test_two_layers_are_those_of_one_pass_each(clean: Path, values: dict[str, Any], small_chunks: int) -> None:
    store = open_store(clean)
    assert store.layers == ("block2", "block3")
    assert (store.layer("block2").num_words, store.layer("block3").num_words) == (12, 24)
    assert store.load_words("block2").shape == (IMAGES, 8, 8)
    alone = open_store(run_encode(**{**values, "layers": ("block3",), "num_words": (24,)}).store)
    assert (store.load_words("block3") == alone.load_words()).all()


@pytest.mark.parametrize("size", [2, 4])
def test_the_words_do_not_depend_on_the_number_of_ranks(
    clean: Path, values: dict[str, Any], tmp_path: Path, size: int
) -> None:
    """A chunk of 20 images is shared, too: a unit is a batch of 8 here."""
    with agent(size) as job:
        job.start(encode_slowly, values, tmp_path / "batches")
        assert job.wait() == [0] * size
    check_same(values["store"], clean)
    made = [len((tmp_path / f"batches.{rank}").read_text()) for rank in range(size)]
    assert min(made) > 0, "a rank that had nothing to do"
    assert sum(made) < 1.5 * (IMAGES / 8 + 15), "batches that were made twice, of both passes"


def test_other_ranks_need_no_store(clean: Path, values: dict[str, Any], tmp_path: Path) -> None:
    """Another rank is given a folder that is not there for the store, and for the vocabulary."""
    nowhere = tmp_path / "nowhere/words.zarr"
    given = {**values, "vocabulary": clean, "layers": (), "num_words": ()}
    with agent(2) as job:
        job.start(encode_as_rank, given, changes={1: {"store": nowhere, "vocabulary": nowhere}})
        assert job.wait() == [0, 0]
    assert not nowhere.parent.exists()
    assert np.array_equal(open_store(values["store"]).load_words("block3"), open_store(clean).load_words("block3"))


def test_killed_at_thirty_random_moments_it_ends_with_the_same_words(
    clean: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    """Each death, of rank 0 or of the other, ends all ranks, and all are started again over the same c10d store."""
    store, written, finished = values["store"], dict[Path, int](), 0
    scale, draw, deaths = 1.0, random.Random(0), 0  # seconds
    with agent(2) as job:
        while deaths < 30:
            assert deaths + finished < 150
            victim, seconds = draw.randrange(2), draw.uniform(0, scale)
            job.start(encode_as_rank, values, victim, seconds)
            job.ranks[victim].join(300)
            died = job.ranks[victim].exitcode != 0
            if died:
                job.end()
            else:
                assert job.wait() == [0, 0]
            committed = {path: path.stat().st_mtime_ns for path in store.glob("*/chunk_digest/c/[0-9]*")}
            assert all(committed[path] == stamp for path, stamp in written.items()), "a finished chunk was redone"
            written = committed
            if died:
                deaths += 1
                scale *= 1.15
            else:
                check_same(store, clean)
                finished += 1
                scale *= 0.6  # deaths and ends alternate, however fast the machine is at the moment
                shutil.rmtree(store)
                written = {}
        job.start(encode_as_rank, values)
        assert job.wait() == [0, 0]
    check_same(store, clean)
    assert finished > 1


def test_a_rank_that_is_stopped_through_the_end_changes_nothing(
    clean: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    """It has units that it never gives back; continued when the store is complete, it ends like the others."""
    with agent(2) as job:
        job.start(encode_slowly, values, tmp_path / "batches")
        wait_for_batches(tmp_path / "batches.1", 3)
        os.kill(job.ranks[1].pid or 0, signal.SIGSTOP)
        job.ranks[0].join(300)
        assert job.ranks[0].exitcode == 0
        check_same(values["store"], clean)
        before = stamps(values["store"])
        os.kill(job.ranks[1].pid or 0, signal.SIGCONT)
        assert job.wait() == [0, 0]
    assert stamps(values["store"]) == before


def test_rank_0_stopped_keeps_all_others_from_the_store(clean: Path, values: dict[str, Any], tmp_path: Path) -> None:
    with agent(2) as job:
        job.start(encode_slowly, values, tmp_path / "batches")
        while not values["store"].exists():
            time.sleep(0.02)
        os.kill(job.ranks[0].pid or 0, signal.SIGSTOP)
        time.sleep(1)  # the other rank comes to its bound of unacknowledged units
        before = stamps(values["store"])
        with pytest.raises(BusyError, match=r"word store .*words\.zarr is in use by process \d+ on .*; wait for it"):
            run_encode(**values)
        assert stamps(values["store"]) == before
        os.kill(job.ranks[0].pid or 0, signal.SIGCONT)
        assert job.wait() == [0, 0]
    check_same(values["store"], clean)


def wait_for_batches(path: Path, count: int) -> None:
    while not path.exists() or path.stat().st_size < count:
        time.sleep(0.02)


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("shards", r"shards \w+ \(90 images\), rank 0 \w+ \(96 images\)"),
        ("teacher", r"teacher weights \w+, rank 0 \w+"),
        ("iterations", "iterations 4, rank 0 3"),
    ],
)
def test_a_rank_that_was_given_something_else_is_refused_before_any_work(
    values: dict[str, Any], tmp_path: Path, other: str, difference: str
) -> None:
    theirs = {
        "shards": lambda: write_shards(tmp_path / "others", 90, seed=1),
        "teacher": lambda: write_teacher(tmp_path / "other.safetensors", seed=1),
        "iterations": lambda: 4,
    }[other]()
    with agent(2) as job:
        job.start(encode_as_rank, values, None, None, tmp_path / "told", changes={1: {other: theirs}})
        assert job.wait() == [1, 1]
    for rank in range(2):
        line = (tmp_path / f"told.{rank}").read_text()
        assert re.fullmatch(rf"MismatchError: rank 1 was given {difference}; give all ranks the same", line), line
    assert not values["store"].exists()


def test_an_unfinished_store_of_the_engine_before_is_refused(
    clean: Path, values: dict[str, Any], tmp_path: Path, small_chunks: int
) -> None:
    """It kept what it had seen of the nearest images in a folder beside the store; without that, they would be lost."""
    store = Path(shutil.copytree(clean, values["store"]))
    (work := store.with_name(f".{store.name}.work")).mkdir()
    assert all(layer["already_complete"] for layer in run_encode(**values).layers)
    StoreWriter(store).discard_chunks("block3", [4])
    message = rf"layer 'block3' of word store {store} is not complete and was begun by an earlier version, which kept"
    with pytest.raises(MismatchError, match=rf"{message} in {work} .* --vocabulary {store} --store NEW"):
        run_encode(**values)
    new = run_encode(**{**values, "vocabulary": store, "store": tmp_path / "new.zarr"}).store
    assert np.array_equal(open_store(new).load_words("block3"), open_store(clean).load_words("block3"))
