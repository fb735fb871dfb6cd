from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import Bottleneck

from bowstore.config import ModelConfig, validate
from bowstore.errors import MismatchError, UsageError
from bowstore.models.heads import CosineHead, RotationHead, group_depth
from bowstore.models.registry import build_backbone
from bowstore.models.saved import load_weights
from bowstore.models.wide_resnet import Group
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import World
from bowstore.train.tasks.task import build_task


@pytest.mark.parametrize(
    ("arch", "strides", "size", "grid", "features", "million"),
    [
        ("wrn-28-10", (1, 2, 2), 32, 8, 640, 36.47),
        ("wrn-28-4", (2, 2, 2), 80, 10, 256, 5.84),
        ("wrn-28-4", (2, 2, 2), 84, 11, 256, 5.84),
        ("wrn-10-1", (1, 2, 2), 32, 8, 64, 0.077),
        ("resnet18", (1, 2, 2), 64, 2, 512, 11.18),
        ("resnet50", (1, 2, 2), 64, 2, 2048, 23.51),
        ("resnet50-v1", (1, 2, 2), 64, 2, 2048, 23.51),
    ],
)
def test_sizes(arch: str, strides: tuple[int, int, int], size: int, grid: int, features: int, million: float) -> None:
    backbone = build_backbone(ModelConfig(arch=arch, strides=strides)).eval()
    last = backbone.layers[-1]
    with torch.no_grad():
        maps = backbone.feature_maps(torch.randn(1, 3, size, size), (last,))
    assert maps[last].shape == (1, features, grid, grid)
    assert backbone.features == features
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(million, rel=0.01)


def test_resnet50_has_the_papers_maps() -> None:
    backbone = build_backbone(ModelConfig(arch="resnet50")).eval()
    with torch.no_grad():
        maps = backbone.feature_maps(torch.randn(1, 3, 224, 224), ("conv4", "conv5"))
    assert maps["conv4"].shape == (1, 1024, 14, 14)
    assert maps["conv5"].shape == (1, 2048, 7, 7)
    assert backbone.channels == {"conv1": 64, "pool1": 64, "conv2": 256, "conv3": 512, "conv4": 1024, "conv5": 2048}


def test_v1_has_its_strides_in_the_first_convolution_of_a_bottleneck() -> None:
    """As He et al.; torchvision's have them in the 3x3. The rotation head's group is of the network's kind."""
    with torch.device("meta"):
        for arch, first, second in (("resnet50-v1", (2, 2), (1, 1)), ("resnet50", (1, 1), (2, 2))):
            backbone = build_backbone(ModelConfig(arch=arch))
            assert backbone.arch == arch
            stages = [*(backbone.root().get_submodule(name) for name in ("conv3", "conv4", "conv5"))]
            for stage in [*stages, RotationHead(backbone).stage]:
                blocks = [module for module in stage.modules() if isinstance(module, Bottleneck)]
                assert (blocks[0].conv1.stride, blocks[0].conv2.stride) == (first, second)
                assert {block.conv1.stride for block in blocks[1:]} == {(1, 1)}
                assert {block.conv2.stride for block in blocks[1:]} == {(1, 1)}


def test_the_pooled_feature_is_the_mean_of_the_last_map() -> None:
    backbone = build_backbone(ModelConfig(arch="wrn-10-1")).eval()
    images = torch.randn(3, 3, 32, 32)
    pooled = backbone(images)
    assert torch.equal(pooled, backbone.feature_maps(images, ("block3",))["block3"].mean((2, 3)))


def test_nothing_deeper_than_the_asked_layer_is_run() -> None:
    backbone = build_backbone(ModelConfig(arch="wrn-10-1"))

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("ran a layer that nobody asked for")

    backbone.stages["block3"] = Fails()
    assert set(backbone.feature_maps(torch.randn(1, 3, 32, 32), ("block1", "block2"))) == {"block1", "block2"}


def test_unknown_names() -> None:
    backbone = build_backbone(ModelConfig(arch="wrn-10-1"))
    with pytest.raises(UsageError, match="wrn-10-1 has no layer 'conv4'; its layers are conv1, block1, block2, block3"):
        backbone.feature_maps(torch.randn(1, 3, 32, 32), ("conv4",))
    with pytest.raises(UsageError, match=r"model\.arch 'resnet5' is unknown; did you mean 'resnet50'"):
        build_backbone(ModelConfig(arch="resnet5"))
    with pytest.raises(UsageError, match=r"depth 27 must be 6 n \+ 4"):
        build_backbone(ModelConfig(arch="wrn-27-10"))


def test_the_cosine_head_is_equation_5() -> None:
    head = CosineHead(16, 9, gamma=2.5)
    features = torch.randn(4, 16)
    logits = head(features)
    for b in range(4):
        for k in range(9):
            word = head.weight[k]
            assert logits[b, k].item() == pytest.approx((2.5 * features[b] @ word / word.norm()).item(), abs=1e-5)
    assert [name for name, _ in head.named_parameters()] == ["weight", "gamma"]
    assert head.gamma.ndim == 0


@pytest.mark.parametrize(
    ("arch", "blocks", "convolutions"),
    [
        ("wrn-10-1", 1, 3),  # two in each block, and the shortcut of the first
        ("wrn-28-1", 4, 9),
        ("resnet18", 2, 5),
        ("resnet50", 3, 10),
        ("timm:resnet18", 2, 7),
        ("timm:lcnet_035", 1, 4),
        ("timm:tf_efficientnet_lite0", 1, 4),
    ],
)
def test_the_rotation_head_is_one_more_group_as_deep_as_the_backbones_own(
    arch: str, blocks: int, convolutions: int
) -> None:
    with torch.device("meta"):
        backbone = build_backbone(ModelConfig(arch=arch))
        head = RotationHead(backbone)
        maps = torch.randn(2, backbone.features, 8, 8)
    assert group_depth(backbone) == blocks
    found = [module for module in head.stage.modules() if isinstance(module, nn.Conv2d)]
    assert len(found) == convolutions
    assert [c.stride for c in found if c.stride != (1, 1)] == [(2, 2), (2, 2)]  # of the first block, and its shortcut
    assert head.stage(maps).shape == (2, backbone.features, 4, 4)
    assert head.linear.weight.shape == (4, backbone.features)  # not called: PyTorch 2.11 has no autocast for `meta`


def test_a_width_that_no_bottleneck_has_gets_a_basic_block() -> None:
    backbone = build_backbone(ModelConfig(arch="wrn-10-1"))
    backbone.arch, backbone.features = "timm:other", 90
    assert RotationHead(backbone, 2).stage(torch.randn(2, 90, 4, 4)).shape == (2, 90, 2, 2)


@pytest.mark.parametrize("arch", ["wrn-10-1", "resnet50"])
def test_a_head_of_one_block_is_that_of_older_runs(arch: str) -> None:
    """Names and draws: checkpoints load, and a seed gives the weights that it gave."""
    torch.manual_seed(5)
    backbone = build_backbone(ModelConfig(arch=arch))
    state = RotationHead(backbone, 1).state_dict()
    torch.manual_seed(5)
    build_backbone(ModelConfig(arch=arch))
    if arch == "wrn-10-1":
        old: nn.Module = nn.Sequential(Group(64, 64, stride=2, blocks=1), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
        assert state.keys() == RotationHead(backbone).state_dict().keys()
    else:
        shortcut = nn.Sequential(nn.Conv2d(2048, 2048, 1, stride=2, bias=False), nn.BatchNorm2d(2048))
        old = Bottleneck(2048, 512, stride=2, downsample=shortcut)
    assert state.keys() == {*(f"stage.{name}" for name in old.state_dict()), "linear.weight", "linear.bias"}
    assert all(torch.equal(state[f"stage.{name}"], tensor) for name, tensor in old.state_dict().items())


def test_the_seed_decides_the_weights() -> None:
    nets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nets.append(build_backbone(ModelConfig(arch="wrn-10-1")).state_dict()["stages.conv1.weight"])
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])


def test_the_depth_of_the_rotation_head_is_a_setting() -> None:
    values = {"name": "r", "task": "rotation", "view": {"cutmix": False}, "model": {"arch": "wrn-16-1"}}
    index: Any = SimpleNamespace(fingerprint="0")
    heads = {}
    for blocks in (None, 1, 3):
        config = TrainConfig.model_validate({**values, "rotation": {"blocks": blocks}})
        heads[blocks] = build_task(config, index, World(0, 1, torch.device("cpu"))).network.head
        assert len(heads[blocks].stage[0]) == (blocks or 2)  # type: ignore[index, arg-type]
    with pytest.raises(MismatchError, match=r"settings of its task \(task\.blocks was 1 before there was"):
        load_weights(heads[None], heads[1].state_dict(), "runs/old")


def test_rotations_are_told_by_a_linear_layer_alone_if_asked() -> None:
    values = {"name": "r", "view": {"size": 32, "resize": None, "cutmix": False}, "model": {"arch": "wrn-10-1"}}
    index: Any = SimpleNamespace(fingerprint="0")
    network = {}
    for head in ("block", "linear"):
        config = TrainConfig.model_validate({**values, "task": {"name": "rotation", "head": head}})
        network[head] = build_task(config, index, World(0, 1, torch.device("cpu"))).network.eval()
    images_BCHW = torch.randn(3, 3, 32, 32)
    one, other = network["linear"], network["block"]
    assert {name: tuple(value.shape) for name, value in one.head.state_dict().items()} == {
        "weight": (4, 64),
        "bias": (4,),
    }
    expected = F.linear(one.backbone(images_BCHW), one.head.weight, one.head.bias)
    torch.testing.assert_close(one(images_BCHW), expected)
    trunks = [it.backbone.state_dict() for it in (one, other)]
    assert all(torch.equal(trunks[0][name], trunks[1][name]) for name in trunks[0])  # the heads differ, and no more
    with pytest.raises(UsageError, match=r"task: blocks 2 are those of head block; leave them out with head linear"):
        validate(TrainConfig, {**values, "task": {"name": "rotation", "head": "linear", "blocks": 2}}, "x")
