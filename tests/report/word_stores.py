"""Small real word stores, and what is in them the plain way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_sets import fill_layer

from bowstore.words.encode.config import EncodeConfig
from bowstore.words.encode.encode import encode
from bowstore.words.store import layer as layer_module
from bowstore.words.store.layer import LayerSpec
from bowstore.words.store.store import Store, open_store
from bowstore.words.store.writer import StoreWriter

K = {"block1": 10, "block3": 24}


def small_chunks(patch: pytest.MonkeyPatch) -> None:
    """Chunks of 20 rows, so that a few images make several."""
    patch.setattr(layer_module, "MIN_CHUNK_BYTES", 1)
    patch.setattr(layer_module, "CHUNK_STEP_ROWS", 20)


def make_store(store: Path, shards: Path, teacher: Path, **values: Any) -> Path:
    settings: dict[str, Any] = {
        "layers": tuple(K), "num_words": tuple(K.values()), "iterations": 3, "batch": 8, "threads": 1, "device": "cpu"
    }  # fmt: skip
    torch.set_num_threads(1)
    encode(EncodeConfig(teacher=teacher, **{**settings, **values}), shards=shards, store=store)
    return store


def add_layer(store: Path, name: str, words: np.ndarray) -> None:
    """Add a layer of 40 words like block3, without k-means and without nearest images."""
    attributes = open_store(store).layer("block3").attributes
    spec = LayerSpec(attributes["teacher"], attributes["view"], {}, num_words=40, grid=(4, 4), channels=64)
    fill_layer(StoreWriter(store), name, spec, words)


def held(store: Store, layer: str) -> np.ndarray:
    """Which images hold which words, bool (N, K), the plain way."""
    words = store.load_words(layer).reshape(len(store), -1)
    return np.stack([(words == k).any(axis=1) for k in range(store.layer(layer).num_words)], axis=1)
