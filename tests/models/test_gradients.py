"""Every parameter that is trained gets a gradient: DDP waits for all of them, and its second step fails otherwise."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bowstore.config import ModelConfig
from bowstore.models.registry import build_backbone
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import World
from bowstore.train.tasks.task import build_task

# Small networks of many kinds, and the heads behind their last maps.
NETWORKS = {
    "wrn-10-1": set(),
    "resnet18": set(),
    "torchvision:mobilenet_v3_small": set(),
    "torchvision:shufflenet_v2_x0_5": set(),
    "torchvision:squeezenet1_1": set(),
    "timm:mobilenetv3_small_050": {"conv_head"},
    "timm:lcnet_035": {"conv_head"},
    "timm:ghostnet_050": {"conv_head"},
    "timm:hardcorenas_a": {"conv_head"},
    "timm:efficientnet_lite0": set(),
    "timm:test_resnet": set(),
    "timm:test_convnext": set(),
    "timm:test_mambaout": set(),
    "timm:test_vit": set(),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("arch", NETWORKS)
def test_every_trained_parameter_gets_a_gradient(arch: str) -> None:
    backbone = build_backbone(ModelConfig(arch=arch)).train()
    names = list(backbone.state_dict())
    random = torch.get_rng_state()
    frozen = backbone.freeze_unused()
    assert torch.equal(torch.get_rng_state(), random)  # heads that are drawn after it stay as they were
    assert {name.split(".")[1] for name in frozen} == NETWORKS[arch]
    size = backbone.image_size if arch == "timm:test_vit" else 64
    backbone(torch.randn(2, 3, size, size)).square().sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (name not in frozen)
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert list(backbone.state_dict()) == names  # files keep their names
    assert backbone.freeze_unused() == ()


def test_a_run_says_what_it_does_not_train(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"name": "r", "task": "rotation", "view": {"cutmix": False}, "model": {"arch": "timm:lcnet_035"}}
    index: Any = SimpleNamespace(fingerprint="0")
    told = "network.conv_head of timm:lcnet_035: behind conv5, the last map that is used; not trained\n"
    for rank, expected in ((0, told), (1, "")):
        task = build_task(TrainConfig.model_validate(values), index, World(rank, 2, torch.device("cpu")))
        assert capsys.readouterr().err == expected
    unused = [name for name, parameter in task.network.named_parameters() if not parameter.requires_grad]
    assert unused == ["backbone.network.conv_head.weight", "backbone.network.conv_head.bias"]
