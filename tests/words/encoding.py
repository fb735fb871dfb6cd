"""Encoding of the small set of `teacher_sets`, here or in a process that may die."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import faiss
import torch

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
    paths = {name: values.pop(name) for name in ("shards", "store") if name in values}
    return encode(EncodeConfig(**{**SETTINGS, **values}), **paths)


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
    run_encode(**values)


def die_at_rename(number: int) -> None:
    """SIGKILL this process at its n-th rename."""
    plain, calls = os.replace, []

    def deadly(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(source, target)

    os.replace = deadly  # type: ignore[assignment]


def slow_down(seconds: float) -> None:
    """Make every batch of the teacher take longer, so that several processes find something to do."""
    from bowstore.words.encode.teacher import Teacher

    plain = Teacher.maps

    def slow(self: Teacher, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        time.sleep(seconds)
        return plain(self, images_BCHW)

    Teacher.maps = slow  # type: ignore[method-assign]


def encode_slowly(values: dict[str, Any], out: Path | None = None) -> None:
    """Encode slowly, a batch a chunk; write the number of images that this process encoded to `out`.

    A process claims some batches ahead: there have to be more than that for others to get any.
    """
    slow_down(0.2)
    layer_module.MIN_CHUNK_BYTES, layer_module.CHUNK_STEP_ROWS = 1, SETTINGS["batch"]
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    report = run_encode(**values)
    if out:
        out.write_text(str(report.images_here))
