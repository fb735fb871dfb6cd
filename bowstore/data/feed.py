"""Feeds a DALI graph from a thread that reads ahead, and hands out what it gives, in order.

Legend: B batch, C channels, H W pixels of the network input.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.tensors import TensorCPU, TensorListCPU
from torch import Tensor

from bowstore.data.dali_errors import explained, is_of_graph
from bowstore.data.reader import ImageSource
from bowstore.data.workers import prefetched
from bowstore.environment import cores_per_rank

PREFETCH = 2
T = TypeVar("T")
_INPUTS: dict[str, tuple[Any, int]] = {  # element type and dimensions of every external input
    "encoded": (types.UINT8, 1),
    "start": (types.INT32, 1),
    "shape": (types.INT32, 1),
    "mirror": (types.INT32, 0),
    "brightness": (types.FLOAT, 0),
    "contrast": (types.FLOAT, 0),
    "saturation": (types.FLOAT, 0),
    "hue": (types.FLOAT, 0),
    "in_ids": (types.INT32, 1),
    "anchors": (types.INT32, 2),
    "shapes": (types.INT32, 2),
}


def new_pipeline(batch: int, device: torch.device, threads: int | None) -> Pipeline:
    """An empty graph for batches of at most `batch`; `threads` decode, None for one a core."""
    gpu = device.type == "cuda"
    return Pipeline(
        batch_size=batch,
        num_threads=threads or cores_per_rank(),
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=PREFETCH,
        seed=0,
    )


class Feed(Generic[T]):
    """Feeds a graph from jobs that run ahead in a thread; remembers what each batch in flight was.

    Nothing is copied (`no_copy`): the graph reads the jobs' own arrays, and DALI keeps no reference to them. So they
    are kept here, from before the graph is given them until the batch that was made of them is taken, or, on a GPU,
    made: decoding may still read them from there when `Pipeline.run` returns. A pipeline that is dropped in mid-run
    stops its threads first (`Pipeline.__del__`, and an exit handler of DALI's); it owns this object by its callback.
    """

    def __init__(self, jobs: Iterable[Callable[[], tuple[T, dict[str, Any]]]], names: Sequence[str]) -> None:
        self._names = names
        self._ready = prefetched((partial(self._made, job) for job in jobs), PREFETCH)
        self._kept: deque[list[Any]] = deque()  # what the batches in flight are read from
        self._read: deque[tuple[Callable[[], bool], list[Any]]] = deque()  # the same of batches that a GPU still makes
        self.in_flight: deque[T] = deque()

    def declare(self) -> dict[str, Any]:
        """The graph's external inputs by name (call inside the pipeline's context)."""
        nodes = fn.external_source(
            source=self._next,
            num_outputs=len(self._names),
            dtype=[_INPUTS[name][0] for name in self._names],
            ndim=[_INPUTS[name][1] for name in self._names],
            batch=True,
            no_copy=True,
        )
        return dict(zip(self._names, nodes, strict=True))

    def take(self, made: Callable[[], bool] = lambda: True) -> T:
        """What the batch was that the graph has just given; `made` tells when the device is through with it."""
        self._read.append((made, self._kept.popleft()))
        while self._read and self._read[0][0]():
            self._read.popleft()
        return self.in_flight.popleft()

    def _made(self, job: Callable[[], tuple[T, dict[str, Any]]]) -> tuple[T, list[Any], list[TensorListCPU]]:
        """What a job says, its arrays, and these as DALI takes them without a look at each (in the reading thread)."""
        what, values = job()
        arrays = [values[name] for name in self._names]
        return what, arrays, [_tensors(array) for array in arrays]

    def _next(self) -> list[TensorListCPU]:
        what, arrays, tensors = next(self._ready)  # StopIteration is how DALI learns of the end
        self._kept.append(arrays)
        self.in_flight.append(what)
        return tensors


def _tensors(values: NDArray[Any] | list[NDArray[np.uint8]]) -> TensorListCPU:
    """A batch over the memory of an array (B, ...), or of one array a sample; neither copies nor owns it."""
    if isinstance(values, list):
        # (DALI's stubs lack `contiguous`; without it the images are copied into one piece.)
        made: TensorListCPU = TensorListCPU([TensorCPU(value) for value in values], contiguous=False)  # type: ignore[call-overload]
        return made
    return TensorListCPU(values)


def run(
    pipe: Pipeline, feed: Feed[T], source: ImageSource, rows: Callable[[T], NDArray[np.int64]]
) -> Iterator[tuple[T, Any]]:
    """Run to the end of the feed and hand out in order what each batch was and DALI's list of its samples.

    Args:
        pipe: the graph.
        feed: what feeds it.
        source: where the images come from.
        rows: those of a batch (B,).

    Raises:
        DataError: an image that cannot be decoded.
        BowstoreError: a library, the GPU or memory that failed.
    """
    gpu = pipe.device_id is not None
    while True:
        try:
            # On a GPU, outputs and the reuse of their memory are ordered on the stream that reads them.
            (output,) = pipe.run(torch.cuda.current_stream(pipe.device_id) if gpu else None)
        except StopIteration:
            return
        except Exception as error:  # a ValueError or MemoryError, too, by what was thrown in C++
            if not is_of_graph(error):
                raise
            raise explained(error, source, rows(feed.in_flight[0]) if feed.in_flight else None) from error
        yield feed.take(_passed(pipe.device_id)) if gpu else feed.take(), output


def as_images(output: Any) -> Tensor:
    """What a graph gives, as images_BCHW in the same memory."""
    images_BHWC: Tensor = torch.utils.dlpack.from_dlpack(output.as_tensor())
    return images_BHWC.permute(0, 3, 1, 2)


def _passed(device: int) -> Callable[[], bool]:
    """Tells when the GPU has done what its current stream waits for now."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event.query
