import copy
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from bowstore.config import Compile, ModelConfig
from bowstore.data.views import CleanView
from bowstore.errors import DataError, MismatchError, UsageError
from bowstore.evaluate.features import Batches, Extraction, usual_batch, variation, warn_of_collapse
from bowstore.evaluate.protocol import LabelledSplit
from bowstore.models.backbone import Backbone
from bowstore.models.compiled import EAGER, Compiled
from bowstore.models.pooling import POOLED, GridPool, Tap, WindowPool, choose_pool, layer_taps
from bowstore.models.registry import build_backbone

CPU = torch.device("cpu")
# Protocols 3.3: channels, side of the map, window, side of the result, dimensions.
POOLS = [
    (64, 112, (10, 10, 4), 12, 9216),  # conv1
    (64, 56, (5, 5, 2), 12, 9216),  # pool1
    (256, 56, (16, 8, 0), 6, 9216),  # conv2
    (512, 28, (13, 5, 0), 4, 8192),  # conv3
    (1024, 14, (8, 3, 0), 3, 9216),  # conv4
    (2048, 7, (6, 1, 0), 2, 8192),  # conv5
]


@pytest.mark.parametrize(("channels", "side", "window", "out", "dims"), POOLS)
def test_published_pools(channels: int, side: int, window: tuple[int, int, int], out: int, dims: int) -> None:
    pool = choose_pool(channels, side, side)
    assert pool == WindowPool(*window)
    pooled = pool(torch.ones(1, channels, side, side))
    assert pooled.shape == (1, channels, out, out)
    assert pooled[0].numel() == dims


@pytest.mark.parametrize(("side", "kernel", "inside"), [(112, 10, 6), (56, 5, 3)])
def test_padding_counts_or_not_at_the_border(side: int, kernel: int, inside: int) -> None:
    # The first window covers `inside` of `kernel` rows and columns of a map of ones.
    ones = torch.ones(1, 64, side, side)
    valid = choose_pool(64, side, side)(ones)
    padded = choose_pool(64, side, side, count_padding=True)(ones)
    assert torch.equal(valid, torch.ones_like(valid))
    assert padded[0, 0, 0, 0].item() == pytest.approx((inside / kernel) ** 2)
    assert padded[0, 0, 0, 1].item() == pytest.approx(inside / kernel)
    assert padded[0, 0, 1, 1].item() == 1


def test_window_values_by_hand() -> None:
    maps = torch.arange(49.0).reshape(1, 1, 7, 7)
    pooled = WindowPool(6, 1)(maps)
    assert pooled.flatten().tolist() == [20.0, 21.0, 27.0, 28.0]  # means of the four 6x6 windows


@pytest.mark.parametrize(
    ("channels", "height", "width", "grid"),
    [(512, 7, 7, (4, 4)), (256, 14, 14, (6, 6)), (640, 8, 8, (3, 3)), (64, 4, 4, (4, 4)), (64, 3, 9, (3, 9)),
     (20000, 7, 7, (1, 1)), (1024, 13, 13, (3, 3))],
)  # fmt: skip
def test_grid_for_other_maps(channels: int, height: int, width: int, grid: tuple[int, int]) -> None:
    pool = choose_pool(channels, height, width)
    assert pool == GridPool(*grid)
    assert pool(torch.zeros(1, channels, height, width)).shape[2:] == grid
    assert channels * grid[0] * grid[1] <= max(9216, channels)


def test_pools_have_names() -> None:
    assert str(WindowPool(8, 3)) == "average 8/3/0"
    assert str(GridPool(3, 3)) == "average grid 3x3"
    assert str(Tap("conv4", WindowPool(8, 3))) == "conv4 average 8/3/0"
    assert str(POOLED["pooled"]) == "pooled output"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return build_backbone(ModelConfig(arch="wrn-10-1"))


def batches(images: Tensor, size: int) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    for start in range(0, len(images), size):
        part = images[start : start + size]
        yield np.arange(start, start + len(part), dtype=np.int64), part


def rows(count: int) -> NDArray[np.int64]:
    return np.arange(count, dtype=np.int64)


def how(backbone: nn.Module, taps: Mapping[str, Tap], **changed: Any) -> Extraction:
    view = CleanView(size=16, resize=None, squash=False, mean=(0, 0, 0), std=(1, 1, 1))
    values: dict[str, Any] = {"backbone": backbone, "taps": taps, "view": view, "batch": 2, "device": CPU}
    return Extraction(**(values | changed))


def collect(
    backbone: nn.Module, batches: Batches, rows: NDArray[np.int64], taps: Mapping[str, Tap], **told: Any
) -> dict[str, NDArray[np.float32]]:
    return how(backbone, taps).collect(batches, rows, **told)


def test_pooled_output_is_the_networks(backbone: Backbone) -> None:
    images = torch.randn(5, 3, 16, 16)
    features = collect(backbone, batches(images, 2), rows(5), POOLED)["pooled"]
    backbone.eval()
    with torch.no_grad():
        expected = backbone(images).numpy()
    assert features.dtype == np.float32
    assert features.shape == (5, backbone.features)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


def test_features_are_exact_whatever_the_callers_settings(backbone: Backbone) -> None:
    images = torch.randn(4, 3, 16, 16)
    expected = collect(backbone, batches(images, 4), rows(4), POOLED)["pooled"]
    seen = []
    cudnn: Any = torch.backends.cudnn  # not described for type checkers

    def look(_module: nn.Module, _args: Any, output: Tensor) -> None:
        precisions = (torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision)
        seen.append((*precisions, torch.is_autocast_enabled("cuda"), output.dtype))

    with backbone.stages["block3"].register_forward_hook(look), torch.autocast("cpu", torch.bfloat16):
        features = collect(backbone, batches(images, 4), rows(4), POOLED)["pooled"]
    assert np.array_equal(features, expected)
    assert seen == [("ieee", "ieee", False, torch.float32)]


def test_layers_are_pooled_maps(backbone: Backbone) -> None:
    images = torch.randn(3, 3, 16, 16)
    taps = layer_taps(backbone, backbone.layers[-2:], size=16)
    features = collect(backbone, batches(images, 3), rows(3), taps)
    backbone.eval()
    for layer in backbone.layers[-2:]:
        with torch.no_grad():
            maps = backbone.feature_maps(images, [layer])[layer]
        expected = taps[layer].pool
        assert expected is not None
        np.testing.assert_array_equal(features[layer], expected(maps).flatten(1).numpy())


def test_the_network_runs_once_for_its_layers_and_its_output(backbone: Backbone) -> None:
    images, passes = torch.randn(3, 3, 16, 16), []
    taps = {**layer_taps(backbone, backbone.layers, size=16), **POOLED}
    with next(iter(backbone.root().children())).register_forward_hook(lambda *_: passes.append(1)):
        features = collect(backbone, batches(images, 3), rows(3), taps)
    assert len(passes) == 1
    alone = collect(backbone, batches(images, 3), rows(3), POOLED)
    np.testing.assert_array_equal(features["pooled"], alone["pooled"])


def test_everywhere_is_one_average(backbone: Backbone) -> None:
    layer = backbone.layers[-1]
    taps = layer_taps(backbone, [layer], size=16, everywhere=True)
    images = torch.randn(3, 3, 16, 16)
    features = collect(backbone, batches(images, 3), rows(3), {**taps, **POOLED})
    np.testing.assert_allclose(features[layer], features["pooled"], rtol=1e-5, atol=1e-6)


def test_resnet50_taps_of_the_protocol() -> None:
    with torch.device("meta"):  # shapes without arithmetic
        net = build_backbone(ModelConfig(arch="resnet50"))
    taps = layer_taps(net, net.layers, size=224)
    assert taps == {
        "conv1": Tap("conv1", WindowPool(10, 10, 4)),
        "pool1": Tap("pool1", WindowPool(5, 5, 2)),
        "conv2": Tap("conv2", WindowPool(16, 8)),
        "conv3": Tap("conv3", WindowPool(13, 5)),
        "conv4": Tap("conv4", WindowPool(8, 3)),
        "conv5": Tap("conv5", WindowPool(6, 1)),
    }


def test_statistics_and_modes_stay(backbone: Backbone) -> None:
    backbone.train()
    frozen = next(module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    modes = [module.training for module in backbone.modules()]
    collect(backbone, batches(torch.randn(4, 3, 16, 16), 2), rows(4), POOLED)
    layer_taps(backbone, backbone.layers, size=16)
    assert [module.training for module in backbone.modules()] == modes
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in backbone.parameters())


def test_modes_come_back_after_an_error(backbone: Backbone) -> None:
    backbone.train()
    images = torch.full((1, 3, 16, 16), torch.nan)
    with pytest.raises(DataError, match="NaN"):
        collect(backbone, batches(images, 1), rows(1), POOLED)
    assert all(module.training for module in backbone.modules())


def test_batch_size_does_not_matter(backbone: Backbone) -> None:
    images = torch.randn(7, 3, 16, 16)
    one, seven = (collect(backbone, batches(images, size), rows(7), POOLED)["pooled"] for size in (1, 7))
    np.testing.assert_allclose(one, seven, rtol=1e-4, atol=1e-5)


def test_nan_names_the_image(backbone: Backbone) -> None:
    images = torch.randn(6, 3, 16, 16)
    images[4] = torch.nan
    with pytest.raises(DataError, match="pooled output: NaN or infinity for row 4 and 0 more of the 2 images"):
        collect(backbone, batches(images, 2), rows(6), POOLED)
    with pytest.raises(DataError, match="for image-4 and 0 more"):
        collect(backbone, batches(images, 6), rows(6), POOLED, name_of="image-{}".format)


def test_float16_rounds_and_refuses_what_it_cannot_hold(backbone: Backbone) -> None:
    images = torch.randn(4, 3, 16, 16)
    full = collect(backbone, batches(images, 2), rows(4), POOLED)["pooled"]
    half = how(backbone, POOLED, dtype="float16").collect(batches(images, 2), rows(4))["pooled"]
    assert half.dtype == np.float16
    assert np.array_equal(half, full.astype(np.float16))
    bright = images * torch.tensor([1, 1e7, 1, 1])[:, None, None, None]
    message = r"pooled output: \S+ for row 1 and 0 more of the 2 images .*; float16 ends at 65504: leave --dtype out"
    with pytest.raises(DataError, match=message):
        how(backbone, POOLED, dtype="float16").collect(batches(bright, 2), rows(4))


@pytest.mark.parametrize("level", [0.0, 3e-4, 1.0, 1e30])
def test_features_that_are_the_same_for_all_images_are_warned_of(
    backbone: Backbone, capsys: pytest.CaptureFixture[str], level: float
) -> None:
    collapsed = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in (last := collapsed.stages["block3"].bn).parameters():  # type: ignore[operator, union-attr]
            parameter.zero_()
        last.bias += level  # type: ignore[operator, arg-type]
    batch = torch.randn(6, 3, 16, 16)

    def look(network: Backbone, count: int) -> str:
        features = collect(network, batches(batch[:count], 2), rows(count), POOLED)["pooled"]
        warn_of_collapse("test features", {"pooled output": variation(features)}, count)
        return str(capsys.readouterr().err)

    told = (
        r"warning: test features: pooled output is the same for all 6 images \(it varies by 0 of its size, less than "
        r"0\.001\): the network has collapsed, and no score of it says anything\n"
    )
    assert re.search(told, look(collapsed, 6))
    assert "warning" not in look(backbone, 6)
    assert "warning" not in look(collapsed, 1)  # of one image nothing can be told


def test_variation_is_a_share_of_the_features_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(3, 0.5, (3000, 7)).astype(np.float32)
    wide = values.astype(np.float64)
    expected = np.sqrt(((wide - wide.mean(0)) ** 2).sum() / (wide**2).sum())
    assert variation(values) == pytest.approx(expected, rel=1e-6)
    assert variation(np.full((5, 3), 1e30, np.float32) * np.float32(1.1)) == pytest.approx(0, abs=1e-7)
    assert variation(np.zeros((5, 3), np.float32)) == 0
    monkeypatch.setattr("bowstore.evaluate.features._SLICE_VALUES", 700)  # a hundred images at a time
    assert variation(values) == pytest.approx(expected, rel=1e-6)


def test_other_order_is_refused(backbone: Backbone) -> None:
    images = torch.randn(4, 3, 16, 16)
    with pytest.raises(MismatchError, match="images 0 to 1 came in another order"):
        collect(backbone, batches(images, 2), rows(4)[::-1], POOLED)
    with pytest.raises(MismatchError, match="4 of 5 images came out"):
        collect(backbone, batches(images, 4), np.arange(5), POOLED)


def test_no_rows(backbone: Backbone) -> None:
    with pytest.raises(DataError, match="no images"):
        collect(backbone, [], rows(0), POOLED)


def test_layers_go_by_the_backbones_own_names() -> None:
    """A result's figures are named by them, and the paper's stand beside those of conv4 and conv5."""
    with torch.device("meta"):
        net = build_backbone(ModelConfig(arch="resnet18"))
    assert list(layer_taps(net, ["layer3", "maxpool", "conv5"], size=64)) == ["conv4", "pool1", "conv5"]
    with pytest.raises(UsageError, match="layers layer3, conv4 name conv4, conv4: give each layer once"):
        layer_taps(net, ["layer3", "conv4"], size=64)


@pytest.mark.parametrize(("layers", "message"), [(["conv9"], "conv9.*its layers are"), ([], "no layers given")])
def test_unknown_layer(backbone: Backbone, layers: Sequence[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layer_taps(backbone, layers, size=16)


class Patches:
    """Encoded squares of one grey level each, by row."""

    def __len__(self) -> int:
        return 6

    def read(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        return [self._encode(row) for row in rows.tolist()]

    def name(self, row: int) -> str:
        return f"patch {row}"

    def pixels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.zeros(len(rows), np.int64)

    def _encode(self, row: int) -> NDArray[np.uint8]:
        file = io.BytesIO()
        Image.new("RGB", (20 + row, 12), (40 * row,) * 3).save(file, "PNG")
        return np.frombuffer(file.getvalue(), np.uint8)


class Levels(nn.Module):
    """The mean of each channel, as a feature; has what extraction asks of a backbone."""

    arch, layers = "levels", ("all",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.kernel = nn.Parameter(torch.ones(4, 3, 2, 2))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.mean(dim=(2, 3)) * self.scale

    def feature_maps(self, images_BCHW: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        return dict.fromkeys(layers, images_BCHW)


@pytest.mark.parametrize("squash", [False, True])
def test_extract_through_the_pipeline(squash: bool) -> None:
    view = CleanView(size=8, resize=10, squash=squash, mean=(0, 0, 0), std=(1, 1, 1))
    wanted = np.array([5, 0, 3, 3, 1], np.int64)
    levels = Levels()
    values: dict[str, Any] = {"labels": wanted, "classes": (), "fingerprint": ""}
    features = how(levels, POOLED, view=view, threads=1).features(LabelledSplit(open=Patches, rows=wanted, **values))[
        "pooled"
    ]
    np.testing.assert_allclose(features, np.repeat(40 * wanted[:, None] / 255, 3, axis=1), atol=1e-3)
    assert levels.kernel.is_contiguous(memory_format=torch.channels_last)  # as the images come


def test_compiled_features_are_the_networks_own(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(setting: Compile, images: int = 5) -> Compiled | None:
        asked = how(backbone, taps, compile=setting)
        return None if asked.trunk(images) == EAGER else asked.compiled()

    monkeypatch.setattr(torch._inductor, "compile", lambda graph, _images, options: graph)
    taps, images = {**POOLED, "block2": Tap("block2", GridPool(2, 2))}, torch.randn(5, 3, 16, 16)
    backbone.train()
    compiled = ask(True)
    assert compiled
    assert backbone.training
    assert ask("auto") is None
    expected = collect(backbone, batches(images, 2), rows(5), taps)
    found = collect(backbone, batches(images, 2), rows(5), taps, compiled=compiled)
    for name, values_Nd in expected.items():
        np.testing.assert_allclose(found[name], values_Nd, rtol=1e-4, atol=1e-5)

    def broken(_graph: Any, _images: Any, options: Any) -> Any:
        raise RuntimeError("C++ compile error")

    monkeypatch.setattr(torch._inductor, "compile", broken)
    assert ask("auto", images=10**8) is None
    assert "as it is, not compiled: inductor cannot compile wrn-10-1: C++ compile error" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"inductor cannot compile wrn-10-1: C\+\+ compile error; leave --compile"):
        ask(True)


def test_large_images_come_in_small_batches_on_a_cpu() -> None:
    sizes = (8, 32, 64, 84, 96, 112, 224, 448, 2048)
    assert [usual_batch(size, CPU) for size in sizes] == [128, 128, 128, 128, 64, 64, 16, 16, 16]
    assert usual_batch(224, torch.device("cuda")) == 128
