"""The photographs that a GPU check decodes, loads and encodes: a user's, or made-up ones; as files and as shards."""

import fcntl
import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gpu_process import Check
from PIL import Image

from bowstore.data.config import ShardsConfig
from bowstore.data.index import Index, open_index
from bowstore.data.shards import make_shards
from bowstore.data.table import INDEX_FILE

_ENDINGS = (".jpg", ".jpeg")


def photographs(check: Check) -> Index:
    """Shards of at least as many photographs as a few batches take; few are taken several times.

    They lie in the scratch folder and are found there by the next section.
    """
    source = check.photographs or check.data
    least = check.size(1024, 1024, 24)
    identity = hashlib.sha256(f"{source and source.resolve()} {least} {check.toy}".encode()).hexdigest()[:12]
    folder = check.scratch / f"photographs-{identity}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:  # in a dry run two sections run at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "shards/train" / INDEX_FILE).exists():  # written last
            found = list(_jpegs(source)) if source else list(_made_up(check))
            images = folder / "images/train/all"
            images.mkdir(parents=True, exist_ok=True)
            for number in range(max(least, len(found))):
                (images / f"{number:05d}.jpg").write_bytes(found[number % len(found)])
            make_shards(
                folder / "images", folder / "shards", ShardsConfig(per_shard=512, workers=check.size(None, None, 1))
            )
    return open_index(folder / "shards/train")


def _jpegs(source: Path) -> Iterator[bytes]:
    """The JPEGs of a folder or of a tar."""
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in _ENDINGS)
        yield from (path.read_bytes() for path in files)
        return
    with tarfile.open(source) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.lower().endswith(_ENDINGS) else None
            if file:
                yield file.read()


def _made_up(check: Check) -> Iterator[bytes]:
    """JPEGs of the size, weight and chroma (4:2:0) of ImageNet's, of noise on every scale."""
    height, width = check.size((375, 500), (375, 500), (72, 96))
    for number in range(check.size(256, 256, 24)):
        yield made_up_jpeg(number, height, width)


def made_up_jpeg(number: int, height: int, width: int) -> bytes:
    """A JPEG with chroma at half the resolution, whose colours change from pixel to pixel as photographs' do."""
    draw = np.random.default_rng(number)
    pixels = np.zeros((height, width, 3), np.float32)
    for cells in (2, 6, 20, 64):
        coarse = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) / cells**0.5
    pixels += draw.normal(0, 12, (height, width, 1)).astype(np.float32)
    low, high = pixels.min(), pixels.max()
    buffer = io.BytesIO()
    image = Image.fromarray(((pixels - low) / (high - low) * 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=92, subsampling=2)
    return buffer.getvalue()
