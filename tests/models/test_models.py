import pytest
import torch
from torch import nn

from bowstore.config import ModelConfig
from bowstore.errors import UsageError
from bowstore.models.heads import CosineHead, RotationHead
from bowstore.models.registry import build_backbone


@pytest.mark.parametrize(
    ("arch", "strides", "size", "grid", "features", "million"),
    [
        ("wrn-28-10", (1, 2, 2), 32, 8, 640, 36.47),
        ("wrn-28-4", (2, 2, 2), 80, 10, 256, 5.84),
        ("wrn-10-1", (1, 2, 2), 32, 8, 64, 0.077),
        ("resnet18", (1, 2, 2), 64, 2, 512, 11.18),
        ("resnet50", (1, 2, 2), 64, 2, 2048, 23.51),
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
    assert backbone.channels == {"conv1": 64, "conv2": 256, "conv3": 512, "conv4": 1024, "conv5": 2048}


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


@pytest.mark.parametrize("arch", ["wrn-10-1", "resnet18", "resnet50"])
def test_the_rotation_head_has_one_more_residual_stage(arch: str) -> None:
    backbone = build_backbone(ModelConfig(arch=arch))
    head = RotationHead(backbone).eval()
    maps = torch.randn(2, backbone.features, 8, 8)
    assert head.stage(maps).shape == (2, backbone.features, 4, 4)
    assert head(maps).shape == (2, 4)


def test_the_seed_decides_the_weights() -> None:
    nets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nets.append(build_backbone(ModelConfig(arch="wrn-10-1")).state_dict()["stages.conv1.weight"])
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])
