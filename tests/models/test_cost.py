"""What networks and heads cost, against counts by hand and the figures that torchvision publishes."""

import json
from typing import Any

import pytest
import torch
import torchvision
from click.testing import CliRunner

from bowstore.cli import main
from bowstore.config import ModelConfig
from bowstore.errors import UsageError
from bowstore.models.cost import HEADS, Cost, head_cost, trunk_cost
from bowstore.models.registry import build_backbone


def costs(arch: str, size: int, outputs: int | None = None, **model: Any) -> dict[str, Cost]:
    with torch.device("meta"):
        backbone = build_backbone(ModelConfig(arch=arch, **model))
    heads = {name: head_cost(name, backbone, size, outputs) for name in HEADS if outputs or not HEADS[name].sized}
    return {"trunk": trunk_cost(backbone, size), **heads}


def test_a_wide_networks_trunk_and_heads_by_hand() -> None:
    """WRN-10-2 at 32 px: every convolution, batch norm and linear layer."""
    found = costs("wrn-10-2", 32, 12)
    stem, widths, cells = 9 * 3 * 16, ((16, 32), (32, 64), (64, 128)), (1024, 256, 64)
    weights = [9 * a * b + 9 * b * b + a * b for a, b in widths]
    norms = sum(2 * a + 2 * b for a, b in widths) + 2 * 128
    assert found["trunk"].parameters == stem + sum(weights) + norms
    assert found["trunk"].multiply_adds == 1024 * stem + sum(n * w for n, w in zip(cells, weights, strict=True))
    # One more block of stride 2 on the 8 x 8 map, batch norm, and a linear layer of four.
    block = 2 * 9 * 128 * 128 + 128 * 128
    assert found["rotation"].parameters == block + 4 * 128 + 2 * 128 + 4 * 128 + 4
    assert found["rotation"].multiply_adds == 16 * block + 4 * 128
    assert (found["words"].parameters, found["words"].multiply_adds) == (12 * 128 + 1, 12 * 128)
    assert found["clusters"].parameters == 12 * 128 + 1 + 4 * 128 + 4  # and the rotations beside them
    assert found["clusters"].multiply_adds == 12 * 128 + 4 * 128
    assert (found["supervised"].parameters, found["supervised"].multiply_adds) == (12 * 128 + 12, 12 * 128)
    # Pairs: two features to twice the width, batch norm, eight places; of the eight pairs of an image.
    assert found["location"].parameters == 256 * 256 + 2 * 256 + 8 * 256 + 8
    assert found["location"].multiply_adds == 8 * (256 * 256 + 8 * 256)
    # Grids of at most 9216 dimensions: 24 x 24 of 16 channels, 16 x 16 of 32, 12 x 12 of 64, 8 x 8 of 128; 128 pooled.
    dims = 24 * 24 * 16 + 16 * 16 * 32 + 12 * 12 * 64 + 8 * 8 * 128 + 128
    assert (found["linear"].parameters, found["linear"].multiply_adds) == (12 * dims + 5 * 12, 12 * dims)


def test_networks_of_the_paper_cost_what_is_known_of_them() -> None:
    wide = costs("wrn-28-10", 32, 10)
    assert wide["trunk"].parameters + wide["supervised"].parameters == 36_479_194  # 36.5 M (Zagoruyko, 2016)
    assert wide["trunk"].multiply_adds / 1e9 == pytest.approx(5.24, abs=0.01)
    # Four blocks of two 3x3 convolutions of 640 channels, at 4 x 4; a shortcut, nine batch norms, a linear layer.
    assert wide["rotation"].parameters == 8 * 9 * 640**2 + 640**2 + 9 * 2 * 640 + 4 * 640 + 4
    assert wide["rotation"].multiply_adds == 16 * (8 * 9 * 640**2 + 640**2) + 4 * 640
    narrow, weights, norms = costs("wrn-28-4", 84, strides=(2, 2, 2)), 9 * 3 * 16, 2 * 256
    for a, b in ((16, 64), (64, 128), (128, 256)):
        weights += 9 * a * b + 9 * b * b + a * b + 6 * 9 * b * b
        norms += 2 * a + 7 * 2 * b
    assert narrow["trunk"].parameters == weights + norms == 5_846_480  # 5.8 M


@pytest.mark.parametrize("name", ["ResNet18", "ResNet50"])
def test_residual_networks_cost_what_torchvision_says(name: str) -> None:
    published = getattr(torchvision.models, f"{name}_Weights").IMAGENET1K_V1.meta
    found = costs(name.lower(), 224, 1000)
    assert found["trunk"].parameters + found["supervised"].parameters == published["num_params"]
    multiply_adds = found["trunk"].multiply_adds + found["supervised"].multiply_adds
    assert multiply_adds / 1e9 == pytest.approx(published["_ops"], abs=6e-4)
    if name == "ResNet50":
        assert published["num_params"] == 25_557_032


def test_v1_costs_less_where_its_strides_come_first() -> None:
    """By hand: three 1x1 convolutions on a quarter of the places. He et al. (2015) say 3.8 G."""
    early, late = costs("resnet50-v1", 224), costs("resnet50", 224)
    saved = sum(
        c_in * c_out * (side**2 - (side // 2) ** 2)
        for c_in, c_out, side in ((256, 128, 56), (512, 256, 28), (1024, 512, 14))
    )
    assert early["trunk"].multiply_adds == late["trunk"].multiply_adds - saved == 3_855_925_248
    assert early["trunk"].parameters == late["trunk"].parameters == 23_508_032


def test_the_command_tells_what_heads_cost_against_the_trunk() -> None:
    def told(*args: str) -> Any:
        return CliRunner().invoke(main, ["layers", "wrn-28-10", "--size", "32", *args])

    result = told("--head", "rotation", "--head", "words", "--K", "2048")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-3:] == [
        "trunk: 36,472,784 parameters, 5.243 G multiply-adds an image, forward",
        "head rotation: 29,914,884 parameters (82 % of the trunk's), 0.4784 G multiply-adds (9.1 %)",
        "head words of 2048 outputs: 1,310,721 parameters (3.6 % of the trunk's), 0.001311 G multiply-adds (0.025 %)",
    ]
    inputs = 16 * 24**2 + 160 * 7**2 + 320 * 5**2 + 640 * 3**2 + 640
    assert inputs * 10_000 == 314_560_000
    assert told("--head", "linear", "--K", "10000").output.splitlines()[-1] == (
        "head linear of 10000 outputs: 314,610,000 parameters (860 % of the trunk's), 0.3146 G multiply-adds (6 %)"
    )
    assert "6,410 parameters (0.018 % of the trunk's), 0.0000064 G multiply-adds (0.00012 %)" in (
        told("--head", "supervised", "--K", "10").output
    )
    values = json.loads(told("--head", "rotation", "--json").output)
    assert values["trunk"] == {"parameters": 36_472_784, "multiply_adds": 5_243_322_368}
    assert values["heads"] == [
        {"name": "rotation", "parameters": 29_914_884, "multiply_adds": 478_415_360, "outputs": None, "inputs": 1}
    ]
    values = json.loads(told("--strides", "2", "2", "2", "--json").output)
    assert values["layers"][-1]["grid"] == [4, 4]
    for args, message in (
        (["--head", "words"], "head words has an output for each word or class; give their number, as in --K 2048"),
        (["--head", "rotations"], "no head 'rotations'; did you mean 'rotation'? there are rotation, location, words,"),
    ):
        result = told(*args)
        assert result.exit_code == 2
        assert message in result.output
        assert len(result.output.splitlines()) == 1
    result = CliRunner().invoke(main, ["layers", "resnet18", "--strides", "2", "2", "2"])
    assert result.exit_code == 2
    assert "--strides are those of a wide ResNet's groups, and resnet18 has its own; leave them out" in result.output
    text = CliRunner().invoke(main, ["layers", "--help"]).output
    assert all(name in text for name in HEADS)


def test_a_head_of_unknown_width_is_refused() -> None:
    with torch.device("meta"):
        backbone = build_backbone(ModelConfig(arch="wrn-10-1"))
    with pytest.raises(UsageError, match="head linear has an output for each"):
        head_cost("linear", backbone, 32)
