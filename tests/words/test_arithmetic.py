"""The way of computing is recorded with a layer, and an unfinished layer is gone on with by the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from encoding import run_encode
from growing import LAYERS, interrupted_append

from bowstore.errors import MismatchError
from bowstore.verify import verify_path
from bowstore.words.store import open_store
from bowstore.words.store_writer import StoreWriter
from bowstore.words.teacher import Teacher
from bowstore.words.verify import digest, verify

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
    told = r"not complete and was begun with trunk 'another way', now it would be 'eager'; encode into a new store, or"
    with pytest.raises(MismatchError, match=told):
        run()
    set_arithmetic(store, name, None)
    with pytest.raises(MismatchError, match="was begun with resize 'DALI', now it would be 'torch'; encode into a new"):
        run()
    assert verify(store).arithmetic[name] == EAGER | {"resize": "DALI"}
    set_arithmetic(store, name, {"resize": "torch"})
    run()
    assert digest(store) == before
    assert verify(store).arithmetic[name] == EAGER
    assert f"{name} (trunk eager, decoder CPU, resize torch)" in verify_path(store).text()


def test_complete_layers_of_another_arithmetic_are_used_and_told_of(
    run: Any, tmp_path: Path, more: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Teacher, "trunk", "another way")
    assert all(layer.already_complete for layer in run().layers)
    new = run(vocabulary=store, k=(), store=tmp_path / "new.zarr").store
    told = (
        "trunk eager, decoder CPU, resize torch; these images are encoded with trunk another way, decoder CPU, resize"
    )
    assert told in capsys.readouterr().err
    assert verify(new).arithmetic == {name: OTHER for name in LAYERS["layers"]}
    run(shards=more, append=True, layers=(), k=())
    assert told in capsys.readouterr().err
    assert [part.get("arithmetic") for part in open_store(store).parts] == [None, OTHER]


def test_an_append_is_gone_on_with_by_the_same_arithmetic(
    run: Any, store: Path, teacher_file: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_append(store, teacher_file, more)
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "trunk", "another way")
        with pytest.raises(
            MismatchError,
            match="is an unfinished --append with trunk eager, decoder CPU, resize torch, now it would be trunk an",
        ):
            run(shards=more, append=True, layers=(), k=())
    run(shards=more, append=True, layers=(), k=())
    assert verify(store).sound
