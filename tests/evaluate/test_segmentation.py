import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F
from voc_devkit import SIZES, write_masked_devkit

from bowstore.cli import main
from bowstore.config import ViewConfig, Workspace, dump
from bowstore.errors import DataError, MismatchError, MissingError, UsageError
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.masks import VOID, Masks, read_listed, read_masks
from bowstore.evaluate.protocol import Features, SplitFeatures
from bowstore.evaluate.protocols.segmentation import KIND, SegmentationSettings, describe, resolve
from bowstore.evaluate.results import Result, read_result
from bowstore.evaluate.runner import evaluate
from bowstore.evaluate.segmentation import (
    HeadConfig,
    compare,
    data,
    interpolation,
    intersection_over_union,
    learning_rate,
    pixel_loss,
    score,
    taps,
    train_head,
    upsampled,
)
from bowstore.models.saved import network_of, save_backbone

CPU = torch.device("cpu")
WORKSPACE = Workspace()
of_run = {"name": "r", "task": "words", "view": dump(ViewConfig(size=24)), "model": {"arch": "wrn-10-1"}}
NETWORK = network_of(of_run, "test")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return write_masked_devkit(tmp_path)


def masks_of(*masks_HW: list[list[int]], tmp_path: Path) -> Masks:
    """Masks as they are read of files, each with an image of its size."""
    voc = write_masked_devkit(tmp_path, train=len(masks_HW))
    listed = read_listed(voc, "train")
    for image, path, mask in zip(listed.images, listed.masks, masks_HW, strict=True):
        pixels = np.array(mask, np.uint8)
        Image.fromarray(pixels).save(path)
        Image.fromarray(pixels).convert("RGB").save(image)
    return read_masks(listed, None, "masks")


def test_learning_rates() -> None:
    rates = [learning_rate(step, 3640, HeadConfig()) for step in (0, 1, 1820, 3276, 3639)]
    assert rates == pytest.approx([0.01, 0.00999752743, 0.00535886731, 0.00125892541, 6.23747e-06], rel=1e-5)


def test_a_place_lies_in_the_middle_of_its_pixels() -> None:
    """As with align_corners false: of two places and four pixels, none but the outer ones has a place's own value."""
    assert interpolation(2, 4).tolist() == [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    assert upsampled(torch.arange(4.0).reshape(1, 1, 2, 2), (4, 4))[0, 0].tolist() == [
        [0.0, 0.25, 0.75, 1.0],
        [0.5, 0.75, 1.25, 1.5],
        [1.5, 1.75, 2.25, 2.5],
        [2.0, 2.25, 2.75, 3.0],
    ]


@pytest.mark.parametrize("pixels", [(9, 7), (5, 4), (4, 5), (64, 80)])
def test_upsampling_is_that_of_torch(pixels: tuple[int, int]) -> None:
    logits_BKhw = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = F.interpolate(logits_BKhw, size=pixels, mode="bilinear", align_corners=False)
    assert torch.allclose(upsampled(logits_BKhw, pixels), expected, rtol=0, atol=1e-12)


def test_loss_and_gradient_are_those_of_all_images_together() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BKhw = torch.randn(3, 21, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    class_BHW = torch.randint(0, 21, (3, 10, 12), generator=generator)
    class_BHW[0, :3] = VOID
    pixels = F.interpolate(logits_BKhw, size=(10, 12), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(pixels, class_BHW, ignore_index=VOID)
    (gradient_BKhw,) = torch.autograd.grad(expected, logits_BKhw)
    found = pixel_loss(logits_BKhw.detach(), class_BHW)
    assert found[0].item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(found[1], gradient_BKhw, rtol=0, atol=1e-15)
    nothing = pixel_loss(logits_BKhw.detach(), torch.full_like(class_BHW, VOID))
    assert nothing[0] == 0
    assert not nothing[1].any()


def test_intersection_over_union_by_hand(tmp_path: Path) -> None:
    """Of all images together, not a mean over images; void pixels count nowhere, nor does a class in no mask."""
    masks = masks_of([[0, 0, 1], [1, 2, VOID]], [[0, 0, 0], [0, 0, VOID]], tmp_path=tmp_path)
    given_NHW = torch.tensor([[[0, 1, 1], [1, 0, 2]], [[0, 0, 0], [7, 1, 7]]])
    logits_NKhw = F.one_hot(given_NHW, 21).permute(0, 3, 1, 2).float()
    confusion_KK = compare(torch.nn.Identity(), logits_NKhw, masks, device=CPU)
    assert confusion_KK[:3, :3].tolist() == [[4, 2, 0], [0, 2, 0], [1, 0, 0]]
    assert confusion_KK[0, 7] == 1
    assert confusion_KK.sum() == 10
    iou_K = intersection_over_union(confusion_KK)
    assert iou_K[:3].tolist() == [4 / 8, 2 / 4, 0]  # true and given, over true or given
    assert np.isnan(iou_K[3:]).all()


def test_masks_are_squashed_to_the_nearest_pixel(tmp_path: Path) -> None:
    masks_of([[1, 2, 3, 4], [5, 6, 7, 8]], tmp_path=tmp_path)
    listed = read_listed(tmp_path / "VOCdevkit/VOC2012", "train")
    masks = read_masks(listed, 2, "masks")
    assert masks[0].tolist() == [[2, 4], [6, 8]]  # the middle of two pixels belongs to the second
    assert np.flatnonzero(masks.present_NK[0]).tolist() == list(range(1, 9))
    assert masks.fingerprint == read_masks(listed, None, "masks").fingerprint


def features_of(settings: SegmentationSettings, maps: Callable[[NDArray[np.uint8]], NDArray[np.float32]]) -> Features:
    """Features of both splits, of the map that is made of each mask, squashed to the map's side."""
    splits = {}
    for name, split in data(settings, WORKSPACE).splits.items():
        assert settings.voc
        masks = read_masks(read_listed(settings.voc, name), 4, "masks")  # type: ignore[arg-type]
        features = np.stack([maps(masks[row]).ravel() for row in split.rows])
        splits[name] = SplitFeatures(
            taps={"map": features}, labels=split.labels, classes=split.classes, variation={"map": 1.0}
        )
    return Features(splits=splits)


def encoded(mask_44: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A map that says the class of each place."""
    return (np.arange(3)[:, None, None] == np.where(mask_44 == VOID, 0, mask_44)).astype(np.float32)


def test_a_map_that_holds_the_class_is_segmented_without_a_fault(tmp_path: Path) -> None:
    voc = write_masked_devkit(tmp_path, val=6)
    for path in (voc / "SegmentationClass").iterdir():  # one class an image, so that no border is smoothed
        mask_HW = np.array(Image.open(path))
        mask_HW[mask_HW != VOID] = mask_HW[0, 0]
        Image.fromarray(mask_HW).save(path)
    settings = SegmentationSettings(voc=voc, size=32, stride=8)
    scores = score(features_of(settings, encoded), settings)
    assert scores.metrics == {"miou": 1.0, "pixel_accuracy": 1.0}
    assert list(scores.details["iou"].values()) == [1.0, 1.0, 1.0, *[None] * 18]
    assert len(scores.details["losses"]) == 40
    assert scores.settings["map"] == [3, 4, 4]
    again = score(features_of(settings, encoded), settings)
    assert again.details["losses"] == scores.details["losses"]
    other = settings.model_copy(update={"seed": 1})
    assert score(features_of(other, encoded), other).details["losses"] != scores.details["losses"]


def test_a_loss_that_is_no_number_is_said(tmp_path: Path) -> None:
    masks = masks_of(*[[[0, 1], [2, 3]]] * 16, tmp_path=tmp_path)
    with pytest.raises(DataError, match=r"the loss is nan in epoch 1 of 40, of maps with values up to nan; look"):
        train_head(torch.full((16, 1, 2, 2), torch.nan), masks, config=HeadConfig(), device=CPU)


def test_the_id_says_what_changes_the_number() -> None:
    def described(**settings: object) -> str:
        return describe(SegmentationSettings.model_validate(settings)).id

    assert described() == "segmentation/voc12/squash448-stride32/masks448"
    assert described(seed=1, voc="x") == described()
    assert described(trainaug=True, masks=100) == "segmentation/voc12-trainaug/squash448-stride32/masks100"
    assert described(layer="conv4", stride=16, size=224, original=True) == (
        "segmentation/voc12/conv4/squash224-stride16/masks224-original"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("segmentation", r"--batch .* learns 16 at a time\.  ?\[default: 16\]"),
        ("voc0712-detection", r"of 16 images an iteration .* 4 images of 128 px an iteration"),
    ],
)
def test_help_says_how_many_images_a_batch_has(name: str, said: str) -> None:
    text = " ".join(CliRunner().invoke(main, ["eval", name, "--help"]).output.split())
    assert re.search(said, text)
    assert "[default: 128]" not in text


class Grid(NamedTuple):
    grid: tuple[int, int]


def test_a_map_of_another_stride_is_refused() -> None:
    backbone = NETWORK.fresh()
    assert str(taps(backbone, SegmentationSettings(stride=4), 448)["map"]) == "block3 map"
    assert str(taps(backbone, SegmentationSettings(stride=2, layer="block2"), 448)["map"]) == "block2 map"
    with pytest.raises(
        UsageError, match=r"block3 of wrn-10-1 has a map of 112 x 112 .* says stride 32; give --stride 4$"
    ):
        taps(backbone, SegmentationSettings(), 448)
    assert taps(backbone, SegmentationSettings(stride=4, size=61), 61)
    with pytest.raises(UsageError, match=r"of 13 x 13 places .* says stride 5; give --stride 4$"):
        taps(backbone, SegmentationSettings(stride=5, size=49), 49)  # which would make 10 x 10
    odd = SimpleNamespace(arch="odd", layers=["last"], resolve=str, layer_table=lambda _: {"last": Grid((100, 100))})
    with pytest.raises(UsageError, match=r"last of odd has a map of 100 x 100 .* says stride 5; give another --size$"):
        taps(odd, SegmentationSettings(stride=5), 448)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="conv9"):
        taps(backbone, SegmentationSettings(layer="conv9"), 448)


def list_of(voc: Path, name: str) -> Path:
    return voc / "ImageSets/Segmentation" / name


def mask(voc: Path) -> Path:
    return voc / "SegmentationClass/2007_val_01.png"


def save(path: Path, value: int = 0, size: tuple[int, int] = (44, 60), mode: str = "L") -> None:
    image = Image.new(mode, size, value)
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    image.save(path)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda voc: shutil.rmtree(voc), MissingError, r"no folder .*2012/JPEGImages; name the devkit \(VOCdevkit\)"),
        (lambda voc: list_of(voc, "val.txt").unlink(), MissingError, r"Segmentation/val.txt; extract VOCtrainval_11"),
        (lambda voc: list_of(voc, "val.txt").write_text("\n"), DataError, r"val.txt names no image"),
        (lambda voc: mask(voc).unlink(), MissingError, r"val.txt: no mask .*val_01.png \(1 of 4 are missing\)"),
        (
            lambda voc: (voc / "JPEGImages/2007_val_00.jpg").unlink(),
            MissingError,
            r"val.txt: no image .*val_00.jpg \(1 of 4 are missing\); extract VOCtrainval",
        ),
        (
            lambda voc: list_of(voc, "val.txt").write_text("2007_val_00\n2007_val_00\n"),
            DataError,
            r"val.txt: image 2007_val_00 is listed 2 times",
        ),
        (
            lambda voc: list_of(voc, "val.txt").write_text("2007_train_00\n"),
            MismatchError,
            r"Segmentation: 1 images are in the lists of both train and test \(first: 2007_train_00\)",
        ),
        (
            lambda voc: list_of(voc, "train.txt").write_text("2007_train_00\n"),
            DataError,
            r"train.txt lists 1 images, and a batch has 16; list at least 16",
        ),
        (
            lambda voc: save(mask(voc), size=(60, 44)),
            DataError,
            r"val_01.png has 44 x 60 pixels, and its image 60 x 44; they must be of one size",
        ),
        (
            lambda voc: save(mask(voc), value=21),
            DataError,
            r"val_01.png has 2640 pixels of other values than 0 to 20 and 255 \(the least is 21\)",
        ),
        (lambda voc: save(mask(voc), value=254, mode="P"), DataError, r"\(the least is 254\); masks of VOC12 hold"),
        (lambda voc: save(mask(voc), mode="RGB"), DataError, r"val_01.png has pixels of mode RGB; masks are"),
        (lambda voc: mask(voc).write_bytes(b"\x89PNG"), DataError, r"val_01.png is no PNG that can be decoded"),
        (
            lambda voc: (voc / "JPEGImages/2007_val_01.jpg").write_bytes(b"nothing"),
            DataError,
            r"image .*val_01.jpg cannot be opened \(cannot identify image file",
        ),
        (
            lambda voc: [save(path, 255, SIZES[n % 3]) for n, path in enumerate(read_listed(voc, "val").masks)],
            DataError,
            r"val.txt: its masks hold nothing but 255 \(void\); list images with objects",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_devkit_is_one_line(
    voc: Path, spoil: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    spoil(voc)
    with pytest.raises(error, match=message) as raised:
        data(resolve(SegmentationSettings(voc=voc.parent), WORKSPACE), WORKSPACE)
    assert "\n" not in str(raised.value)


def test_the_augmented_list_has_masks_of_its_own(voc: Path) -> None:
    settings = SegmentationSettings(voc=voc, trainaug=True)
    with pytest.raises(MissingError, match=r"no list .*trainaug.txt; put the augmented list there and its masks into"):
        data(settings, WORKSPACE)
    folder = voc / "ImageSets/SegmentationAug"
    folder.mkdir()
    ids = list_of(voc, "train.txt").read_text().split()
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in ids]
    (folder / "train_aug.txt").write_text("".join(lines))
    with pytest.raises(
        MissingError, match=r"no mask .*ClassAug/2007_train_00.png \(16 of 16 are missing\); .*leave --trainaug out"
    ):
        data(settings, WORKSPACE)
    shutil.copytree(voc / "SegmentationClass", voc / "SegmentationClassAug")
    for path in (voc / "SegmentationClassAug").iterdir():  # as they are distributed
        Image.fromarray(np.array(Image.open(path))).save(path)
    found = data(settings, WORKSPACE)
    assert found.inputs.keys() == {"train", "test"}
    plain = data(SegmentationSettings(voc=voc), WORKSPACE)
    assert (found["train"].labels == plain["train"].labels).all()


class TestWhole:
    def evaluate(self, voc: Path, out: Path, how: dict[str, object] | None = None, **options: object) -> Result:
        save_backbone(out / "net.safetensors", NETWORK.fresh(), NETWORK)
        config = EvalConfig.model_validate({"run": str(out / "net.safetensors")} | (how or {}))
        settings = SegmentationSettings.model_validate({"size": 32, "stride": 4} | options)
        return evaluate(KIND, settings, config, Workspace(voc=voc.parent))

    def test_from_devkit_to_result_file(self, voc: Path, tmp_path: Path) -> None:
        result = self.evaluate(voc, tmp_path)
        assert result.metrics["miou"] > 0.9  # colours are all that has to be told apart
        assert result.metrics["pixel_accuracy"] > 0.95
        path = tmp_path / "net/eval/segmentation-voc12-squash32-stride4-masks32.json"
        assert read_result(path) == result
        assert (result.settings["batch"], result.settings["images"]) == (16, {"train": 16, "val": 4})
        assert result.settings["taps"] == {"map": {"of": "block3 map", "dims": 64 * 8 * 8}}
        assert (result.settings["view"]["size"], result.settings["view"]["resize"]) == (32, None)
        again = self.evaluate(voc, tmp_path, batch=8)
        assert (again.metrics, again.settings["batch"]) == (result.metrics, 8)

    def test_masks_of_their_own_size(self, voc: Path, tmp_path: Path) -> None:
        result = self.evaluate(voc, tmp_path, {"dtype": "float16"}, masks=16, original=True)
        assert result.settings["dtype"] == "float16"
        assert result.protocol == "segmentation/voc12/squash32-stride4/masks16-original"
        assert result.metrics["miou"] > 0.9
        masks = read_masks(read_listed(voc, "val"), None, "masks")
        counted = sum(int((masks[row] != VOID).sum()) for row in range(4))
        assert np.sum(result.details["confusion"]) == counted
