"""The way of computing is recorded with a layer, and an unfinished layer is gone on with by the same."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoding import encode_as_rank, encode_in_process, run_encode
from growing import LAYERS
from rank_sets import agent
from served import SERVER

from bowstore.errors import MismatchError, UsageError
from bowstore.models import compiled
from bowstore.torchrun import Ranks
from bowstore.verify import verify_path
from bowstore.words.encode import job as job_module
from bowstore.words.encode.teacher import Teacher
from bowstore.words.store.store import Store, open_store
from bowstore.words.store.verify import digest, verify
from bowstore.words.store.writer import StoreWriter

EAGER = {"trunk": "eager", "decoder": "CPU", "resize": "torch"}
OTHER = EAGER | {"trunk": "another way"}


@pytest.fixture
def run(teacher_file: Path, shards: Path, store: Path) -> Any:
    def call(**values: Any) -> Any:
        return run_encode(**{"teacher": teacher_file, "shards": shards, "store": store, **LAYERS, **values})

    return call


def set_arithmetic(store: Path, layer: str, value: dict[str, str] | None) -> None:
    file = store / layer / "zarr.json"
    record = json.loads(file.read_text())
    record["attributes"] |= {"arithmetic": value}
    if value is None:  # as in stores of older versions
        del record["attributes"]["arithmetic"]
    file.write_text(json.dumps(record))


def test_an_unfinished_layer_is_gone_on_with_by_the_same_arithmetic(run: Any, store: Path) -> None:
    before, name = digest(store), LAYERS["layers"][1]
    assert open_store(store).layer(name).attributes["arithmetic"] == EAGER
    StoreWriter(store).discard_chunks(name, [1])
    set_arithmetic(store, name, OTHER)
    told = r"not complete and was begun with trunk 'another way', now it would be 'eager'; go on with it alone, without"
    with pytest.raises(MismatchError, match=told):
        run()
    set_arithmetic(store, name, None)
    with pytest.raises(
        MismatchError, match=r"with resize 'DALI', now it would be 'torch'; .* or encode into a new store: --vocabulary"
    ):
        run()
    assert verify(store).arithmetic[name] == EAGER | {"resize": "DALI"}
    set_arithmetic(store, name, {"resize": "torch"})
    run()
    assert digest(store) == before
    assert verify(store).arithmetic[name] == EAGER
    assert f"{name} (trunk eager, decoder CPU, resize torch)" in verify_path(store).text()


def test_an_unfinished_layer_of_another_arithmetic_gives_its_words_to_a_new_store(
    run: Any, store: Path, tmp_path: Path
) -> None:
    before, name = open_store(store).layer(LAYERS["layers"][1]), LAYERS["layers"][1]
    words = before.read_words()
    StoreWriter(store).discard_chunks(name, [1])
    set_arithmetic(store, name, None)
    with pytest.raises(MismatchError, match=f"now .* 'torch'; .* into a new store: --vocabulary {store} --store "):
        run()
    path = run(vocabulary=store, num_words=(), store=tmp_path / "new.zarr").store
    new = open_store(path).layer(name)
    assert (new.read_words() == words).all()
    assert new.attributes["vocabulary_digest"] == before.attributes["vocabulary_digest"]


def test_complete_layers_of_another_arithmetic_are_used_and_told_of(
    run: Any, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Teacher, "trunk", "another way")
    assert all(layer["already_complete"] for layer in run().layers)
    new = run(vocabulary=store, num_words=(), store=tmp_path / "new.zarr").store
    told = (
        "trunk eager, decoder CPU, resize torch; these images are encoded with trunk another way, decoder CPU, resize"
    )
    assert told in capsys.readouterr().err
    assert verify(new).arithmetic == {name: OTHER for name in LAYERS["layers"]}


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Run what was traced, without the seconds of a compiler; counts."""
    calls: list[int] = []

    def compile(graph: Any, _images: Any, options: Any) -> Any:
        calls.append(1)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile)
    return calls


def fewer_words(store: Path, name: str) -> str:
    """Take a chunk back; the digest that comes back when it is written again in the same way."""
    before = digest(store)
    StoreWriter(store).discard_chunks(name, [1])
    return before


def test_a_store_that_was_begun_compiled_is_gone_on_with_compiled(
    run: Any, tmp_path: Path, traced_only: list[int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "new.zarr"
    report = run(store=path, compile=True)
    assert report.seconds["compile"] > 0
    assert verify(path).arithmetic["block3"]["trunk"] == "inductor freezing"
    assert len(traced_only) == 1  # once for sample and words
    run(store=path)
    assert len(traced_only) == 1  # nothing was left to do
    before = fewer_words(path, "block3")
    with pytest.raises(
        MismatchError, match=r"with trunk 'inductor freezing', now it would be 'eager'; go on .* without --c"
    ):
        run(store=path, compile=False)
    with monkeypatch.context() as patch:
        patch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
        with pytest.raises(MismatchError, match=r"now it would be 'eager'; go on .* where it was begun, or encode"):
            run(store=path)
        assert "not compiled: there is no C++ compiler that works" in capsys.readouterr().err
    run(store=path)  # auto, though its work alone would not do
    assert len(traced_only) == 2
    assert digest(path) == before


def test_a_store_that_was_begun_eager_is_gone_on_with_eager(
    run: Any, store: Path, traced_only: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fewer_words(store, "block3")
    monkeypatch.setattr(compiled, "_WORTH_SECONDS", 0.0)
    with pytest.raises(
        MismatchError, match=r"with trunk 'eager', now it would be 'inductor freezing'; go on .* without --c"
    ):
        run(compile=True)
    run()
    assert len(traced_only) == 1  # before it was refused
    assert digest(store) == before


def test_two_layers_of_two_ways_are_not_encoded_in_one_pass(run: Any, store: Path) -> None:
    for name, way in (("block2", "eager"), ("block3", "inductor freezing")):
        fewer_words(store, name)
        set_arithmetic(store, name, EAGER | {"trunk": way})
    told = r"'block3' .* begun with trunk 'inductor freezing', now it would be 'eager'; go on with it alone, without"
    with pytest.raises(MismatchError, match=told):
        run()


def no_compiler() -> str:
    raise RuntimeError("No working C++ compiler found")


def test_compiling_that_is_asked_for_and_cannot_be_had(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
    monkeypatch.setattr(compiled, "_WORTH_SECONDS", 0.0)
    path = tmp_path / "new.zarr"
    with pytest.raises(UsageError, match=r"^there is no C\+\+ compiler.*; leave --compile out to do without$"):
        run(store=path, compile=True)
    run(store=path)
    assert "the network is run as it is, not compiled: there is no C++ compiler" in capsys.readouterr().err
    assert verify(path).arithmetic["block3"]["trunk"] == "eager"


def test_a_rank_that_cannot_compile_as_rank_0_has_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: int) -> None:
        raise compiled.CannotCompileError("no compiler")

    job: Any = SimpleNamespace(teacher=SimpleNamespace(compiled_for=fail), batch=2, seconds={})
    monkeypatch.setattr(job_module, "ranks", lambda: Ranks(3, 4, 3, 4))
    told = r"^rank 3 cannot compile the teacher as rank 0 has \(no compiler\); encode on machines that can, or with "
    with pytest.raises(MismatchError, match=told):
        job_module.Job.run_in(job, compiled.FROZEN)


def test_images_under_the_words_of_another_store_go_the_way_of_those_there(
    run: Any, more: Path, tmp_path: Path, traced_only: list[int], capsys: Any
) -> None:
    path = run(store=tmp_path / "new.zarr", compile=True).store
    second = run(store=tmp_path / "second.zarr", shards=more, vocabulary=path, layers=(), num_words=()).store
    assert len(traced_only) == 2
    assert "words differ" not in capsys.readouterr().err
    assert open_store(second).layers == LAYERS["layers"]
    assert verify(second).arithmetic["block3"]["trunk"] == "inductor freezing"


@pytest.mark.slow
def test_the_compiled_teacher_gives_the_same_words_to_any_number_of_processes(
    run: Any, tmp_path: Path, teacher_file: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("bowstore.words.encode.forward.compute_workers", lambda device: 1)
        alone = run(store=tmp_path / "alone.zarr", compile=True).store
    assert verify(alone).arithmetic["block3"]["trunk"] == "inductor freezing"
    path = tmp_path / "shared.zarr"
    values = {"teacher": teacher_file, "shards": shards, "store": path, "compile": True, **LAYERS}
    dying = SERVER.Process(target=encode_in_process, args=(values,), kwargs={"renames": 45})
    dying.start()
    dying.join()
    assert dying.exitcode == -signal.SIGKILL
    assert Store(path).layers == ()
    with agent(2) as job:
        job.start(encode_as_rank, values)
        assert job.wait() == [0, 0]
    assert digest(path) == digest(alone)
