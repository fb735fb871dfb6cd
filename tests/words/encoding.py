"""Encoding of the small set of `teacher_sets`, here or in a process that may die."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import faiss
import torch

from bowstore.errors import BowstoreError
from bowstore.words.encode.config import EncodeConfig
from bowstore.words.encode.encode import encode
from bowstore.words.encode.report import EncodeReport
from bowstore.words.store import layer as layer_module

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "layers": ("block3",), "num_words": (24,), "iterations": 3, "batch": 8, "threads": 1, "device": "cpu"
}  # fmt: skip
ROWS = 20  # of a chunk


def run_encode(**values: Any) -> EncodeReport:
    """Encode with SETTINGS and changes to them; paths and flags go to `encode`, all else is configuration."""
    report = encode_here(values)
    assert report, "rank 0 reports"
    return report


def encode_here(values: dict[str, Any]) -> EncodeReport | None:
    paths = {name: value for name, value in values.items() if name in ("shards", "store")}
    settings = {name: value for name, value in values.items() if name not in paths}
    return encode(EncodeConfig(**{**SETTINGS, **settings}), **paths)


def encode_in_process(values: dict[str, Any], renames: int | None = None, seconds: float | None = None) -> None:
    """Encode in small chunks; SIGKILL this process at its n-th rename, or after some time, if it gets there."""
    layer_module.MIN_CHUNK_BYTES, layer_module.CHUNK_STEP_ROWS = 1, ROWS
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if renames is not None:
        die_at_rename(renames)
    if seconds is not None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))  # whose default is death, as sudden as SIGKILL
    encode_here(values)


def die_at_rename(number: int) -> None:
    """SIGKILL this process at its n-th rename."""
    plain, calls = os.replace, []

    def deadly(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(source, target)

    os.replace = deadly  # type: ignore[assignment]


def encode_as_rank(
    values: dict[str, Any], victim: int | None = None, seconds: float | None = None, told: Path | None = None
) -> None:
    """Encode as one rank of a job; the victim dies after some time; what ends a rank goes to a file of its own."""
    rank = os.environ["RANK"]
    try:
        encode_in_process(values, seconds=seconds if rank == str(victim) else None)
    except BowstoreError as error:
        if told is None:
            raise
        told.with_name(f"{told.name}.{rank}").write_text(f"{type(error).__name__}: {error}")
        sys.exit(1)


def encode_slowly(values: dict[str, Any], batches: Path) -> None:
    """Encode as one rank whose every batch takes longer, and leaves a dot in a file of the rank's own."""
    from bowstore.words.encode.teacher import Teacher

    plain, file = Teacher.maps, batches.with_name(f"{batches.name}.{os.environ['RANK']}")

    def slow(self: Teacher, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        time.sleep(0.1)
        with open(file, "a") as dots:
            dots.write(".")
        return plain(self, images_BCHW)

    Teacher.maps = slow  # type: ignore[method-assign]
    encode_in_process(values)
