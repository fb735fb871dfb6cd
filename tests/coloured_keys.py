"""Images and word stores in which a sample's colour and its words both tell its key.

A key's hash gives twelve bits: three levels from 0 to 15. They are the red, green and blue of its plain image, and
the digits of its three words. So the target of a picture can be read off its pixels, CutMix included, and compared
with the bag that a training run would use, without asking the plan, the index or the store.
"""

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from shard_sets import encode_jpeg, fill_layer

from bowstore.config import ViewConfig, validate
from bowstore.train.config import TrainConfig
from bowstore.words.store.layer import LayerSpec
from bowstore.words.store.writer import create_store

LEVELS, CHANNELS = 16, 3
WORDS = LEVELS * CHANNELS
FILE_BYTES = 1536  # every image is padded to this, so that tars of the same keys can differ in content alone


def code(key: str) -> tuple[int, int, int]:
    """The three levels of a key."""
    bits = xxhash.xxh3_64_intdigest(key.encode())
    return bits & 15, bits >> 4 & 15, bits >> 8 & 15


def distinct_keys(count: int, first: int = 0) -> list[str]:
    """Keys of which no two have the same colour."""
    keys: dict[tuple[int, int, int], str] = {}
    number = first
    while len(keys) < count:
        keys.setdefault(code(f"c{number % 4}/{number:06d}"), f"c{number % 4}/{number:06d}")
        number += 1
    return list(keys.values())


def coloured_image(key: str) -> bytes:
    """A plain JPEG in the key's colour; its height and width differ from key to key, its size in bytes does not."""
    bits = xxhash.xxh3_64_intdigest(key.encode()) >> 12
    height, width = 20 + bits % 13, 20 + bits % 17
    data = encode_jpeg(np.full((height, width, CHANNELS), np.array(code(key)) * 16 + 8, np.uint8))
    assert len(data) <= FILE_BYTES
    return data.ljust(FILE_BYTES, b"\0")


def write_coloured_tars(
    root: Path, keys: Sequence[str], *, per_shard: int, name: str = "train", image: Callable[[str], bytes] | None = None
) -> Path:
    """Tars of the keys, in order; `image` gives the bytes of a key, by default those of its own colour."""
    root.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(keys), per_shard)):
        with tarfile.open(root / f"{name}-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for key in keys[start : start + per_shard]:
                info = tarfile.TarInfo(f"{key}.jpg")
                info.size = FILE_BYTES
                archive.addfile(info, io.BytesIO((image or coloured_image)(key)))
    return root


def words_of(keys: Sequence[str]) -> np.ndarray:
    """Word maps (N, 1, 3), uint16: one word a channel."""
    return (np.array([code(key) for key in keys]) + LEVELS * np.arange(CHANNELS)).astype(np.uint16)[:, None]


def write_coloured_store(
    path: Path, keys: Sequence[str], *, fingerprint: str = "of another data set", words: np.ndarray | None = None
) -> Path:
    """A complete store of one layer; `words` (N, 1, 3) are by default those of the keys."""
    words = words_of(keys) if words is None else words
    hashes = np.array([xxhash.xxh3_64_intdigest(key.encode()) for key in keys], np.uint64)
    images = np.array([xxhash.xxh3_64_intdigest(coloured_image(key)) for key in keys], np.uint64)
    writer = create_store(path, fingerprint=fingerprint, key_hash_N=hashes, image_digest_N=images)
    teacher = {"arch": "wrn-10-1", "layer": "block3", "weights_sha256": "0", "name": "t"}
    spec = LayerSpec(teacher=teacher, view={}, vocabulary={}, num_words=WORDS, grid=(1, CHANNELS), channels=8)
    fill_layer(writer, "block3", spec, words)
    return path


def training_config(shards: Path, store: Path, **changes: Any) -> TrainConfig:
    """A small words run without jitter, so that colours survive; CutMix, crops and flips are on."""
    values: dict[str, Any] = {
        "name": "run",
        "task": "words",
        "shards": str(shards),
        "view": {"size": 16, "resize": None, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "grey": 0},
        "model": {"arch": "wrn-10-1", "strides": [2, 2, 1]},
        "words": {"store": str(store), "layer": "block3"},
        "optim": {"batch": 16, "epochs": 2, "lr": 0.05},
        "runtime": {"device": "cpu", "threads": 1, "log_every_steps": 1, "checkpoint_every_steps": 5},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return validate(TrainConfig, values, "test")


def colours(images_BCHW: torch.Tensor, view: ViewConfig) -> np.ndarray:
    """Levels (B, H, W, 3) of every pixel of normalised images."""
    pixels = images_BCHW.permute(0, 2, 3, 1).double().numpy() * np.array(view.std) + np.array(view.mean)
    levels = (255 * pixels - 8) / 16
    assert np.abs(levels - np.rint(levels)).max() < 0.35, "not the plain colours that were written"
    return np.rint(levels).astype(int)


def targets_in_pictures(images_BCHW: torch.Tensor, view: ViewConfig) -> np.ndarray:
    """Bags (B, K) as the pixels tell them: each pixel counts for the three words of its colour."""
    words = colours(images_BCHW, view).reshape(len(images_BCHW), -1, CHANNELS) + LEVELS * np.arange(CHANNELS)
    return np.stack([np.bincount(w.ravel(), minlength=WORDS) / w.size for w in words])


def dense(bag: Any) -> np.ndarray:
    """A sparse bag as (B, K)."""
    result = np.zeros((len(bag.words_BM), WORDS))
    np.add.at(result, (np.arange(len(result))[:, None], bag.words_BM.numpy()), bag.weights_BM.double().numpy())
    return result


def misaligned(images_BCHW: torch.Tensor, bag: Any, view: ViewConfig) -> list[int]:
    """Places in the batch at which the bag is not what the picture shows."""
    difference_B = np.abs(targets_in_pictures(images_BCHW, view) - dense(bag)).max(axis=1)
    return [int(place) for place in np.flatnonzero(difference_B > 1e-5)]
