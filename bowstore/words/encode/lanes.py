"""Where the work on batches runs: threads on a CPU, threads and streams on a GPU; and how results come back.

On a CPU every worker runs whole batches on one thread. That is as fast as spreading each operation over all cores, and
its results do not depend on the number of cores: how a convolution is cut up for threads changes its rounding, and
words are kept for good.

On a GPU two workers launch. The trunks of all batches run on one stream, in the order in which they are launched, so
that the next reuses the memory of the last. The work on the maps runs on each worker's own stream, beside the trunk of
the next batch:

    the caller's stream   copy 1, copy 2,  ..., each when it is decoded
    the trunk's stream    trunk 1,        trunk 2,        trunk 3, ...
    a worker's stream                     words 1,        ...
    another worker's                                      words 2, ...

At each change of streams one waits for an event of the other, on the GPU. A worker waits for nothing but its own
results. Images and maps are made on one stream and read on another, which the allocator is told (`record_stream`), so
that their memory is not used again too early. All passes of a process take the same streams, because memory is kept
for the stream that it was first taken for. (What the overlap gains has not been measured.)

Legend: B batch, C channels, H W pixels.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.environment import cores_per_rank

T = TypeVar("T")
Maps = Mapping[str, Tensor]
GPU_WORKERS = 2
_FIRST = -1  # priority: words are short, and a worker that has them launches the trunk after the next


def compute_workers(device: torch.device) -> int:
    """Threads that run the teacher."""
    return GPU_WORKERS if device.type == "cuda" else cores_per_rank()


def workers(count: int) -> ThreadPoolExecutor:
    """Threads that run the teacher, each with as many threads an operation as are set (`cpu_threads`).

    A new thread asks for that number at its first parallel loop, which comes after its first convolution: that one
    would be spread over all cores, and round as it does there. (Compiled networks have no such loop at all.)
    """
    return ThreadPoolExecutor(count, "teacher", initializer=torch.get_num_threads)


def to_host(*tensors: Tensor) -> list[NDArray[Any]]:
    """Arrays of tensors of one device; from a GPU through pinned memory, with one wait for the current stream."""
    if not tensors[0].is_cuda:  # the array is the tensor's own memory
        return [tensor.numpy() for tensor in tensors]
    arrived = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # which PyTorch pins
    _event(torch.cuda.current_stream(tensors[0].device)).synchronize()
    return [tensor.numpy() for tensor in arrived]


class Done(NamedTuple, Generic[T]):
    """A batch that came through `GpuLanes`.

    Attributes:
        result: what `use` made of the maps.
        maps: the maps.
        finite: False if the maps may hold NaN or infinity.
        trunk_seconds: between the trunk's first and last operation on the GPU.
        use_seconds: the same for the work on the maps.
    """

    result: T
    maps: Maps
    finite: bool
    trunk_seconds: float
    use_seconds: float


class GpuLanes:
    """The streams of a pass on a GPU, for any number of workers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._numbers = count()
        self._trunk = _stream(device, next(self._numbers))
        self._launching = threading.Lock()
        self._own = threading.local()

    def mark(self) -> torch.cuda.Event:
        """An event after everything that the calling thread has put on its current stream."""
        return _event(torch.cuda.current_stream(self._device))

    def run(
        self,
        images_BCHW: Tensor,
        ready: torch.cuda.Event,
        trunk: Callable[[Tensor], Maps],
        use: Callable[[Maps], T],
    ) -> Done[T]:
        """Take a batch through trunk and use, and wait for what is made of it.

        Args:
            images_BCHW: on the GPU, of any stream.
            ready: marked when they were whole.
            trunk: launches the network; workers launch one after the other.
            use: of the maps, which need not be finite; its result must have left the GPU, or is read by a caller that
                waits for nothing more.
        """
        # One trunk after the other: two at once would take turns at every kernel, and hold twice the memory.
        with self._launching, torch.cuda.stream(self._trunk):
            self._trunk.wait_event(ready)
            images_BCHW.record_stream(self._trunk)
            begun = _event(self._trunk)
            maps = trunk(images_BCHW)
            mapped = _event(self._trunk)
        own = self._stream_of_worker()
        with torch.cuda.stream(own):
            own.wait_event(mapped)
            for map_Bchw in maps.values():
                map_Bchw.record_stream(own)
            started = _event(own)
            # Finite values may have an infinite sum, others never a finite one; a sum takes a quarter of the time.
            sums = torch.stack([map_Bchw.sum() for map_Bchw in maps.values()])
            finite = sums.isfinite().all().to("cpu", non_blocking=True)
            # Launched before anybody knows whether the maps are finite: to ask now would wait for the trunk.
            result = use(maps)
            ended = _event(own)
            ended.synchronize()
        return Done(
            result,
            maps,
            bool(finite),
            trunk_seconds=begun.elapsed_time(mapped) / 1e3,
            use_seconds=started.elapsed_time(ended) / 1e3,
        )

    def _stream_of_worker(self) -> torch.cuda.Stream:
        if not hasattr(self._own, "stream"):  # numbers, not threads, name streams: the next pass has other threads
            self._own.stream = _stream(self._device, next(self._numbers), priority=_FIRST)
        stream: torch.cuda.Stream = self._own.stream
        return stream


@cache
def _stream(device: torch.device, number: int, priority: int = 0) -> torch.cuda.Stream:
    cuda: Any = torch.cuda
    stream: torch.cuda.Stream = cuda.Stream(device, priority=priority)
    return stream


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event after everything on a stream; waiting for it sleeps, as the cores have images to decode."""
    cuda: Any = torch.cuda
    event: torch.cuda.Event = cuda.Event(enable_timing=True, blocking=True)
    event.record(stream)
    return event
