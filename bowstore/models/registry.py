"""Backbones by name.

Names: `wrn-D-k` (wide ResNet), torchvision's residual networks (`resnet18`, `resnet50`, ...), and any network of two
libraries as `torchvision:NAME` and `timm:NAME` (bowstore.models.library).
"""

from bowstore.config import ModelConfig
from bowstore.models.arch import built_in
from bowstore.models.backbone import Backbone
from bowstore.models.library import library_backbone
from bowstore.models.residual import residual_backbone


def build_backbone(config: ModelConfig, size: int | None = None) -> Backbone:
    """A randomly initialised backbone (the global torch generator draws).

    Args:
        config: its name, and the strides of a wide ResNet.
        size: side of the square input, pixels, for networks that are built for one; None for their own.

    Raises:
        UsageError: an unknown name; the message gives the nearest known one.
    """
    name = built_in(config.arch)
    return residual_backbone(name, config.strides) if name else library_backbone(config.arch, size)
