"""Backbones by name.

Names: `wrn-D-k` (wide ResNet), torchvision's residual networks (`resnet18`, `resnet50`, ...), and any network of two
libraries as `torchvision:NAME` and `timm:NAME` (bowstore.models.library).
"""

from bowstore.config import ModelConfig
from bowstore.models.backbone import Backbone
from bowstore.models.library import LIBRARIES, library_backbone
from bowstore.models.residual import RESNETS, residual_backbone, unknown_arch, wide_sizes


def build_backbone(config: ModelConfig, size: int | None = None) -> Backbone:
    """A randomly initialised backbone (the global torch generator draws).

    Args:
        config: its name, and the strides of a wide ResNet.
        size: side of the square input, pixels, for networks that are built for one; None for their own.

    Raises:
        UsageError: an unknown name; the message gives the nearest known one.
    """
    name = config.arch.removeprefix("torchvision:")
    if name in RESNETS or wide_sizes(config.arch):
        return residual_backbone(name, config.strides)
    if ":" in config.arch:
        return library_backbone(config.arch, size)
    raise unknown_arch(config.arch, [*RESNETS, "wrn-28-10", "wrn-28-4"])


def is_arch(name: str) -> bool:
    """Whether a text has the form of an architecture's name; a library's network need not exist."""
    return name in RESNETS or wide_sizes(name) is not None or name.startswith(LIBRARIES)
