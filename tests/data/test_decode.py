"""Both ways to decode a window give Pillow's pixels, of every chroma subsampling and kind of image."""

import io

import numpy as np
import pytest
import torch
from in_memory import Memory
from jpeg_writer import write_jpeg
from numpy.typing import NDArray
from nvidia.dali import fn
from PIL import Image
from shard_sets import ShardMaker

from bowstore.config import ViewConfig
from bowstore.data import graphs
from bowstore.data.config import HW_LOAD
from bowstore.data.gpu_decode import Decoding, Way
from bowstore.data.gpu_probe import decoded, differences, pillow, trials, windows
from bowstore.data.graphs import train_graph
from bowstore.data.pipeline import clean_batches, train_batches
from bowstore.data.plan import Origin, generator, perturb
from bowstore.data.reader import ShardReader
from bowstore.data.views import CleanView

CPU = torch.device("cpu")
WAYS: list[Way] = ["slice", "image"]
SUBSAMPLINGS = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2), "4:4:0": (1, 2), "4:1:1": (4, 1)}
SIDES = (45, 61)


def colourful(height: int, width: int) -> NDArray[np.uint8]:
    """Colours that change within a few pixels: (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([128 + 60 * np.sin(x / 2 + c) * np.cos(y / 3 + 2 * c) for c in range(3)], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def images() -> list[NDArray[np.uint8]]:
    """One of each subsampling, a grey one and a PNG."""
    found = [write_jpeg(colourful(*SIDES), *factors) for factors in SUBSAMPLINGS.values()]
    for mode, name in (("L", "JPEG"), ("RGB", "PNG")):
        buffer = io.BytesIO()
        Image.fromarray(colourful(*SIDES)).convert(mode).save(buffer, name)
        found.append(buffer.getvalue())
    return [np.frombuffer(each, np.uint8) for each in found]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", range(len(SUBSAMPLINGS) + 2))
def test_windows_of_every_kind_are_pillows(images: list[NDArray[np.uint8]], kind: int, way: Way) -> None:
    """Chroma is upsampled as Pillow does it ("fancy"), at the windows' edges, too."""
    places = np.array(windows(*SIDES), np.int32)
    encoded = [images[kind]] * len(places)
    assert differences(decoded(encoded, places, None, way, 0.0), pillow(encoded, places)) == 0


def test_the_subsamplings_are_what_they_are_called(images: list[NDArray[np.uint8]]) -> None:
    for factors, data in zip(SUBSAMPLINGS.values(), images, strict=False):
        with Image.open(io.BytesIO(data.tobytes())) as image:
            assert image.layer[0][1:3] == factors  # type: ignore[attr-defined]
            brightness = [np.asarray(each.convert("L"), int) for each in (image, Image.fromarray(colourful(*SIDES)))]
        assert np.abs(brightness[0] - brightness[1]).mean() < 2


def test_pillow_would_show_chroma_that_is_only_repeated(images: list[NDArray[np.uint8]]) -> None:
    """So the tests of a GPU can see it: as if each chroma value stood for all its pixels."""
    with Image.open(io.BytesIO(images[2].tobytes())) as image:
        image.draft("YCbCr", None)
        fancy = np.asarray(image.convert("YCbCr"), np.uint8)
    blocky = fancy.copy()
    blocky[..., 1:] = fancy[::2, ::2, 1:].repeat(2, 0).repeat(2, 1)[: SIDES[0], : SIDES[1]]
    rgb = [np.asarray(Image.fromarray(each, "YCbCr").convert("RGB")) for each in (fancy, blocky)]
    assert differences(rgb[:1], rgb[1:]) > 0.5


@pytest.mark.parametrize("view", [
    CleanView(32, 40, False, (0, 0, 0), (1, 1, 1)),
    CleanView(32, 40, True, (0, 0, 0), (1, 1, 1)),
    CleanView(32, None, False, (0, 0, 0), (1, 1, 1)),
])  # fmt: skip
def test_clean_views_are_the_same_by_both_ways(images: list[NDArray[np.uint8]], view: CleanView) -> None:
    rows = np.arange(len(images))
    (_, alone), (_, whole) = (
        next(clean_batches(Memory(images), view, rows, batch=8, device=CPU, threads=1, way=way)) for way in WAYS
    )
    assert torch.equal(alone, whole)


def test_train_views_are_the_same_by_both_ways_and_windows_outside_are_clamped(images: list[NDArray[np.uint8]]) -> None:
    view = ViewConfig(size=32, resize=None, brightness=0, contrast=0, saturation=0, hue=0, grey=0)
    images, count = [*images, images[2]], 8  # CutMix mixes groups of four
    heights, widths = (np.full(count, side, np.int32) for side in SIDES)
    plan = perturb(np.arange(count), heights, widths, generator(3, 0, 1).random((count, 32)), view, Origin(3, 0, 0))
    plan.window[:4] = [[40, 30, 500, 500], [-5, -5, 10, 10], [100, 100, 1, 1], [0, 0, 0, 0]]
    alone, whole = (
        next(train_batches(Memory(images), view, [plan], batch=count, device=CPU, threads=1, way=way)) for way in WAYS
    )
    assert torch.isfinite(alone.images_BCHW).all()
    assert torch.equal(alone.images_BCHW, whole.images_BCHW)


def test_a_trial_looks_at_all_kinds_at_their_edges() -> None:
    encoded, places = trials()
    assert len(encoded) == len(places) > 200
    kinds = set()
    for data, (top, left, height, width) in zip(encoded, places.tolist(), strict=True):
        with Image.open(io.BytesIO(data.tobytes())) as image:
            assert 0 <= top < top + height <= image.height
            assert 0 <= left < left + width <= image.width
            layers = tuple(layer[1:3] for layer in getattr(image, "layer", ()))
            kinds.add((image.format, image.mode, layers[:1], "progressive" in image.info, image.height > 1000))
    assert len(kinds) == 7


@pytest.mark.parametrize(
    ("largest", "asked"), [((90, 110), (90, 110)), ((9000, 110), (6430, 110)), ((9, 9e3), (9, 5980))]
)
def test_a_hardware_decoder_gets_memory_for_the_largest_sides(
    make_shard_set: ShardMaker, monkeypatch: pytest.MonkeyPatch, largest: tuple[int, int], asked: tuple[int, int]
) -> None:
    """Up to ImageNet's, for which DALI's own example asks, too. A graph for a GPU can be laid out without one."""
    source = ShardReader(make_shard_set(8, size=32))
    assert source.largest() == (36, 34)
    monkeypatch.setattr(source, "largest", lambda: largest)
    monkeypatch.setattr(graphs, "gpu_decoding", lambda device: Decoding("image", "", 7, ""))
    found = []
    original = fn.decoders.image_slice
    monkeypatch.setattr(fn.decoders, "image_slice", lambda *args, **how: found.append(how) or original(*args, **how))
    view = ViewConfig(size=32, resize=None)
    train_graph(source, view, [], batch=8, device=torch.device("cuda"), threads=1, way="slice", until="decode")
    (how,) = found
    assert (how["preallocate_height_hint"], how["preallocate_width_hint"]) == asked
    assert how["device"] == "mixed"
    assert how["jpeg_fancy_upsampling"]
    assert how["hw_decoder_load"] == HW_LOAD


def test_a_hardware_decoder_that_failed_in_the_trial_is_given_nothing(
    make_shard_set: ShardMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever share is asked for."""
    monkeypatch.setattr(graphs, "gpu_decoding", lambda device: Decoding("slice", "", 0, "a trial of it failed"))
    source, loads = ShardReader(make_shard_set(8, size=32)), []
    original = fn.decoders.image_slice
    monkeypatch.setattr(
        fn.decoders, "image_slice", lambda *args, **how: loads.append(how["hw_decoder_load"]) or original(*args, **how)
    )
    view = ViewConfig(size=32, resize=None)
    for load in (0.65, 1.0):
        train_graph(source, view, [], batch=8, device=torch.device("cuda"), threads=1, hw_load=load, until="decode")
    assert loads == [0, 0]
