"""Several processes encode one store: the words of one process, byte for byte, whoever dies on the way."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from encoding import encode_in_process, encode_slowly, run_encode
from served import SERVER
from teacher_sets import IMAGES

from bowstore.words.store import layer as layer_module
from bowstore.words.store.store import open_store
from bowstore.words.store.verify import digest, verify

LAYERS: dict[str, Any] = {"layers": ("block2", "block3"), "num_words": (12, 24)}
Start = Callable[..., BaseProcess]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, shards: Path) -> Path:
    """The store of one uninterrupted process: two layers in five chunks each; not to be changed."""
    path = tmp_path_factory.mktemp("clean") / "words.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_module, "MIN_CHUNK_BYTES", 1)
        patch.setattr(layer_module, "CHUNK_STEP_ROWS", 20)
        run_encode(teacher=teacher_file, shards=shards, store=path, **LAYERS)
    return path


@pytest.fixture
def values(teacher_file: Path, shards: Path, tmp_path: Path) -> dict[str, Any]:
    return {"teacher": teacher_file, "shards": shards, "store": tmp_path / "words.zarr", **LAYERS}


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that do not outlive the test."""
    started = []

    def begin(*arguments: Any, target: Callable[..., None] = encode_in_process) -> BaseProcess:
        process = SERVER.Process(target=target, args=arguments)
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


def test_two_layers_are_those_of_one_pass_each(clean: Path, values: dict[str, Any], small_chunks: int) -> None:
    store = open_store(clean)
    assert store.layers == ("block2", "block3")
    assert (store.layer("block2").num_words, store.layer("block3").num_words) == (12, 24)
    assert store.load_words("block2").shape == (IMAGES, 8, 8)
    alone = open_store(run_encode(**{**values, "layers": ("block3",), "num_words": (24,)}).store)
    assert (store.load_words("block3") == alone.load_words()).all()


@pytest.mark.parametrize("count", [2, 4])
def test_the_words_do_not_depend_on_the_number_of_processes(
    clean: Path, values: dict[str, Any], start: Start, tmp_path: Path, count: int
) -> None:
    outs = [tmp_path / f"{number}.txt" for number in range(count)]
    processes = [start(values, out, target=encode_slowly) for out in outs]
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    encoded = [int(out.read_text()) for out in outs]
    assert sum(encoded) == IMAGES  # every image once
    assert sum(number > 0 for number in encoded) >= 2
    assert digest(values["store"]) == digest(clean)
    assert verify(values["store"], values["shards"]).sound
    assert (
        open_store(values["store"]).nearest("block2").row_Kn.tolist()
        == open_store(clean).nearest("block2").row_Kn.tolist()
    )
    assert hidden(tmp_path) == set()


def test_parts_of_a_dead_process_are_taken_over(
    clean: Path, values: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    first = start(values, target=encode_slowly)
    claims = tmp_path / ".words.zarr.work"
    while not list(claims.glob("*@*")):  # it has claimed a part
        time.sleep(0.01)
        assert first.exitcode is None
    second = start(values, tmp_path / "second.txt", target=encode_slowly)
    assert first.pid
    os.kill(first.pid, signal.SIGKILL)
    second.join(300)
    assert second.exitcode == 0
    assert int((tmp_path / "second.txt").read_text()) > 0
    assert digest(values["store"]) == digest(clean)
    assert not claims.exists()


def test_killed_at_thirty_random_moments_it_ends_with_the_same_words(
    clean: Path, values: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    """Each death strikes what the ones before left; a store that gets finished is compared, and begun anew."""
    store, written, finished = values["store"], dict[Path, int](), 0
    scale, draw, deaths = 1.0, random.Random(0), 0  # seconds
    while deaths < 30:
        assert deaths + finished < 150
        process = start(values, None, draw.uniform(0, scale))
        process.join(300)
        assert process.exitcode is not None
        committed = {path: path.stat().st_mtime_ns for path in store.glob("*/chunk_digest/c/[0-9]*")}
        assert all(committed[path] == stamp for path, stamp in written.items()), "a finished chunk was redone"
        written = committed
        if process.exitcode == 0:
            assert digest(store) == digest(clean)
            assert verify(store, values["shards"]).sound
            assert hidden(tmp_path) == set(), "leftovers of dead writers"
            finished += 1
            scale *= 0.6  # deaths and ends alternate, however fast the machine is at the moment
            shutil.rmtree(store)
            written = {}
        else:
            deaths += 1
            scale *= 1.15
    run_encode(**values)
    assert digest(store) == digest(clean)
    assert finished > 1


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.name.startswith(".") or path.name.endswith(".partial")}
