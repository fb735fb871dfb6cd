"""Made-up shards and words, for benchmarks of what does not depend on the images."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from bowstore.data.index import Index, build_index
from bowstore.words.store.layer import LayerSpec
from bowstore.words.store.nearest import NearestSearch
from bowstore.words.store.statistics import word_statistics
from bowstore.words.store.writer import create_store

LAYER = "conv4"


def made_up_index(folder: Path, images: int, side: int = 16) -> Index:
    """Indexed shards of this many JPEGs of one colour, `side` pixels wide and high, with labels of ten classes."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (90, 120, 150)).save(buffer, "JPEG")
    data = buffer.getvalue()
    with tarfile.open(folder / "made-up-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(images):
            for extension, content in (("jpg", data), ("cls", str(number % 10).encode())):
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return build_index(folder, workers=1)


def made_up_store(path: Path, index: Index, *, num_words: int, grid: int, channels: int = 1) -> Path:
    """A complete store of one layer of random words, as unevenly frequent as in real stores (Zipf)."""
    draw = np.random.default_rng(0)
    share_K = 1 / np.arange(10, num_words + 10)
    maps = draw.choice(num_words, (len(index), grid, grid), p=share_K / share_K.sum()).astype(np.uint16)
    hashes, digests = np.asarray(index.key_hash), np.asarray(index.digest)
    writer = create_store(path, fingerprint=index.fingerprint, key_hash_N=hashes, image_digest_N=digests)
    teacher = {"arch": "made up", "layer": LAYER, "weights_sha256": "0", "name": "made up"}
    spec = LayerSpec(teacher=teacher, view={}, vocabulary={}, num_words=num_words, grid=(grid, grid), channels=channels)
    layer = writer.add_layer(LAYER, spec, np.zeros((num_words, channels), np.float32))
    for chunk in range(layer.chunks):
        writer.write_chunk(LAYER, chunk, maps[layer.rows(chunk)])
    writer.mark_complete(LAYER, word_statistics([maps], num_words), NearestSearch(num_words).result())
    return path
