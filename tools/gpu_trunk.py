"""The frozen trunk, up to a layer, in every precision and memory layout of a GPU or a processor."""

from functools import partial
from typing import Any

import torch

from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.benchmarks.rounds import Way, interleaved
from bowstore.environment import cores, device_name
from bowstore.models.compiled import CannotCompileError
from bowstore.models.opened import open_network
from bowstore.words.encode.teacher import Precision, freeze_teacher


def bench_trunk(
    arch: str, layer: str, *, size: int, batch: int, rounds: int, device: torch.device, compiled: bool = False
) -> BenchResult:
    """Images/s of each way, and how far its maps are from those of float32, as shares of the largest value.

    Args:
        arch: of the trunk, with random weights.
        layer: the deepest that is run.
        size: side of the images, pixels.
        batch: images.
        rounds: interleaved, after one to warm up.
        device: where it runs.
        compiled: whether to time both precisions compiled, too, which takes up to a minute each to compile; a failure
            becomes a note.
    """
    images_BCHW = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

    def teacher(precision: Precision) -> Any:
        return freeze_teacher(open_network(arch, size=size), [layer], device, size=size, precision=precision)

    exact, half, contiguous = teacher("float32"), teacher("bfloat16"), teacher("float32")
    contiguous.backbone.to(memory_format=torch.contiguous_format)
    images_NCHW = images_BCHW.contiguous()
    ways: dict[str, Way] = {
        "float32": lambda: exact.maps(images_BCHW),
        "float32, contiguous": lambda: contiguous.maps(images_NCHW),
        "bfloat16": lambda: half.maps(images_BCHW),
    }
    if device.type == "cuda":
        ways["TF32"] = lambda: _tf32(exact, images_BCHW, layer)
    notes = []
    for name, plain in (("bfloat16", half), ("float32", exact)) if compiled else ():
        try:
            ways[f"{name}, compiled"] = partial(plain.compiled_for(batch).maps, images_BCHW)
        except CannotCompileError as error:
            notes.append(f"{name}, compiled: {error}")
    seconds = interleaved("bench trunk", ways, rounds, device)
    (reference,) = ways["float32"]().values()
    figures = {}
    for name, way in ways.items():
        (found,) = way().values()
        figures[f"error_{name.replace(', ', '_').lower()}"] = float(
            (found - reference).abs().max() / reference.abs().max()
        )
    return BenchResult(
        protocol="bench/trunk",
        device=f"{device_name(device)}, {cores()} cores",
        inputs={},
        settings={"arch": arch, "layer": layer, "size": size, "batch": batch},
        unit="images",
        timings=[Timing(name, [batch / spent for spent in values]) for name, values in seconds.items()],
        figures=figures,
        notes=notes,
    )


@torch.no_grad()
def _tf32(teacher: Any, images_BCHW: torch.Tensor, layer: str) -> dict[str, torch.Tensor]:
    convolution: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, convolution.fp32_precision = convolution.fp32_precision, "tf32"
    try:
        maps: dict[str, torch.Tensor] = teacher.backbone.feature_maps(images_BCHW, [layer])
        return maps
    finally:
        convolution.fp32_precision = before
