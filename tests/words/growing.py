"""Stores that grow, and what goes wrong with them on the way."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from encoding import run_encode

from bowstore.data.index import build_index
from bowstore.words import layer as layer_module
from bowstore.words.store_writer import StoreWriter
from bowstore.words.teacher import Teacher
from bowstore.words.verify import discard_damaged, verify

LAYERS: dict[str, Any] = {"layers": ("block2", "block3"), "num_words": (12, 24)}
NEW = 50


@contextmanager
def small_chunks_patch() -> Iterator[None]:
    """Chunks of 20 rows inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_module, "MIN_CHUNK_BYTES", 1)
        patch.setattr(layer_module, "CHUNK_STEP_ROWS", 20)
        yield


@contextmanager
def older_provenance() -> Iterator[None]:
    """Inside the block, stores record of a teacher what those of 0.1.0 did: the name of a student, and no lineage."""
    plain = Teacher.provenance

    def older(self: Teacher, layer: str) -> dict[str, Any]:
        return {**{k: v for k, v in plain(self, layer).items() if k != "lineage"}, "student": "tiny-bownet"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "provenance", older)
        yield


def interrupted_append(store: Path, teacher_file: Path, shards: Path, *, chunks: int = 0) -> None:
    """An append that ends like Ctrl-C when so many chunks are written."""
    plain, written = StoreWriter.write_chunk, []

    def failing(self: StoreWriter, layer: str, chunk: int, words: Any) -> None:
        if len(written) == chunks:
            raise KeyboardInterrupt
        written.append((layer, chunk))
        plain(self, layer, chunk, words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreWriter, "write_chunk", failing)
        with pytest.raises(KeyboardInterrupt):
            run_encode(teacher=teacher_file, shards=shards, store=store, append=True)


def damage(store: Path, layer: str, chunk: int) -> None:
    """Damage a chunk and take it back."""
    (store / f"{layer}/words/c/{chunk}/0/0").write_bytes(b"")
    assert discard_damaged(store, verify(store)) == 1


def joined(first: Path, second: Path, folder: Path) -> Path:
    """Shards of two sets in one folder."""
    folder.mkdir()
    for part in (first, second):
        for tar in part.glob("*.tar"):
            shutil.copy(tar, folder / f"{part.parent.name}-{tar.name}")
    build_index(folder)
    return folder


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
