"""Small images and shards that tests are made of."""

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bowstore.data.index import Index

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
    """A smooth colour image that differs by number; JPEG changes it little."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin((number % 7 + 1) * x / 9 + c) + np.cos((number % 5 + 1) * y / 7 - c) for c in range(3)]
    base = np.array([(37 * number) % 256, (91 * number) % 256, (53 * number) % 256])
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
