"""The views of images, in order: DALI decodes, and on a GPU does all the rest; on a CPU other threads do it (`finish`).

Legend: B batch, C channels, H W pixels of the network input.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowstore.config import ViewConfig
from bowstore.data.batches import bounded
from bowstore.data.config import HW_LOAD
from bowstore.data.finish import clean_finish, finished, train_finish
from bowstore.data.gpu_decode import Way
from bowstore.data.plan import Plan
from bowstore.data.reader import ImageSource
from bowstore.data.views import Batch, CleanView, Stage, stages
from bowstore.environment import cores_per_rank


def train_batches(
    source: ImageSource,
    view: ViewConfig,
    plans: Iterable[Plan],
    *,
    batch: int,
    device: torch.device,
    threads: int | None = None,
    hw_load: float = HW_LOAD,
    way: Way | None = None,
    ahead: Callable[[Plan], Any] | None = None,
    until: Stage | None = None,
) -> Iterator[Batch]:
    """Yield the perturbed images of `plans`, in order.

    Args:
        source: gives the encoded bytes.
        view: the one that the plans were made for.
        plans: this rank's steps.
        batch: largest number of samples in a plan.
        device: where the images are wanted.
        threads: decoding threads; None for one a core.
        hw_load: share of the JPEG images that a GPU's hardware decoder takes.
        way: how windows are decoded; None for the quicker of those that work there.
        ahead: called with each plan in the reading thread, some batches ahead of need (gathers words).
        until: the stage after which it ends, for benchmarks: the difference between two ends is what a stage costs.
            After `decode` the images are DALI's list.

    Raises:
        DataError: an image that cannot be decoded.
        BowstoreError: a library, the GPU or memory that failed.
    """
    from bowstore.data.feed import as_images, run  # DALI, for those alone that want pixels
    from bowstore.data.graphs import train_graph

    last = until or stages(device)[-1]
    gpu = device.type == "cuda"
    if last in stages(device)[: stages(device).index("cutmix")]:
        plans = (plan.unmixed() for plan in plans)
    pipe, feed = train_graph(
        source,
        view,
        plans,
        batch=batch,
        device=device,
        threads=threads,
        hw_load=hw_load,
        way=way,
        ahead=ahead,
        until=last if gpu else "decode",
    )
    made = run(pipe, feed, source, lambda what: what[0].rows)
    if gpu and last != "decode":
        made = ((what, as_images(output)) for what, output in made)
    elif last != "decode":
        finish = train_finish(_without(view, last), batch, threads or cores_per_rank(), normalise=last != "resize")
        made = finished(made, finish)
    for (plan, found), images_BCHW in made:
        yield Batch(images_BCHW, plan, found)


def _without(view: ViewConfig, last: Stage) -> ViewConfig:
    """The view on a CPU without what comes after a stage."""
    later = stages(torch.device("cpu"))
    later = later[later.index(last) + 1 :]
    off: dict[Stage, dict[str, Any]] = {
        "flip": {"flip": False},
        "jitter": dict.fromkeys(("brightness", "contrast", "saturation", "hue", "grey"), 0),
    }
    return view.model_copy(update={name: value for stage in later for name, value in off.get(stage, {}).items()})


def clean_batches(
    source: ImageSource,
    view: CleanView,
    rows: NDArray[np.int64] | Iterable[NDArray[np.int64]],
    *,
    batch: int,
    device: torch.device,
    threads: int | None = None,
    way: Way | None = None,
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield (rows (B,), images_BCHW float32, normalised) of the un-augmented images, in order.

    Batches of very large images come out in several (`bowstore.data.batches`).

    Args:
        source: gives the encoded bytes.
        view: geometry and normalisation.
        rows: int64 rows, cut into batches of `batch`; or arrays, each one batch, asked for in a thread when needed.
        batch: largest number of images in a batch.
        device: where the images are wanted.
        threads: decoding threads; None for one a core.
        way: how windows are decoded; None for the quicker of those that work there.

    Raises:
        DataError: an image that cannot be decoded.
        BowstoreError: a library, the GPU or memory that failed.
    """
    from bowstore.data.feed import as_images, run  # DALI, for those alone that want pixels
    from bowstore.data.graphs import clean_graph

    if isinstance(rows, np.ndarray):
        rows = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    parts = bounded(source, rows)
    pipe, feed = clean_graph(source, view, parts, batch=batch, device=device, threads=threads, way=way)
    made = run(pipe, feed, source, lambda part: part)
    if device.type == "cuda":
        yield from ((part, as_images(output)) for part, output in made)
    else:
        yield from finished(made, clean_finish(view, batch, threads or cores_per_rank()))
