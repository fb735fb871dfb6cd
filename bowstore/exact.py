"""Arithmetic that no setting of the caller's changes: words are kept for good, and scores are compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Full float32 products inside the block: no TF32, no autocast, the same convolution algorithm every time.

    Words and features must not depend on tensor cores' rounding or on the caller's settings.
    """
    cudnn: Any = torch.backends.cudnn
    places = ((torch.backends.cuda.matmul, "fp32_precision", "ieee"), (cudnn.conv, "fp32_precision", "ieee"),
              (cudnn, "deterministic", True), (cudnn, "benchmark", False))  # fmt: skip
    before = [getattr(place, name) for place, name, _ in places]
    try:
        for place, name, value in places:
            setattr(place, name, value)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for (place, name, _), value in zip(places, before, strict=True):
            setattr(place, name, value)


@contextmanager
def cpu_threads(device: torch.device, threads: int) -> Iterator[None]:
    """On a CPU so many threads share an operation inside the block: how it is cut up for them decides its rounding."""
    if device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
