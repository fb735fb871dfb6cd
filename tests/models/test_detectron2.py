"""Residual networks under Detectron2's names: the mapping alone, as Detectron2 is not installed."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from bowstore.config import ExportConfig, ModelConfig, ViewConfig
from bowstore.errors import UsageError
from bowstore.models.detectron2 import detectron2_lines, detectron2_name
from bowstore.models.export import export_network
from bowstore.models.saved import EXPORTED, SavedNetwork, load_backbone, save_backbone

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def names_there(blocks: tuple[int, ...], convolutions: int, *, first_shortcut: bool) -> set[str]:
    """The names of a network of Detectron2's: its stem, and convolutions with their norms in each block."""
    places = ["stem.conv1"]
    for stage, count in enumerate(blocks, 2):
        for block in range(count):
            places += [f"res{stage}.{block}.conv{n}" for n in range(1, convolutions + 1)]
        if stage > 2 or first_shortcut:
            places.append(f"res{stage}.0.shortcut")
    return {f"{place}.weight" for place in places} | {f"{place}.norm.{name}" for place in places for name in NORM}


@pytest.mark.parametrize(
    ("arch", "blocks", "convolutions"),
    [("resnet18", (2, 2, 2, 2), 2), ("resnet50", (3, 4, 6, 3), 3), ("resnext101_32x8d", (3, 4, 23, 3), 3)],
)
def test_every_tensor_has_its_name(arch: str, blocks: tuple[int, ...], convolutions: int) -> None:
    with torch.device("meta"):
        theirs = [name for name in getattr(torchvision.models, arch)().state_dict() if not name.startswith("fc.")]
    found = {detectron2_name(name) for name in theirs}
    assert len(found) == len(theirs)
    assert found == names_there(blocks, convolutions, first_shortcut=convolutions == 3)


def test_names_by_hand() -> None:
    assert {name: detectron2_name(name) for name in (
        "conv1.weight", "bn1.running_mean", "layer1.0.bn3.weight", "layer4.2.conv2.weight",
        "layer3.0.downsample.0.weight", "layer3.0.downsample.1.bias",
    )} == {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_mean": "stem.conv1.norm.running_mean",
        "layer1.0.bn3.weight": "res2.0.conv3.norm.weight",
        "layer4.2.conv2.weight": "res5.2.conv2.weight",
        "layer3.0.downsample.0.weight": "res4.0.shortcut.weight",
        "layer3.0.downsample.1.bias": "res4.0.shortcut.norm.bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "lines"),
    [
        ("resnet50", ["DEPTH = 50", "STRIDE_IN_1X1 = False"]),
        ("resnet101-v1", ["DEPTH = 101", "STRIDE_IN_1X1 = True"]),
        ("resnet34", ["DEPTH = 34", "STRIDE_IN_1X1 = False", "RES2_OUT_CHANNELS = 64"]),
        ("resnext50_32x4d", ["DEPTH = 50", "STRIDE_IN_1X1 = False", "NUM_GROUPS = 32", "WIDTH_PER_GROUP = 4"]),
        ("wide_resnet50_2", ["DEPTH = 50", "STRIDE_IN_1X1 = False", "WIDTH_PER_GROUP = 128"]),
    ],
)
def test_what_its_configuration_has_to_say(arch: str, lines: list[str]) -> None:
    assert detectron2_lines(arch, ViewConfig(), "net.pkl") == (
        'cfg.MODEL.WEIGHTS = "net.pkl"',
        *(f"cfg.MODEL.RESNETS.{line}" for line in lines),
        "cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]",
        'cfg.INPUT.FORMAT = "RGB"',
    )


def run_of(arch: str, path: Path) -> Path:
    saved = SavedNetwork(name="first", task="words", model=ModelConfig(arch=arch))
    save_backbone(path / "first.safetensors", saved.fresh(), saved)
    return path / "first.safetensors"


@pytest.mark.parametrize("arch", ["resnet18", "timm:resnet18"])
def test_a_pickle_of_arrays(arch: str, tmp_path: Path) -> None:
    run, out = run_of(arch, tmp_path), tmp_path / "net.pkl"
    made = export_network(run, out, ExportConfig(format="detectron2"))
    assert EXPORTED.encode() in out.read_bytes()  # by which another export knows that it may replace it
    with out.open("rb") as file:
        found = pickle.load(file, encoding="latin1")
    assert (found["__author__"], found["matching_heuristics"]) == ("bowstore", True)
    assert json.loads(found[EXPORTED])["model"]["arch"] == arch
    model = found["model"]
    assert all(type(array) is np.ndarray for array in model.values())
    assert set(model) == names_there((2, 2, 2, 2), 2, first_shortcut=False)
    backbone = load_backbone(run).backbone
    names = backbone.spellings()["torchvision" if arch != "timm:resnet18" else "timm"]
    for theirs, own in names.items():
        assert np.array_equal(model[detectron2_name(theirs)], backbone.state_dict()[own].numpy())
    assert made.python[0] == f'cfg.MODEL.WEIGHTS = "{out}"'


@pytest.mark.parametrize(
    ("arch", "form", "out", "message"),
    [
        ("wrn-10-1", "detectron2", "net.pkl", r"^--format detectron2 is for residual networks \(resnet18, .*\), and "
         r"wrn-10-1 is none of them; --format safetensors holds it$"),
        ("timm:test_resnet", "detectron2", "net.pkl", r"and timm:test_resnet is none of them"),
        ("wrn-10-1", "detectron2", "net.pth", r"^net.pth does not go with --format detectron2: files for"),
        ("wrn-10-1", "timm", "net.pkl", r"^net.pkl does not go with --format timm: .* \.pkl, and no others"),
    ],
)  # fmt: skip
def test_what_is_refused(arch: str, form: str, out: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        export_network(run_of(arch, tmp_path), tmp_path / out, ExportConfig(format=form))  # type: ignore[arg-type]
    assert not (tmp_path / out).exists()
