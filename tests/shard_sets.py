"""Small images and shards that tests are made of."""

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bowstore.data.index import Index
from bowstore.words.store.layer import LayerSpec
from bowstore.words.store.nearest import NearestSearch
from bowstore.words.store.statistics import word_statistics
from bowstore.words.store.writer import StoreWriter, create_store

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def real_data(name: str) -> Path:
    """A real data set beside the checkout, or a skip that says so."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"real images are absent: {name}")
    return path


def encode_jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def textured_image(number: int, height: int, width: int) -> np.ndarray:
    """A smooth colour image that differs by number, its hue by number modulo 4; JPEG changes it little."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin((number % 7 + 1) * x / 9 + c) + np.cos((number % 5 + 1) * y / 7 - c) for c in range(3)]
    colours = [(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60)]  # four classes that can be learned
    base = np.array(colours[number % 4]) + (37 * number) % 50
    return np.clip(0.5 * base + 40 * np.stack(waves, -1) + 64, 0, 255).astype(np.uint8)


def write_tar(path: Path, samples: Sequence[tuple[str, bytes, int | None]]) -> None:
    """Plain USTAR tar of (key, JPEG bytes, label)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, data, label in samples:
            members = [("jpg", data)] + ([("cls", str(label).encode())] if label is not None else [])
            for extension, content in members:
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


ShardMaker = Callable[..., Index]


def write_store(path: Path, index: Index, *, words: int = 12, grid: int = 4, seed: int = 0) -> Path:
    """A complete store of one layer whose words follow the image's class, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    maps = generator.integers(0, words, (len(index), grid, grid))
    own = index.label[:, None, None] % words
    maps = np.where(generator.random(maps.shape) < 0.7, own, maps).astype(np.uint16)
    return write_words(
        path,
        maps,
        words=words,
        fingerprint=index.fingerprint,
        key_hash_N=np.asarray(index.key_hash),
        image_digest_N=np.asarray(index.digest),
    )


def write_words(
    path: Path,
    maps: np.ndarray,
    *,
    words: int = 12,
    fingerprint: str = "f" * 32,
    key_hash_N: np.ndarray | None = None,
    image_digest_N: np.ndarray | None = None,
) -> Path:
    """A complete store of one layer with the given words, uint16 (N, h, w)."""
    keys = np.arange(1, len(maps) + 1, dtype=np.uint64) if key_hash_N is None else key_hash_N
    digests = keys if image_digest_N is None else image_digest_N
    writer = create_store(path, fingerprint=fingerprint, key_hash_N=keys, image_digest_N=digests)
    teacher = {"arch": "wrn-10-1", "layer": "block3", "weights_sha256": "0", "name": "t"}
    view = {"size": 16, "resize": None, "squash": False}
    spec = LayerSpec(teacher=teacher, view=view, vocabulary={}, num_words=words, grid=maps.shape[1:], channels=8)
    fill_layer(writer, "block3", spec, maps)
    return path


def fill_layer(writer: StoreWriter, name: str, spec: LayerSpec, maps: np.ndarray) -> None:
    """Add a layer with a vocabulary of zeros and the given words, uint16 (N, h, w), and complete it."""
    layer = writer.add_layer(name, spec, np.zeros((spec.num_words, spec.channels), np.float32))
    for chunk in range(layer.chunks):
        writer.write_chunk(name, chunk, maps[layer.rows(chunk)])
    writer.mark_complete(name, word_statistics([maps], spec.num_words), NearestSearch(spec.num_words).result())
