"""Feeds a DALI graph from a thread that reads ahead, and hands out what it gives, in order.

Legend: B batch, C channels, H W pixels of the network input.
"""

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bowstore.data.reader import ImageSource, prefetched
from bowstore.environment import cores_per_rank
from bowstore.errors import DataError, is_machine_error

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
    "colour": (types.FLOAT, 2),
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
    """Feeds a graph from jobs that run ahead in a thread; remembers what each batch in flight was."""

    def __init__(self, jobs: Iterable[Callable[[], tuple[T, dict[str, Any]]]], names: Sequence[str]) -> None:
        self._names = names
        self._ready = prefetched(jobs, PREFETCH)
        self.in_flight: deque[T] = deque()

    def declare(self) -> dict[str, Any]:
        """The graph's external inputs by name (call inside the pipeline's context)."""
        nodes = fn.external_source(
            source=self._next,
            num_outputs=len(self._names),
            dtype=[_INPUTS[name][0] for name in self._names],
            ndim=[_INPUTS[name][1] for name in self._names],
            batch=True,
        )
        return dict(zip(self._names, nodes, strict=True))

    def _next(self) -> list[Any]:
        what, values = next(self._ready)  # StopIteration is how DALI learns of the end
        self.in_flight.append(what)
        return [values[name] for name in self._names]


def run(pipe: Pipeline, feed: Feed[T], blame: Callable[[T], str]) -> Iterator[tuple[T, Tensor]]:
    """Run to the end of the feed and hand out in order; `blame` names the bad image of a batch that failed."""
    gpu = pipe.device_id is not None
    while True:
        try:
            # On a GPU, outputs and the reuse of their memory are ordered on the stream that reads them.
            (output,) = pipe.run(torch.cuda.current_stream(pipe.device_id) if gpu else None)
        except StopIteration:
            return
        except RuntimeError as error:
            if "Critical error in pipeline" not in str(error) or not feed.in_flight or is_machine_error(error):
                raise
            raise DataError(blame(feed.in_flight[0])) from error
        yield feed.in_flight.popleft(), torch.utils.dlpack.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)


def undecodable(source: ImageSource, rows: NDArray[np.int64]) -> str:
    """Say which of `rows` cannot be decoded, by trying each with Pillow (DALI does not tell)."""
    for row, data in zip(rows.tolist(), source.read(rows), strict=True):
        try:
            with Image.open(io.BytesIO(data.tobytes())) as image:
                image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            # Pillow names the buffer, an address, of what it does not know.
            why = "no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
            return f"image {source.name(row)!r} cannot be decoded ({why}); remove it, or make the shards again"
    return f"an image among {source.name(int(rows[0]))!r} and the {len(rows) - 1} after it cannot be decoded by DALI"
