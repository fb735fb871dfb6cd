"""How many directions features fill: their effective rank.

Legend: N rows, C channels.
"""

import torch
from torch import Tensor

_EPSILON = 1e-7  # of the paper, for float32 features


def effective_rank(features_NC: Tensor) -> float:
    """RankMe (Garrido et al. 2023, Eq. 1 and 2): exp of the entropy of p = singular values / their sum + 1e-7.

    From 1 for features that all lie on one line (also for one feature repeated: nothing is centred) to the smaller of
    N and C; N should be larger than C. Scaling the features changes nothing.

    Args:
        features_NC: finite, of any floating dtype, on any device, where the work is done in float64.

    Raises:
        ValueError: features of another shape, or none.
    """
    if features_NC.ndim != 2 or not features_NC.numel():
        raise ValueError(f"features {tuple(features_NC.shape)} are no matrix (N, C) with N, C >= 1")
    features_NC = features_NC.detach().double()
    features_NC = features_NC / features_NC.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    if len(features_NC) < features_NC.shape[1]:
        features_NC = features_NC.T
    # The squares of the singular values, for a tenth of the time that these take. What rounding leaves in the place of
    # a zero is a share of at most 2e-8 each, less than epsilon.
    squares = torch.linalg.eigvalsh(features_NC.T @ features_NC)
    squares[squares < torch.finfo(torch.float64).eps * squares.max()] = 0
    values = squares.sqrt()
    share = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny) + _EPSILON
    return float(torch.exp(-(share * share.log()).sum()))
