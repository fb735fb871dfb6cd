"""Heads trained on top of a backbone.

Legend: B batch, C feature width, K words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowstore.models.registry import Backbone, extra_residual_group


class CosineHead(nn.Module):
    """Word logits gamma * f . w_k / ||w_k|| (paper, Eq. 5): one learnable scale, no bias.

    The features are not normalised. gamma starts at 1 and stays out of weight decay: begun at 10, training hardly
    leaves the loss of the words' mean frequencies (docs/results/gamma.md).
    """

    def __init__(self, features: int, words: int, gamma: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(words, features))
        nn.init.normal_(self.weight, std=features**-0.5)
        self.gamma = nn.Parameter(torch.tensor(float(gamma)))

    def forward(self, features_BC: Tensor) -> Tensor:
        """Logits (B, K)."""
        # Scaling the features is cheaper than scaling K rows of weights.
        return F.linear(self.gamma * features_BC, F.normalize(self.weight, dim=1))


class RotationHead(nn.Module):
    """One more residual group, pooling and a linear layer over the four rotations (paper, section 4).

    Args:
        backbone: whose last map it takes.
        blocks: depth of the group; None for that of the backbone's own last one.
    """

    def __init__(self, backbone: Backbone, blocks: int | None = None) -> None:
        super().__init__()
        self.stage = extra_residual_group(backbone, blocks)
        self.linear = nn.Linear(backbone.features, 4)

    def forward(self, map_BChw: Tensor) -> Tensor:
        """Logits (B, 4) of 0, 90, 180, 270 degrees."""
        return self.linear(self.stage(map_BChw).mean((2, 3)))  # type: ignore[no-any-return]
