import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from in_memory import Memory
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn
from PIL import Image
from shard_sets import ShardMaker, encode_jpeg, textured_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from bowstore.config import ViewConfig
from bowstore.data import graphs
from bowstore.data.decode import Decoder
from bowstore.data.file_reader import FileReader
from bowstore.data.gpu_decode import Decoding, Way
from bowstore.data.graphs import train_graph
from bowstore.data.index import open_index
from bowstore.data.pipeline import clean_batches, train_batches
from bowstore.data.plan import Origin, Plan, Schedule, generator, perturb, plans
from bowstore.data.reader import ShardReader
from bowstore.data.resize import target
from bowstore.data.views import CleanView, Stage, clean_view
from bowstore.errors import DataError

CPU = torch.device("cpu")
PLAIN = ViewConfig(
    size=32, resize=None, mean=(0, 0, 0), std=(1, 1, 1), brightness=0, contrast=0, saturation=0, hue=0, grey=0,
    flip=False, cutmix=False, area=(0.3, 1.0),
)  # fmt: skip


def a_plan(count: int, view: ViewConfig, **changes: object) -> Plan:
    values: dict[str, object] = {
        "rows": np.arange(count),
        "window": np.tile(np.array([0, 0, 48, 40], np.int32), (count, 1)),
        "mirror": np.zeros(count, np.int32),
        "brightness": np.ones(count, np.float32),
        "contrast": np.ones(count, np.float32),
        "saturation": np.ones(count, np.float32),
        "hue": np.zeros(count, np.float32),
        "partner": np.arange(count, dtype=np.int32),
        "box": np.zeros((count, 4), np.int32),
        "kept": np.ones(count, np.float32),
        "mixed": view.cutmix,
        "size": view.size,
        "origin": Origin(0, 0, 0),
    }
    return Plan(**{**values, **changes})  # type: ignore[arg-type]


def images(count: int, height: int = 48, width: int = 40) -> list[bytes]:
    return [encode_jpeg(textured_image(number, height, width)) for number in range(count)]


def decoded(data: bytes) -> torch.Tensor:
    return tvf.pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))


def run_train(data: list[bytes], view: ViewConfig, plan: Plan) -> torch.Tensor:
    (batch,) = train_batches(Memory(data), view, [plan], batch=len(data), device=CPU)
    return batch.images_BCHW


def assert_close(ours: torch.Tensor, oracle: torch.Tensor, bound: float) -> None:
    """Mean absolute difference on the scale 0 to 255."""
    difference = 255 * (ours - oracle).abs().mean().item()
    assert difference < bound, f"mean absolute pixel error {difference:.2f}, bound {bound}"


def test_crop_and_resize_agree_with_torchvision() -> None:
    data = images(8)
    window = np.array([[n, 2 * n, 48 - 2 * n, 40 - 3 * n] for n in range(8)], np.int32)
    ours = run_train(data, PLAIN, a_plan(8, PLAIN, window=window))
    for number in range(8):
        top, left, height, width = window[number].tolist()
        crop = tvf.crop(decoded(data[number]), top, left, height, width)
        oracle = tvf.resize(crop, [32, 32], antialias=True)
        assert torch.equal((255 * ours[number]).round().to(torch.uint8), oracle), "to the bit"


def test_flip_and_normalise_are_exact_after_resize() -> None:
    data = images(4)
    straight = run_train(data, PLAIN, a_plan(4, PLAIN))
    view = PLAIN.model_copy(update={"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "flip": True})
    mirrored = run_train(data, view, a_plan(4, view, mirror=np.array([0, 1, 0, 1], np.int32)))
    expected = (straight - torch.tensor(view.mean)[:, None, None]) / torch.tensor(view.std)[:, None, None]
    expected[1::2] = expected[1::2].flip(-1)
    assert torch.allclose(mirrored, expected, atol=1e-4)


def test_jitter_agrees_with_the_linear_model_of_colour() -> None:
    data = images(6)
    view = PLAIN.model_copy(update={"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "grey": 0.2})
    brightness = np.array([0.6, 1.4, 1, 1, 1, 1], np.float32)
    contrast = np.array([1, 1, 0.6, 1.4, 1, 1], np.float32)
    saturation = np.array([1, 1, 1, 1, 0, 1.4], np.float32)
    plain = run_train(data, PLAIN, a_plan(6, PLAIN))
    ours = run_train(data, view, a_plan(6, view, brightness=brightness, contrast=contrast, saturation=saturation))
    for number in range(6):
        oracle = tvf.adjust_brightness(plain[number], float(brightness[number]))
        oracle = (oracle - 0.5) * float(contrast[number]) + 0.5
        oracle = tvf.adjust_saturation(oracle.clamp(0, 1), float(saturation[number]))
        assert_close(ours[number], oracle, 4.0)


def test_grey_has_equal_channels() -> None:
    view = PLAIN.model_copy(update={"grey": 1.0})
    ours = run_train(images(2), view, a_plan(2, view, saturation=np.zeros(2, np.float32)))
    assert (ours.amax(1) - ours.amin(1)).max().item() * 255 <= 2


def test_hue_keeps_brightness_and_turns_colour() -> None:
    view = PLAIN.model_copy(update={"hue": 0.1})
    red = np.zeros((48, 40, 3), np.uint8)
    red[..., 0], red[..., 1], red[..., 2] = 180, 60, 60
    data = [encode_jpeg(red)] * 2
    ours = run_train(data, view, a_plan(2, view, hue=np.array([36, -36], np.float32))).mean((2, 3)) * 255
    assert ours[0, 1] > ours[0, 2] + 20  # towards yellow
    assert ours[1, 2] > ours[1, 1] + 20  # towards magenta


def test_cutmix_pastes_exactly_the_partners_box() -> None:
    data = images(4)
    view = PLAIN.model_copy(update={"cutmix": True})
    box = np.array([[4, 6, 10, 12], [0, 0, 32, 32], [0, 0, 0, 0], [20, 20, 12, 12]], np.int32)
    partner = np.array([1, 2, 3, 0], np.int32)
    plain = run_train(data, PLAIN, a_plan(4, PLAIN))
    ours = run_train(data, view, a_plan(4, view, box=box, partner=partner))
    for number in range(4):
        top, left, height, width = box[number].tolist()
        expected = plain[number].clone()
        place = (slice(None), slice(top, top + height), slice(left, left + width))
        expected[place] = plain[partner[number]][place]
        assert torch.equal(ours[number], expected)


FULL = ViewConfig(size=32, resize=None, area=(0.3, 1.0), grey=0.3)
SIDES = [(40 + 3 * n % 17, 30 + 5 * n % 23) for n in range(96)]


def full_plan(view: ViewConfig) -> Plan:
    """A step of the whole train view, a third of it without a box."""
    heights, widths = (np.array(side, np.int32) for side in zip(*SIDES, strict=True))
    plan = perturb(np.arange(96), heights, widths, generator(3, 0, 1).random((96, 32)), view, Origin(3, 0, 0))
    plan.box[::3] = 0
    return plan


def perturbed(data: bytes, plan: Plan, place: int, size: int) -> torch.Tensor:
    """g of one image by torchvision and by the definitions of colour, on the scale 0 to 255: (3, size, size)."""
    top, left, height, width = plan.window[place].tolist()
    image = tvf.resize(tvf.crop(decoded(data), top, left, height, width), [size, size], antialias=True).double()
    if plan.mirror[place]:
        image = tvf.horizontal_flip(image)
    red, green, blue = image
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.complex(
        0.596 * red - 0.274 * green - 0.321 * blue, 0.211 * red - 0.523 * green + 0.311 * blue
    )  # of YIQ, whose plane hue turns and saturation stretches
    angle = np.deg2rad(float(plan.hue[place]))
    chroma = chroma * float(plan.saturation[place]) * complex(np.cos(angle), -np.sin(angle))
    back = torch.tensor([[1, 0.956, 0.621], [1, -0.272, -0.647], [1, -1.107, 1.705]], dtype=torch.float64)
    image = torch.einsum("rc,chw->rhw", back, torch.stack([luma, chroma.real, chroma.imag]))
    image = ((image - 128) * float(plan.contrast[place]) + 128) * float(plan.brightness[place])
    return image.clamp(0, 255)


def errors(ours: Sequence[torch.Tensor], plan: Plan, views: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """Mean absolute differences (B, 2) of 255, outside and inside the box, to CutMix of the images' own views."""
    found = np.zeros((len(views), 2))
    for place, (image, partner) in enumerate(zip(ours, plan.partner.tolist(), strict=True)):
        top, left, height, width = plan.box[place].tolist()
        inside = torch.zeros(image.shape[1:], dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        difference = (255 * image - torch.where(inside, views[partner], views[place])).abs()
        found[place] = [float(difference[:, part].mean()) if part.any() else 0 for part in (~inside, inside)]
    return found


def unflipped(pictures: Sequence[torch.Tensor], plan: Plan) -> list[torch.Tensor]:
    return [picture.flip(-1) if mirror else picture for picture, mirror in zip(pictures, plan.mirror, strict=True)]


def test_every_number_of_a_plan_does_to_its_own_image_what_torchvision_does() -> None:
    """The paper pastes g(B) into g(A): crop, flip, jitter and grey are each image's own, the box is not flipped."""
    view = FULL.model_copy(update={"mean": (0, 0, 0), "std": (1, 1, 1)})
    data = [encode_jpeg(textured_image(number, *sides)) for number, sides in enumerate(SIDES)]
    plan = full_plan(view)
    mixed = (plan.box[:, 2:] > 0).all(axis=1)
    cases = {(bool(a), bool(b), bool(c)) for a, b, c in zip(plan.mirror, plan.mirror[plan.partner], mixed, strict=True)}
    assert len(cases) == 8, "flipped or not, the partner too, mixed or not"
    assert 0 < (plan.saturation == 0).sum() < 96
    ours = run_train(data, view, plan)
    views = [perturbed(image, plan, place, view.size) for place, image in enumerate(data)]
    assert errors(ours, plan, views).max() < 0.5  # colours are rounded once more
    # The oracle tells a flip of the finished mixture from this.
    after = errors(unflipped(ours, plan), plan, unflipped(views, plan))
    differ = mixed & (plan.mirror != plan.mirror[plan.partner])
    assert (after[differ].max(axis=1) > 10.0).all()


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("jitter", [True, False])
def test_without_cutmix_the_view_is_that_of_each_image_alone(flip: bool, jitter: bool) -> None:
    """The graph leaves out what a view does not ask for; what remains is the same."""
    plain = {} if jitter else {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "grey": 0}
    asked = {"mean": (0, 0, 0), "std": (1, 1, 1), "cutmix": False, "flip": flip, **plain}
    view = FULL.model_copy(update=asked)
    data = [encode_jpeg(textured_image(number, *sides)) for number, sides in enumerate(SIDES)]
    plan = full_plan(view)
    assert set(plan.mirror.tolist()) == ({0, 1} if flip else {0})
    views = [perturbed(image, plan, place, view.size) for place, image in enumerate(data)]
    assert errors(run_train(data, view, plan), plan, views).max() < 0.5


@pytest.mark.parametrize(("way", "decode"), [("slice", ["ImageSlice"]), ("image", ["Image", "Slice"])])
def test_all_graphs_flip_and_colour_each_image_before_the_paste(
    monkeypatch: pytest.MonkeyPatch, way: Way, decode: list[str]
) -> None:
    """A graph for a GPU can be laid out without one; on a CPU it only decodes."""
    monkeypatch.setattr(graphs, "gpu_decoding", lambda device: Decoding("slice", "", 1, ""))
    after = ["Resize", "Flip", "ColorTwist", "MultiPaste", "CropMirrorNormalize"]
    assert operators("cuda", "normalise", way) == [*decode, *after]
    assert operators("cpu", "decode", way) == decode


def operators(device: str, until: Stage, way: Way) -> list[str]:
    memory = Memory(images(4))
    pipe, _ = train_graph(memory, FULL, [], batch=4, device=torch.device(device), threads=1, way=way, until=until)
    (node,) = pipe._graph_out
    names = []
    while node.source.inputs:
        names.append(node.name.strip("_").split("_")[0])
        assert node.device == ("gpu" if device == "cuda" else "cpu")
        node = node.source.inputs[0]
    return names[::-1]


def test_windows_outside_the_image_are_clamped_not_fatal() -> None:
    window = np.array([[40, 30, 500, 500], [-5, -5, 10, 10], [100, 100, 1, 1], [0, 0, 0, 0]], np.int32)
    ours = run_train(images(4), PLAIN, a_plan(4, PLAIN, window=window))
    assert ours.shape == (4, 3, 32, 32)
    assert torch.isfinite(ours).all()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_exif_orientation_does_not_move_the_window(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    tagged, plain = io.BytesIO(), io.BytesIO()
    Image.fromarray(textured_image(3, 20, 60)).save(tagged, "JPEG", quality=95, exif=exif)
    Image.fromarray(textured_image(3, 20, 60)).save(plain, "JPEG", quality=95)
    window = a_plan(1, PLAIN, window=np.array([[0, 0, 20, 60]], np.int32))
    assert torch.equal(run_train([tagged.getvalue()], PLAIN, window), run_train([plain.getvalue()], PLAIN, window))


def test_one_pixel_images_pass() -> None:
    data = [encode_jpeg(np.full((1, 1, 3), 100, np.uint8)), encode_jpeg(textured_image(1, 1, 50))]
    ours = run_train(data, PLAIN, a_plan(2, PLAIN, window=np.array([[0, 0, 1, 1], [0, 3, 1, 20]], np.int32)))
    assert ours.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("squash", [False, True])
def test_the_clean_view_agrees_with_torchvision(squash: bool) -> None:
    data = [encode_jpeg(textured_image(n, 60 + 7 * n, 90 - 5 * n)) for n in range(5)]
    view = CleanView(size=32, resize=40, squash=squash, mean=(0, 0, 0), std=(1, 1, 1))
    ((rows, ours),) = clean_batches(Memory(data), view, np.arange(5), batch=8, device=CPU)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    crop = v2.Resize((32, 32), antialias=True) if squash else v2.CenterCrop(32)
    oracle = v2.Compose([v2.Resize(40, antialias=True), crop])
    for number in range(5):
        assert torch.equal((255 * ours[number]).round().to(torch.uint8), oracle(decoded(data[number]))), "to the bit"


def linear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """OpenCV's INTER_LINEAR of a float image: between the two nearest pixel centres, the border's beyond it."""
    for axis, out in enumerate(size):
        edge = pixels.shape[axis]
        place = (np.arange(out) + 0.5) * edge / out - 0.5
        low = np.floor(place).astype(int)
        far = np.where((low < 0) | (low >= edge - 1), 0, place - low)
        low = low.clip(0, edge - 1)
        far = np.expand_dims(far, tuple(n for n in range(3) if n != axis))
        pixels = (1 - far) * pixels.take(low, axis) + far * pixels.take((low + 1).clip(max=edge - 1), axis)
    return pixels


def by_dali(data: list[bytes], view: CleanView) -> list[np.ndarray]:
    """What the graph of a GPU makes of images, on a CPU."""
    pipe = Pipeline(batch_size=len(data), num_threads=1, device_id=None)
    with pipe:
        encoded = fn.external_source([[np.frombuffer(image, np.uint8) for image in data]], cycle=True)
        pipe.set_outputs(graphs._clean(encoded, view, Decoder("cpu", "slice", 0.0)))
    pipe.build()
    (images,) = pipe.run()
    return [np.array(images[n]) for n in range(len(data))]


@pytest.mark.parametrize(("resize", "squash"), [(40, True), (40, False), (None, False)])
def test_without_antialias_as_opencv_resizes(resize: int | None, squash: bool) -> None:
    """To a hundredth of a grey level, nothing rounded between two resizes; on a CPU and by the graph of a GPU."""
    data = [encode_jpeg(textured_image(n, 60 + 37 * n, 190 - 25 * n)) for n in range(5)]
    view = CleanView(size=32, resize=resize, squash=squash, mean=(0, 0, 0), std=(1, 1, 1), antialias=False)
    ((_, ours),) = clean_batches(Memory(data), view, np.arange(5), batch=8, device=CPU)
    theirs = by_dali(data, view)
    for number in range(5):
        pixels = decoded(data[number]).permute(1, 2, 0).double().numpy()
        if resize:
            pixels = linear(pixels, target(pixels.shape, resize))
        if squash or resize is None:
            pixels = linear(pixels, (32, 32))
        top, left = (round((edge - 32) / 2) for edge in pixels.shape[:2])
        expected = pixels[top : top + 32, left : left + 32]
        np.testing.assert_allclose(255 * ours[number].permute(1, 2, 0).numpy(), expected, atol=0.01)
        np.testing.assert_allclose(theirs[number], expected, atol=0.01)


def test_files_record_antialias_where_it_is_off_alone() -> None:
    view = clean_view(PLAIN)
    assert view.recorded().keys() == {"size", "resize", "squash", "mean", "std"}
    assert replace(view, antialias=False).recorded()["antialias"] is False


def test_the_whole_image_view_takes_odd_batches_in_order() -> None:
    view = clean_view(PLAIN)
    parts = list(clean_batches(Memory(images(7)), view, np.array([6, 5, 4, 3, 2, 1, 0]), batch=3, device=CPU))
    assert [rows.tolist() for rows, _ in parts] == [[6, 5, 4], [3, 2, 1], [0]]
    alone = list(clean_batches(Memory(images(7)), view, [np.array([2])], batch=1, device=CPU))
    assert torch.equal(alone[0][1][0], parts[1][1][1])


def test_batches_stay_what_they_were_while_later_ones_are_made(make_shard_set: ShardMaker) -> None:
    index = make_shard_set(96)
    view = ViewConfig(size=32, resize=None)
    batches, copies = [], []
    schedule = Schedule(96, 8, 0)
    for batch in train_batches(
        ShardReader(index), view, plans(schedule, index, view, start=0, stop=24), batch=8, device=CPU
    ):
        batches.append(batch.images_BCHW)
        copies.append(batch.images_BCHW.clone())
    assert len(batches) == 24
    assert all(torch.equal(a, b) for a, b in zip(batches, copies, strict=True))
    assert batches[0].is_contiguous(memory_format=torch.channels_last)


def test_views_do_not_depend_on_threads_or_on_the_batch() -> None:
    """Bit for bit: in threads of any number, and in a batch of their group alone."""
    data = [encode_jpeg(textured_image(number, *sides)) for number, sides in enumerate(SIDES)]
    plan = full_plan(FULL)
    ours = run_train(data, FULL, plan)
    for threads in (1, 5):
        (batch,) = train_batches(Memory(data), FULL, [plan], batch=96, device=CPU, threads=threads)
        assert torch.equal(batch.images_BCHW, ours)
    part = slice(8, 16)
    cut = {name: value[part] for name, value in vars(plan).items() if isinstance(value, np.ndarray)}
    alone = replace(plan, **cut | {"partner": plan.partner[part] - 8})
    (batch,) = train_batches(Memory(data), FULL, [alone], batch=8, device=CPU)
    assert torch.equal(batch.images_BCHW, ours[part])
    view = CleanView(size=32, resize=36, squash=False, mean=FULL.mean, std=FULL.std)
    ((_, clean),) = clean_batches(Memory(data), view, np.arange(96), batch=96, device=CPU, threads=5)
    parts = clean_batches(Memory(data), view, np.arange(96)[::-1].copy(), batch=7, device=CPU, threads=1)
    assert torch.equal(torch.cat([part.clone() for _, part in parts]).flip(0), clean)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    paths = []
    for number, data in enumerate(images(3)):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(data if number != 1 else data[:100])
        paths.append(path)
    view = clean_view(PLAIN)
    with pytest.raises(DataError, match=r"1\.jpg.*cannot be decoded"):
        list(clean_batches(FileReader(paths), view, np.arange(3), batch=4, device=CPU))


def test_the_pipeline_reads_what_the_index_maps(make_shard_set: ShardMaker) -> None:
    index = open_index(make_shard_set(10).root)
    view = clean_view(PLAIN)
    ((_, ours),) = clean_batches(ShardReader(index), view, np.arange(10), batch=10, device=CPU)
    files = Memory([encode_jpeg(textured_image(n, 32 + n % 5, 32 + n % 3)) for n in range(10)])
    ((_, direct),) = clean_batches(files, view, np.arange(10), batch=10, device=CPU)
    assert torch.equal(ours, direct)
