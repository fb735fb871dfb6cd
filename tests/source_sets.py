"""Tiny images and sources of all kinds that tests are made of, and shards read back."""

import io
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowstore.data.config import ShardsConfig
from bowstore.data.index import open_index
from bowstore.data.shards import make_shards
from bowstore.data.sources import Split, list_source


def tiny_image(number: int, kind: str = "JPEG") -> bytes:
    """A smooth image of 12 x 10 pixels whose colour tells its number."""
    pixels = np.full((10, 12, 3), (number * 37 % 256, number * 91 % 256, number * 53 % 256), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_file(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_members(path: Path, members: Sequence[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of exactly these names and bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


class Sample(NamedTuple):
    """A row of shards."""

    data: bytes
    label: int


def list_splits(source: Path, kind: str | None = None, **options: Any) -> list[Split]:
    """The splits of a source."""
    return list_source(source, kind, **options).splits


def shards_of(source: Path, out: Path, **arguments: Any) -> dict[str, dict[str, Sample]]:
    """Make shards in this process and read them back through the index: samples by key, by split."""
    reports = make_shards(source, out, ShardsConfig(workers=1, **arguments))
    found = {}
    for report in reports:
        index = open_index(report.folder)
        assert len(index) == report.written
        samples = {}
        for row in range(len(index)):
            tar = (report.folder / index.shards[index.shard[row]].name).read_bytes()
            data = tar[index.offset[row] : index.offset[row] + index.size[row]]
            samples[index.key(row)] = Sample(data, int(index.label[row]))
        assert len(samples) == len(index)
        found[report.split] = samples
    return found


def classes_of(folder: Path) -> tuple[str, ...]:
    return open_index(folder).classes


def cifar_pixels(images: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (images, 3072), dtype=np.uint8)


def python2_pickle(value: Mapping[str, Any]) -> bytes:
    """Protocol 2 as Python 2 wrote it: byte strings, and arrays by NumPy's old names."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_python2(key) + _python2(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, str | bytes):
        data = value.encode("latin1") if isinstance(value, str) else value
        return b"T" + len(data).to_bytes(4, "little") + data
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little", signed=True)
    assert isinstance(value, np.ndarray)
    rows, columns = (_python2(length) for length in value.shape)
    dtype = b"cnumpy\ndtype\n" + b"U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    begun = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return begun + b"(K\x01" + rows + columns + b"\x86" + dtype + b"\x89" + _python2(value.tobytes()) + b"tb"


def cifar10_files(seed: int = 0, images: int = 3) -> dict[str, bytes]:
    """The files of CIFAR-10 with a few images a batch; every other one as Python 3 would pickle it."""
    files = {}
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        value = {
            "batch_label": f"batch {number}",
            "labels": [(number + row) % 3 for row in range(images)],
            "data": cifar_pixels(images, seed + number),
            "filenames": [f"thing_s_{number:02d}{row:04d}.png" for row in range(images)],
        }
        files[name] = pickle.dumps(value, protocol=2) if number % 2 else python2_pickle(value)
    meta = {"num_cases_per_batch": images, "label_names": ["plane", "car", "bird"], "num_vis": 3072}
    return files | {"batches.meta": python2_pickle(meta)}


def cifar100_files(images: int = 4) -> dict[str, bytes]:
    """The files of CIFAR-100 with a few images."""
    files = {}
    for number, name in enumerate(("train", "test")):
        value = {
            "filenames": [f"{name}_s_{row:06d}.png" for row in range(images)],
            "batch_label": name,
            "fine_labels": [row % 3 for row in range(images)],
            "coarse_labels": [row % 2 for row in range(images)],
            "data": cifar_pixels(images, 50 + number),
        }
        files[name] = python2_pickle(value)
    meta = {"fine_label_names": ["apple", "bear", "clock"], "coarse_label_names": ["fruit", "mammal"]}
    return files | {"meta": python2_pickle(meta)}


def write_cifar(path: Path, folder: str, files: Mapping[str, bytes]) -> Path:
    """The archive as it is published."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
