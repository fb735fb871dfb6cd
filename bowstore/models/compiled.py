"""Frozen networks compiled ahead by torch's inductor: weights become constants, batch norm goes into convolutions.

A network is traced once as it runs on images of one size (hooks and early ends are plain Python and leave no trace),
and compiled once, on the calling thread. The result is a plain function of a batch: no guards, no recompilation, no
state, so that any number of threads can call it at once and share its weights. On a CPU it is one C++ function, which
releases Python's lock.

Legend: B batch, C channels, H W pixels.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from bowstore.config import Compile
from bowstore.exact import cpu_threads
from bowstore.models.backbone import Backbone
from bowstore.models.memory import FROZEN_FORMAT
from bowstore.models.taps import without_data
from bowstore.progress import say
from bowstore.torchrun import ranks

EAGER, FROZEN = "eager", "inductor freezing"
Use = Callable[[Backbone, Tensor], dict[str, Tensor]]

# `auto` decides by the work alone, never by the machine or by how much is left to do: all processes of a job, and those
# that resume it, must decide alike. A core does 50 to 100 GFLOP/s; compiling takes 10 to 50 s.
_CORE_FLOPS = 60e9
_WORTH_SECONDS = 1000.0
_TOLERANCE = 1e-4  # of the largest value; through 50 layers float32 rounds 3e-6 of it away


class CannotCompileError(Exception):
    """A network, or any network on this machine, cannot be compiled; says why in a line."""


@dataclass(frozen=True)
class Compiled:
    """A compiled use of a network, for any thread.

    Attributes:
        batch: images that it takes; fewer are filled up, so that an image's result does not depend on their number.
        names: of the results.
        graph: takes images (B, C, H, W) and gives the results.
    """

    batch: int
    names: tuple[str, ...]
    graph: Callable[[Tensor], Any]

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Results by name, of at most `batch` images."""
        count = len(images_BCHW)
        assert count <= self.batch, f"{count} images, compiled for {self.batch}"
        if count < self.batch:
            shape = (self.batch, *images_BCHW.shape[1:])
            whole = images_BCHW.new_zeros(shape).to(memory_format=FROZEN_FORMAT)
            whole[:count] = images_BCHW
        else:
            whole = images_BCHW.contiguous(memory_format=FROZEN_FORMAT)
        return {name: result[:count] for name, result in zip(self.names, self.graph(whole), strict=True)}


def way_of(setting: Compile, backbone: Backbone, use: Use, *, images: int, size: int, device: torch.device) -> str:
    """Whether a job's network is compiled: `EAGER` or `FROZEN`, by the setting and the work of the whole job.

    Args:
        setting: true, false or auto; auto compiles on a CPU where so many images pay for it and there is a compiler.
        backbone: the network.
        use: what is done with images.
        images: of the whole job.
        size: side of the square input, pixels.
        device: where it runs.
    """
    if setting != "auto":
        return FROZEN if setting else EAGER
    if device.type != "cpu":
        return EAGER
    try:
        if images * flops(backbone, use, size) < _WORTH_SECONDS * _CORE_FLOPS:
            return EAGER
    except OSError as error:  # the counter imports inductor
        tell_fallback(_unwritable(error))
        return EAGER
    if problem := compiler_problem(device):
        tell_fallback(problem)
        return EAGER
    return FROZEN


def tell_fallback(problem: str) -> None:
    """Say, once per job, that the network runs without being compiled."""
    if ranks().first:
        say(f"the network is run as it is, not compiled: {problem}")


def flops(backbone: Backbone, use: Use, size: int) -> int:
    """Floating-point operations of an image, twice the multiplications."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        use(without_data(backbone).eval(), torch.zeros(1, 3, size, size, device="meta"))
    return int(counter.get_total_flops())


def compiler_problem(device: torch.device) -> str | None:
    """Why nothing can be compiled on this machine; None where there is a C++ compiler, or none is needed."""
    if device.type != "cpu":
        return None
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler  # takes seconds, and makes a folder, which may fail
    except OSError as error:
        return _unwritable(error)
    try:
        get_cpp_compiler()
    except (RuntimeError, OSError):
        return "there is no C++ compiler that works; install g++, or set CXX to one"
    return None


def _unwritable(error: OSError) -> str:
    return (
        f"{error.filename} cannot hold what is compiled ({error.strerror}); set TORCHINDUCTOR_CACHE_DIR to a folder "
        "that can be written"
    )


def compile_frozen(
    backbone: Backbone,
    use: Use,
    *,
    batch: int,
    size: int,
    device: torch.device,
    threads: int = 1,
    tolerance: float = _TOLERANCE,
) -> Compiled:
    """Compile what is done with batches of images; takes 10 to 50 s. For the main thread.

    Args:
        backbone: the network, frozen, in eval mode, on its device; may be dropped afterwards.
        use: what is done with images; results are tensors (B, ...).
        batch: images of a batch.
        size: side of the square input, pixels.
        device: where it runs.
        threads: on a CPU, that share an operation; its callers must have as many.
        tolerance: by how much results on noise may differ from the network's own, as a share of the largest value.

    Raises:
        CannotCompileError: no compiler, or a network that inductor cannot compile, or compiles wrongly.
    """
    if problem := compiler_problem(device):
        raise CannotCompileError(problem)
    generator = torch.Generator().manual_seed(0)
    noise_BCHW = torch.randn(batch, 3, size, size, generator=generator)
    images_BCHW = noise_BCHW.to(device).contiguous(memory_format=FROZEN_FORMAT)
    with torch.no_grad(), _quiet(), cpu_threads(device, threads):  # which weights are packed for
        expected = use(backbone, images_BCHW)
        try:
            graph = _graph(lambda images: tuple(use(backbone, images).values()), images_BCHW, device, threads)
            compiled = Compiled(batch, tuple(expected), graph)
            found = compiled(images_BCHW)
        except Exception as error:  # of the tracer, the compiler, the loader of what it made
            raise CannotCompileError(f"inductor cannot compile {backbone.arch}: {_one_line(error)}") from error
    for name, map_B in expected.items():
        _check_equal(f"{name!r} of {backbone.arch}", map_B, found[name], tolerance)
    return compiled


def _graph(
    run: Callable[[Tensor], tuple[Tensor, ...]], images_BCHW: Tensor, device: torch.device, threads: int
) -> Callable[[Tensor], Any]:
    traced = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(images_BCHW)
    options: dict[str, Any] = {"freezing": True}
    if device.type == "cpu":
        # One unit of C++ that holds no lock of Python's; loops without OpenMP where one thread is asked for.
        options |= {"cpp_wrapper": True, "cpp.threads": threads, "compile_threads": 1}
    graph: Callable[[Tensor], Any] = torch._inductor.compile(traced, [images_BCHW], options=options)
    return graph


def _one_line(error: Exception) -> str:
    """An error in one line: its own first line, and the first error in the compiler's output."""
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    output = others[others.index("Output:") + 1 :] if "Output:" in others else []
    reason = next((line for line in output if "error" in line), "".join(output[-1:]))
    return f"{first[:200]} ({reason[:300]})" if reason else first[:200]


def _check_equal(what: str, expected_B: Tensor, found_B: Tensor, tolerance: float) -> None:
    if expected_B.shape != found_B.shape:
        raise CannotCompileError(f"inductor makes {tuple(found_B.shape)} of {what}, not {tuple(expected_B.shape)}")
    difference = float((expected_B - found_B).abs().max() / expected_B.abs().max().clamp(min=1e-30))
    if not difference <= tolerance:
        raise CannotCompileError(f"what inductor makes of {what} is off by {difference:.2g} of its largest value")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warning that a machine with CUDA's compiler has no GPU: on a CPU none is wanted."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
