"""Heads trained on top of a backbone.

Legend: B batch, C feature width, K words or classes, N patches of a batch, P of each image, c channels of a layer, n
cells of its pooled map.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowstore.models.arch import V1, wide_sizes
from bowstore.models.backbone import Backbone, mean_pool
from bowstore.models.pooling import Tap, pooled_shapes
from bowstore.models.residual import StagedBackbone, stride_first, torchvision_models
from bowstore.models.wide_resnet import Group

Norm = Literal["batch", "affine", "none"]  # before a layer's classifier

_LEAST_NORM = 1e-12
_LAYER_HEAD_STD = 0.01


def exact_linear(features_BC: Tensor, weight_KC: Tensor, bias_K: Tensor | None = None) -> Tensor:
    """Logits (B, K) in the precision of the weights, under autocast too.

    In bfloat16 a logit keeps eight bits, and an error of a logit is one of its probability: gradients of a bag's loss
    were off by 0.3 % at a scale of 1 and by 1.2 % at a scale of 4.
    """
    with torch.autocast(features_BC.device.type, enabled=False):
        return F.linear(features_BC.to(weight_KC.dtype), weight_KC, bias_K)


class LinearHead(nn.Linear):
    """A linear layer with bias over classes, exact under autocast."""

    def forward(self, features_BC: Tensor) -> Tensor:
        """Logits (B, K)."""
        return exact_linear(features_BC, self.weight, self.bias)


class CosineHead(nn.Module):
    """Word logits gamma * f . w_k / ||w_k|| (paper, Eq. 5): one learnable scale, no bias.

    The features are not normalised. gamma starts at 1 and stays out of weight decay: begun at 10, training hardly
    leaves the loss of the words' mean frequencies (docs/results/gamma.md).

    Args:
        features: C.
        num_words: K.
        gamma: initial scale.
        normalised: scale the features to length 1, too: the cosine classifier of few-shot learning (the paper's [19]),
            whose logits are bounded by gamma, which therefore starts higher.
    """

    def __init__(self, features: int, num_words: int, gamma: float = 1.0, *, normalised: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_words, features))
        nn.init.normal_(self.weight, std=features**-0.5)
        self.gamma = nn.Parameter(torch.tensor(float(gamma)))
        self._normalised = normalised

    def forward(self, features_BC: Tensor) -> Tensor:
        """Logits (B, K)."""
        if self._normalised:
            features_BC = F.normalize(features_BC.to(self.weight.dtype), dim=1, eps=_LEAST_NORM)
        # Scaled behind the product, by one number a word: a normalised copy of the weights would be 164 MB for
        # ResNet-50 and 20000 words, written and differentiated in every step.
        scale_K = self.gamma / torch.linalg.vector_norm(self.weight, dim=1).clamp_min(_LEAST_NORM)
        return exact_linear(features_BC, self.weight) * scale_K  # type: ignore[no-any-return]


def class_head(kind: str, features: int, outputs: int, gamma: float) -> LinearHead | CosineHead:
    """The head over words or clusters that a task's `head` asks for: linear, or cosine with its scale."""
    return LinearHead(features, outputs) if kind == "linear" else CosineHead(features, outputs, gamma)


class Heads(nn.ModuleList):
    """Several heads on one feature."""

    def forward(self, features_BC: Tensor) -> tuple[Tensor, ...]:
        """The logits of each."""
        return tuple(head(features_BC) for head in self)


class LayerHead(nn.Module):
    """A linear classifier of one layer's pooled map, behind a batch norm over its channels where that is asked for.

    Weights begin at N(0, 0.01) and biases at 0, as in the FAIR benchmark's classifiers (docs/protocols.md).

    Args:
        channels: c.
        cells: n of the pooled map.
        num_classes: K.
        norm: batch: without scale and shift; affine: with them; none.
    """

    def __init__(self, channels: int, cells: int, num_classes: int, norm: Norm) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm == "none" else nn.BatchNorm1d(channels, affine=norm == "affine")
        self.linear = LinearHead(channels * cells, num_classes)
        nn.init.normal_(self.linear.weight, std=_LAYER_HEAD_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, pooled_Bcn: Tensor) -> Tensor:
        """Logits (B, K)."""
        exact_Bcn = pooled_Bcn.to(self.linear.weight.dtype)  # what a bfloat16 trunk gives, too
        return self.linear(self.norm(exact_Bcn).flatten(1))  # type: ignore[no-any-return]


class LayerHeads(nn.ModuleList):
    """Classifiers of several layers' pooled maps side by side, each by itself.

    Args:
        backbone: whose maps.
        taps: where each is taken and how it is pooled, by name; the heads are in their order.
        size: side of its square input, pixels.
        num_classes: K.
        norm: as for `LayerHead`.
    """

    def __init__(self, backbone: Backbone, taps: Mapping[str, Tap], size: int, num_classes: int, norm: Norm) -> None:
        shapes = pooled_shapes(backbone, taps, size)
        super().__init__(LayerHead(channels, cells, num_classes, norm) for channels, cells in shapes)

    def forward(self, pooled: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits (B, K) of each, of pooled maps (B, c, n) in the same order."""
        return tuple(head(pooled_Bcn) for head, pooled_Bcn in zip(self, pooled, strict=True))


class RotationHead(nn.Module):
    """One more residual group, pooling and a linear layer over the four rotations (paper, section 4).

    Args:
        backbone: whose last map it takes.
        blocks: depth of the group; None for that of the backbone's own last one.
    """

    def __init__(self, backbone: Backbone, blocks: int | None = None) -> None:
        super().__init__()
        self.stage = extra_residual_group(backbone, blocks)
        self.linear = LinearHead(backbone.features, 4)

    def forward(self, map_BChw: Tensor) -> Tensor:
        """Logits (B, 4) of 0, 90, 180, 270 degrees."""
        return self.linear(mean_pool(self.stage(map_BChw)))  # type: ignore[no-any-return]


class PairHead(nn.Module):
    """Where each patch of an image lies around the centre one, by the pooled features of both (RelLoc).

    One hidden layer with batch norm, as in the neighbouring code of the paper's authors.

    Args:
        features: C.
        hidden: width of the hidden layer; None for 2 C.
        patches: P, odd; the one in the middle is the centre.
    """

    def __init__(self, features: int, hidden: int | None = None, patches: int = 9) -> None:
        super().__init__()
        hidden = hidden or 2 * features
        self.hidden = nn.Linear(2 * features, hidden, bias=False)
        self.norm = nn.BatchNorm1d(hidden)
        self.linear = LinearHead(hidden, patches - 1)
        self._patches, self._centre = patches, patches // 2

    def forward(self, features_NC: Tensor) -> Tensor:
        """Logits (B (P - 1), P - 1) of features (B P, C): the patches of an image in a row, the centre's left out."""
        features_BPC, at = features_NC.reshape(-1, self._patches, features_NC.shape[1]), self._centre
        around_BPC = torch.cat([features_BPC[:, :at], features_BPC[:, at + 1 :]], dim=1)
        centre_BPC = features_BPC[:, at : at + 1].expand_as(around_BPC)
        pairs_NC = torch.cat([around_BPC, centre_BPC], dim=2).flatten(0, 1)
        return self.linear(F.relu(self.norm(self.hidden(pairs_NC))))  # type: ignore[no-any-return]


def group_depth(backbone: Backbone) -> int:
    """Residual blocks of a backbone's last group: (D - 4) / 6 of WRN-D, 3 of ResNet-50; 1 where there is no group."""
    if sizes := wide_sizes(backbone.arch):
        return (sizes[0] - 4) // 6
    staged = isinstance(backbone, StagedBackbone)
    last = getattr(backbone.root(), "conv5" if staged else "layer4", None)
    return len(last) if isinstance(last, nn.Sequential) else 1


def extra_residual_group(backbone: Backbone, blocks: int | None = None) -> nn.Module:
    """One more group of the backbone's kind and width, its first block of stride 2 (the rotation head's, section 4).

    Args:
        backbone: whose last map it takes.
        blocks: its depth; None for that of the backbone's own last group (`group_depth`).
    """
    width, blocks = backbone.features, blocks or group_depth(backbone)
    if wide_sizes(backbone.arch):
        return nn.Sequential(Group(width, width, stride=2, blocks=blocks), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    kinds = torchvision_models().resnet
    # A bottleneck's width is four times its inner one.
    plain = backbone.arch in ("resnet18", "resnet34") or width % kinds.Bottleneck.expansion
    block = kinds.BasicBlock if plain else kinds.Bottleneck
    inner = width // block.expansion
    downsample = nn.Sequential(nn.Conv2d(width, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
    first: nn.Module = block(width, inner, stride=2, downsample=downsample)
    if backbone.arch.endswith(V1):
        stride_first(first)
    # A single block stands alone, so that weights of such heads keep their names.
    return first if blocks == 1 else nn.Sequential(first, *(block(width, inner) for _ in range(blocks - 1)))
