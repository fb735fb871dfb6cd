"""Files beside shards that somebody edited by hand: each edit is refused in one line, or does no harm."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from source_sets import tiny_image, write_file
from tar_files import JPEG, write_members

from bowstore.data.config import ShardsConfig
from bowstore.data.index import Index, build_index, open_index
from bowstore.data.reader import ShardReader
from bowstore.data.records import MANIFEST_FILE, QUARANTINE_FILE
from bowstore.data.shards import make_shards
from bowstore.data.table import COLUMNS, INDEX_FILE, read_header, write_table
from bowstore.data.verify import verify_folder
from bowstore.errors import BowstoreError, CorruptError, DataError

OTHERS: list[Any] = [None, True, -1, 3.5, float("inf"), 2**70, "", "x", "../x.tar", "\ud800", [], {}, [[]], {"a": 1}]
GONE = object()
DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    for number in range(4):
        write_file(root / f"c{number % 2}/{number}.jpg", tiny_image(number))
    return root


@pytest.fixture(scope="module")
def golden(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("golden")
    make_shards(source, out, ShardsConfig(per_shard=2, workers=1))
    return out


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A folder of two shards of bowstore's own."""
    shutil.copytree(golden, tmp_path / "out")
    return tmp_path / "out/train"


def edits(value: Any) -> Iterator[tuple[str, Any]]:
    """Copies of a JSON value with one place in it changed, each with its place."""
    for place in _places(value, ()):
        for other in [*OTHERS, GONE] if place else OTHERS:
            copy = json.loads(json.dumps(value))
            if not place:
                yield "all of it", other
                continue
            above = copy
            for key in place[:-1]:
                above = above[key]
            if other is GONE:
                del above[place[-1]]
            else:
                above[place[-1]] = other
            yield f"{place}: {other!r}", copy


def _places(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield place
    keys: Any = value if isinstance(value, dict) else range(min(len(value), 1)) if isinstance(value, list) else ()
    for key in keys:
        yield from _places(value[key], (*place, key))


def use(index: Index) -> None:
    """What training does first."""
    ShardReader(index).read(np.arange(len(index)))
    assert all(index.keys())
    assert f"{index.fingerprint[:8]} {' '.join(index.classes)} {sum(entry.samples for entry in index.shards)}"


def survives(what: str, call: Callable[[], object]) -> bool:
    """Whether a call succeeds; that it is refused in one line, or else."""
    message = ""
    try:
        call()
    except BowstoreError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{what} ended in {type(error).__name__}") from error
    assert "\n" not in message, what
    assert len(message) < 700, what
    return not message


def test_the_header_of_an_index(folder: Path) -> None:
    path = folder / INDEX_FILE
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    texts = [(what, json.dumps(value).encode()) for what, value in edits(json.loads(data[8:length]))]
    for what, text in [*texts[::5], ("many levels", DEEP), ("no UTF-8", b"\xff\xfe"), ("no JSON", b"{")]:
        padded = text + b" " * (-len(text) % 8)
        path.write_bytes(len(padded).to_bytes(8, "little") + padded + data[length:])
        assert not survives(what, lambda: use(open_index(folder))) or path.read_bytes() == data, what


def rewritten(folder: Path, meta: Any, columns: dict[str, NDArray[Any]]) -> None:
    """An index as somebody would write it who knows its digests."""
    lengths = {name: len(column) for name, column in columns.items()}
    write_table(folder / INDEX_FILE, meta, lengths, lambda name: iter([columns[name]]))


def columns_of(index: Index) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(getattr(index, name)).copy() for name in COLUMNS}


def test_what_an_index_says_of_itself(folder: Path) -> None:
    columns, meta = columns_of(open_index(folder)), read_header(folder / INDEX_FILE).meta
    del meta["columns"]
    refused = 0
    for what, value in edits(meta):
        if isinstance(value, dict):
            rewritten(folder, value, columns)
            refused += not survives(what, lambda: open_index(folder))
            survives(what, lambda: verify_folder(folder))
    assert refused > 80
    rewritten(folder, meta | {"classes": [1, 2]}, columns)
    with pytest.raises(CorruptError, match=r"is damaged \(classes\.0: Input should be a valid string\); run"):
        open_index(folder)


@pytest.mark.parametrize("name", [MANIFEST_FILE, ".parts/plan.json", ".parts/train-000000.json"])
def test_records_of_shards(folder: Path, source: Path, name: str) -> None:
    path = folder / name
    value = json.loads(path.read_text())
    texts = [(what, json.dumps(other).encode()) for what, other in edits(value)]
    for what, text in [*texts[::11], ("many levels", DEEP), ("no UTF-8", b"\xff")]:
        if name != MANIFEST_FILE:
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
        path.write_bytes(text)
        survives(f"{what}: verify", lambda: verify_folder(folder))
        survives(f"{what}: index", lambda: build_index(folder))
        survives(f"{what}: shards", lambda: make_shards(source, folder.parent, ShardsConfig(per_shard=2, workers=1)))
    path.write_text(json.dumps(value | ({"counts": None} if name == MANIFEST_FILE else {"source": 1})))
    message = {
        MANIFEST_FILE: r"manifest\.json is damaged \(counts: Input should be .*sets it aside",
        ".parts/plan.json": r"holds shards of something else \(source is 1 there, .*; take another OUT, or remove",
    }.get(name)
    if message:
        with pytest.raises(DataError, match=message):
            make_shards(source, folder.parent, ShardsConfig(per_shard=2, workers=1))


def test_a_list_of_what_was_left_out(tmp_path: Path) -> None:
    write_members(tmp_path / "a.tar", [("a.jpg", JPEG)])
    line = {"path": "a.tar/b.jpg", "reason": "why", "digest": "0123456789abcdef"}
    for what, value in edits(line):
        (tmp_path / QUARANTINE_FILE).write_text(json.dumps(value) + "\n")
        if not survives(what, lambda: build_index(tmp_path)):
            with pytest.raises(CorruptError, match=r"no list of bowstore's, or a damaged one \(.*\); move it away"):
                build_index(tmp_path)
        (tmp_path / QUARANTINE_FILE).unlink()
    for data in (DEEP, b"\xff\n", b"\n\n"):
        (tmp_path / QUARANTINE_FILE).write_bytes(data)
        with pytest.raises(CorruptError, match="move it away and run `bowstore index"):
            build_index(tmp_path)
