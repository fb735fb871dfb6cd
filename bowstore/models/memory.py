"""How maps and weights lie in memory: the one place that holds this rule."""

import torch
from torch import nn

from bowstore.models.backbone import Backbone
from bowstore.models.residual import StagedBackbone

_WIDE_CHANNELS = 64
_STEM = ("conv1", "pool1")
FROZEN_FORMAT = torch.channels_last  # of the weights of networks that are only run: as images come


def training_format(backbone: Backbone, device: str) -> torch.memory_format:
    """The memory format of weights and maps in training; `Network.forward` brings images into it.

    Channels last, as images come, but for wide networks on a CPU. There PyTorch (2.14) sums a batch norm's statistics a
    hundred times less exactly with channels last, and gradients of WRN-28-4 are off by 6e-6 instead of 2e-6, and more
    often by 4e-3, where a value next to zero falls on the other side of a ReLU. Residual networks whose stages all have
    64 channels and more lose a few percent of speed by contiguous maps, or none; narrower ones and DenseNets a tenth to
    a half (docs/results/memory-format.md). In eval mode nothing is summed: teachers, evaluations and frozen trunks are
    as exact in the format that images come in.

    Args:
        backbone: what is trained.
        device: its kind, cpu or cuda.
    """
    wide = all(width >= _WIDE_CHANNELS for layer, width in backbone.channels.items() if layer not in _STEM)
    residual = isinstance(backbone, StagedBackbone) or hasattr(backbone.root(), "layer4")
    normalised = any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    trained = any(parameter.requires_grad for parameter in backbone.parameters())
    sums = device == "cpu" and trained and normalised
    return torch.contiguous_format if sums and wide and residual else torch.channels_last
