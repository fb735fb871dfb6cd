"""The DALI graphs of the views: they decode, and on a GPU do all the rest.

Everything random comes from the plan through `external_source`; DALI itself draws nothing. On a GPU decoding is
`mixed`; without one the graph runs on the CPU (`device_id=None`) and ends with the decoded images.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, math, types

from bowstore.config import ViewConfig
from bowstore.data.batches import TrainingPixels
from bowstore.data.config import HW_LOAD
from bowstore.data.cutmix import paste, paste_inputs
from bowstore.data.decode import Decoder
from bowstore.data.feed import Feed, new_pipeline
from bowstore.data.gpu_decode import Way, gpu_decoding
from bowstore.data.plan import Plan
from bowstore.data.reader import ImageSource, ShardReader
from bowstore.data.views import CleanView, Stage, jitters, stages

_FILTER_MARGIN = 2.0  # beyond the antialiased filter's support, for rounding
_MOST_SIDES = 6430, 5980  # of ImageNet's largest images: for these DALI's own example allocates, with batches of 256
_WINDOW, _MIRROR = ("encoded", "start", "shape"), ("mirror",)
_TWIST = ("brightness", "contrast", "saturation", "hue")
_MIX = ("in_ids", "anchors", "shapes")


def train_graph(
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
    until: Stage,
) -> tuple[Pipeline, Feed[tuple[Plan, Any]]]:
    """DALI's part of the train view, up to a stage, and what feeds it."""
    order = stages(device)
    order = order[: order.index(until) + 1]
    colour = _TWIST if jitters(view) else ()
    # DALI warns of inputs that no operator takes.
    takes = {
        "decode": _WINDOW,
        "flip": _MIRROR if view.flip else (),
        "jitter": colour,
        "cutmix": _MIX if view.cutmix else (),
    }
    names = [name for stage in order for name in takes.get(stage, ())]
    decoder = _decoder(source, device, hw_load, way)
    seen = TrainingPixels(source, whole=decoder.way == "image")
    size = view.size if "in_ids" in names else None
    feed = Feed((partial(_train_feed, source, plan, size, ahead, seen) for plan in plans), names)
    pipe = new_pipeline(batch, device, threads)
    with pipe:
        inputs = feed.declare()
        graph: dict[Stage, Callable[[Any], Any]] = {
            "decode": lambda _: _decode_window(inputs, decoder),
            "resize": lambda images: fn.resize(images, size=[view.size, view.size], antialias=True),
            # An operator of its own costs nothing that can be measured: the paste needs each image already flipped,
            # and a resize from right to left rounds one value in a few thousand otherwise.
            "flip": lambda images: fn.flip(images, horizontal=inputs["mirror"]) if view.flip else images,
            "jitter": lambda images: fn.color_twist(images, **{n: inputs[n] for n in colour}) if colour else images,
            "cutmix": lambda images: paste(images, inputs, view.size) if view.cutmix else images,
            "normalise": lambda images: _normalise(images, view, half=device.type == "cuda"),
        }
        images = None
        for stage in order:
            images = graph[stage](images)
        pipe.set_outputs(images)
    return pipe, feed


def clean_graph(
    source: ImageSource,
    view: CleanView,
    parts: Iterable[NDArray[np.int64]],
    *,
    batch: int,
    device: torch.device,
    threads: int | None,
    way: Way | None,
) -> tuple[Pipeline, Feed[NDArray[np.int64]]]:
    """DALI's part of the clean view of rows, each array of them one batch, and what feeds it."""
    feed = Feed((partial(_clean_feed, source, part) for part in parts), ("encoded",))
    # A GPU's hardware decoder takes all that it can, so that an image's pixels do not depend on the batch it is in.
    decoder = _decoder(source, device, 1.0, way)
    pipe = new_pipeline(batch, device, threads)
    with pipe:
        encoded = feed.declare()["encoded"]
        if device.type == "cuda":
            pipe.set_outputs(_normalise(_clean(encoded, view, decoder), view))
        else:  # whole: the centre alone takes as long, as the rows beside it are Huffman-decoded all the same
            pipe.set_outputs(decoder.image(encoded))
    return pipe, feed


def _decoder(source: ImageSource, device: torch.device, hw_load: float, way: Way | None) -> Decoder:
    if device.type != "cuda":
        return Decoder("cpu", way or "slice", hw_load)
    height, width = source.largest() if isinstance(source, ShardReader) else (0, 0)
    sides = min(height, _MOST_SIDES[0]), min(width, _MOST_SIDES[1])
    found = gpu_decoding(device)
    return Decoder("mixed", way or found.way, hw_load if found.engines else 0.0, sides)


def _bounds(encoded: Any) -> Any:
    """Height and width of the encoded image, int32, as they lie in the file (no EXIF rotation)."""
    return fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.INT32)[0:2]


def _clean(encoded: Any, view: CleanView, decoder: Decoder) -> Any:
    """The image of the clean view: whole and resized, or the centre of it, of which only what it needs is decoded."""
    # Without antialias FAIR's code resized float32 images: nothing is rounded between two resizes.
    resize = partial(fn.resize, antialias=view.antialias, **({} if view.antialias else {"dtype": types.FLOAT}))
    if view.resize is None or view.squash:
        images = decoder.image(encoded)
        if view.resize is not None:
            images = resize(images, size=fn.cast(_target(_bounds(encoded), view.resize), dtype=types.FLOAT))
        return resize(images, size=[view.size, view.size])
    bounds = _bounds(encoded)
    target = _target(bounds, view.resize)
    # Half a pixel of offset goes to the even neighbour, as torchvision rounds it; DALI rounds it up.
    gap = target - view.size
    half = gap // 2
    start = half + (gap - 2 * half) * (half - 2 * (half // 2))
    edge = fn.cast(bounds, dtype=types.FLOAT)
    scale = edge / fn.cast(target, dtype=types.FLOAT)
    first, last = fn.cast(start, dtype=types.FLOAT) * scale, fn.cast(start + view.size, dtype=types.FLOAT) * scale
    reach = scale + _FILTER_MARGIN  # of the filter beyond the centre, source pixels
    low = fn.cast(math.max(math.floor(first - reach), 0.0), dtype=types.INT32)
    high = fn.cast(math.min(math.ceil(last + reach), edge), dtype=types.INT32)
    images = decoder.window(encoded, low, high - low)
    origin = fn.cast(low, dtype=types.FLOAT)
    return resize(images, size=[view.size, view.size], roi_start=first - origin, roi_end=last - origin)


def _target(bounds: Any, resize: int) -> Any:
    """Height and width with the short side resized, int32; torchvision truncates the long side, DALI rounds it up."""
    return (bounds * resize) // math.min(bounds[0], bounds[1])


def _decode_window(inputs: dict[str, Any], decoder: Decoder) -> Any:
    """Decode the planned window, kept inside the image.

    A window outside the image ends the process in DALI 2.4's CPU decoder, so the bounds come from the bytes
    themselves (`peek_image_shape`), not from the index.
    """
    encoded = inputs["encoded"]
    # No more operators than needed: each one is a round of the thread pool. Starts below 0 and empty windows are
    # taken care of where the inputs are laid out.
    bounds = _bounds(encoded)
    start = math.min(inputs["start"], bounds - 1)
    shape = math.min(inputs["shape"], bounds - start)
    return decoder.window(encoded, start, shape)


def _normalise(images: Any, view: ViewConfig | CleanView, *, half: bool = False) -> Any:
    """Centre crop (a no-op at the right size), (x - mean) / std; HWC, which is channels_last."""
    return fn.crop_mirror_normalize(
        images,
        crop=(view.size, view.size),
        mean=[255 * value for value in view.mean],
        std=[255 * value for value in view.std],
        dtype=types.FLOAT16 if half else types.FLOAT,
        output_layout="HWC",
    )


def _train_feed(
    source: ImageSource, plan: Plan, size: int | None, ahead: Callable[[Plan], Any] | None, seen: TrainingPixels
) -> tuple[tuple[Plan, Any], dict[str, Any]]:
    """Read a plan's bytes and lay out its numbers by the names of the graph's inputs (runs in a thread)."""
    seen.look(plan)
    encoded = source.read(plan.rows)
    return (plan, ahead(plan) if ahead else None), {
        "encoded": encoded,
        "start": np.maximum(plan.window[:, :2], 0),
        "shape": np.maximum(plan.window[:, 2:], 1),
        "mirror": plan.mirror,
        "brightness": plan.brightness,
        "contrast": plan.contrast,
        "saturation": plan.saturation,
        "hue": plan.hue,
        **(paste_inputs(plan, size) if size else {}),
    }


def _clean_feed(source: ImageSource, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], dict[str, Any]]:
    return rows, {"encoded": source.read(rows)}
