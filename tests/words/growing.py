"""Stores of two layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zarr

from bowstore.words.encode.teacher import Teacher
from bowstore.words.store import layer as layer_module
from bowstore.words.store.layer import Layer

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


def resealed(store: Path) -> Path:
    """A store whose attributes were changed, with the digests over all that belong to them."""
    group = zarr.open_group(store, mode="r+")
    for name in group.attrs["layers"]:
        digest = Layer(store, zarr.open_group(store, mode="r"), name, group.attrs["dataset"]["images"]).content_digest()
        group[name].update_attributes({"content_digest": digest})
    return store
