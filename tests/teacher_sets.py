"""Shards of coarse noise and teachers without training, for tests of encoding."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bowstore.data.index import build_index
from bowstore.models.opened import open_network
from bowstore.models.record import NetworkRecord
from bowstore.models.saved import network_of, save_backbone
from bowstore.words.encode.teacher import Teacher, freeze_teacher

IMAGES = 96


def write_shards(folder: Path, images: int, *, seed: int = 0, prefix: str = "img") -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for shard, rows in enumerate(np.array_split(np.arange(images), 3)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in rows:
                coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
                buffer = io.BytesIO()
                coarse.resize((20, 18)).save(buffer, "png")
                member = tarfile.TarInfo(f"{prefix}{row:04d}.png")
                member.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(member, buffer)
    build_index(folder)
    return folder


def write_teacher(path: Path, *, seed: int = 0, **values: object) -> Path:
    of_run = {
        "name": "tiny-rotnet",
        "task": "rotation",
        "seed": seed,
        "view": {"size": 16, "resize": 16, "cutmix": False},
        "model": {"arch": "wrn-10-1"},
    }
    network = network_of({**of_run, **values}, "test")
    save_backbone(path, network.fresh(), network)
    return path


def load_teacher(
    spec: str | Path | NetworkRecord,
    layers: Sequence[str],
    device: torch.device,
    *,
    weights: Path | None = None,
    size: int | None = None,
    resize: int | None = None,
    seed: int = 0,
) -> Teacher:
    opened = open_network(spec, weights=weights, size=size, seed=seed)
    return freeze_teacher(opened, layers, device, size=size, resize=resize)
