"""How maps lie in memory while a network is trained, and what that is worth in exactness."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from bowstore.config import ModelConfig
from bowstore.models.heads import CosineHead
from bowstore.models.memory import training_format
from bowstore.models.registry import build_backbone
from bowstore.train.tasks.task import Network, pooled

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("wrn-10-1", torch.channels_last),  # the demo's: narrow
        ("wrn-28-2", torch.channels_last),
        ("wrn-28-4", torch.contiguous_format),
        ("wrn-28-10", torch.contiguous_format),
        ("resnet18", torch.contiguous_format),
        ("resnet50", torch.contiguous_format),
        ("timm:resnet18", torch.contiguous_format),
        ("torchvision:densenet121", torch.channels_last),
        ("timm:lcnet_050", torch.channels_last),
        ("timm:convnext_atto", torch.channels_last),
        ("timm:test_vit", torch.channels_last),
    ],
)
def test_wide_networks_with_batch_norm_train_contiguous_on_a_cpu(arch: str, expected: torch.memory_format) -> None:
    with torch.device("meta"):
        backbone = build_backbone(ModelConfig(arch=arch))
    assert training_format(backbone, "cpu") == expected
    assert training_format(backbone, "cuda") == torch.channels_last
    frozen = backbone.requires_grad_(False)  # nothing is summed there
    assert training_format(frozen, "cpu") == torch.channels_last


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_a_training_step_is_as_exact_as_float32_can_be() -> None:
    """With channels last the statistics of a batch norm are plain sums: 6e-6 off here, and gradients with them."""
    torch.manual_seed(0)
    network = Network(build_backbone(ModelConfig(arch="resnet18")), nn.Identity(), pooled)
    norm = network.backbone.stages["conv1"].bn1  # type: ignore[operator, union-attr]
    maps = torch.randn(64, 64, 32, 32) + 1
    results = []
    for dtype in (torch.float64, torch.float32):
        layer = copy.deepcopy(norm).to(dtype).train()  # type: ignore[operator]
        images = maps.to(dtype, memory_format=network.memory_format(CPU)).requires_grad_()
        out = layer(images)
        out.square().mul(maps.to(dtype)).sum().backward()
        results.append((out.detach(), layer.weight.grad, layer.running_var))
    for exact, found in zip(*results, strict=True):
        assert relative(found, exact) < 5e-7


def test_images_are_brought_into_the_networks_format() -> None:
    """Images come with channels last; contiguous weights alone would not keep maps from following them."""
    seen: dict[str, list[bool]] = {}
    for arch in ("wrn-10-1", "wrn-10-4"):
        backbone = build_backbone(ModelConfig(arch=arch))
        network = Network(backbone, CosineHead(backbone.features, 5), pooled)
        network.to(memory_format=network.memory_format(CPU))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(
                    lambda _, args, __, arch=arch: seen.setdefault(arch, []).append(args[0].is_contiguous())
                )
        network(torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last))
    assert not any(seen["wrn-10-1"])
    assert len(seen["wrn-10-4"]) == 7
    assert all(seen["wrn-10-4"])


def test_eval_mode_is_exact_in_the_format_that_images_come_in() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(arch="wrn-10-4")).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact = copy.deepcopy(backbone).double()(images.double())
        for layout in (torch.channels_last, torch.contiguous_format):
            found = backbone.to(memory_format=layout)(images.to(memory_format=layout))
            assert relative(found, exact) < 5e-7
