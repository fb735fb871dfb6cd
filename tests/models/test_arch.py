"""What is known of built-in networks before they are built, against the networks."""

import subprocess
import sys

import pytest
import torch

from bowstore.config import ModelConfig
from bowstore.errors import UsageError
from bowstore.models.arch import RESNETS, built_in, own_layer, stage_shapes
from bowstore.models.registry import build_backbone


@pytest.mark.parametrize("arch", [*RESNETS, "wrn-10-1", "wrn-16-2", "wrn-28-10"])
def test_stages_are_those_of_the_network(arch: str) -> None:
    for strides in ((1, 2, 2), (2, 2, 2), (2, 3, 1)) if arch == "wrn-10-1" else ((1, 2, 2),):
        model = ModelConfig(arch=arch, strides=strides)
        with torch.device("meta"):
            backbone = build_backbone(model)
        for size in (32, 84, 225) if arch in ("wrn-10-1", "resnet18") else (96,):
            shapes = stage_shapes(model, size)
            assert shapes is not None
            maps = backbone.eval().feature_maps(torch.zeros(1, 3, size, size, device="meta"), backbone.layers)
            assert tuple(shapes) == backbone.layers
            for stage, map_1chw in maps.items():
                assert (shapes[stage].channels, *shapes[stage].grid) == map_1chw.shape[1:], (strides, size, stage)


def test_names_are_those_of_the_network() -> None:
    backbone = build_backbone(ModelConfig(arch="torchvision:resnet18"))
    assert built_in("torchvision:resnet18") == backbone.arch == "resnet18"
    for layer in ("layer3", "layer3.1", "maxpool", "conv4", "conv1.bn1"):
        assert backbone.resolve(layer) == own_layer(layer)
    for arch in ("timm:resnet18", "torchvision:mobilenet_v2"):
        assert stage_shapes(ModelConfig(arch=arch), 224) is None


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("wrn-11-1", r"model\.arch 'wrn-11-1': depth 11 must be 6 n \+ 4"),
        ("resnet55", r"model\.arch 'resnet55' is unknown; did you mean 'resnet50'\? known: wrn-DEPTH-WIDTH, resnet18"),
    ],
)
def test_names_of_nothing_are_one_line(arch: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stage_shapes(ModelConfig(arch=arch), 32)


def test_it_loads_no_torch() -> None:
    code = "import sys, bowstore.models.arch, bowstore.models.record; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
