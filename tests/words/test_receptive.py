import torch

from bowstore.config import ModelConfig
from bowstore.models.registry import build_backbone
from bowstore.words.encode.receptive import receptive_field


def test_fields_of_a_residual_network_are_those_of_its_arithmetic() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(arch="resnet18")).eval().requires_grad_(False)
    # stem 7/2 and pool 3/2: 11; layer1 adds 4 convolutions of 3 at stride 4: 43; layer2: 8 + 3 x 16 more: 99
    for layer, exact in (("conv1", 7), ("pool1", 11), ("conv2", 43), ("conv3", 99)):
        field = receptive_field(backbone, layer, 224)
        assert exact - 2 <= field["whole"] <= exact + 9  # a square around the middle of a cell, which the field is not
        assert 1 <= field["effective"] <= field["whole"]
    deep = receptive_field(backbone, "conv5", 224)
    assert deep["whole"] == 224  # all there is
    assert deep["effective"] > receptive_field(backbone, "conv2", 224)["effective"]


def test_a_vision_transformer_sees_everything() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(arch="timm:vit_tiny_patch16_224"), 32).eval().requires_grad_(False)
    assert receptive_field(backbone, "blocks.3", 32)["whole"] == 32
