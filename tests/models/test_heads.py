"""Heads: the scaled product is that of normalised weights, and logits keep float32 where the trunk is bfloat16."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowstore.config import ModelConfig
from bowstore.models.heads import CosineHead, RotationHead
from bowstore.models.registry import build_backbone
from bowstore.words.targets.bags import bag_of, bow_cross_entropy

WORDS_BM = torch.randint(0, 300, (16, 9), generator=torch.Generator().manual_seed(1))


def normalised(head: CosineHead, features_BC: Tensor) -> Tensor:
    """Eq. 5 as it is written."""
    return F.linear(features_BC, head.gamma * F.normalize(head.weight, dim=1))


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors))


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def cosine(dtype: torch.dtype, gamma: float) -> tuple[CosineHead, Tensor]:
    torch.manual_seed(0)
    head = CosineHead(64, 300, gamma)
    head.weight.data.mul_(0.5 + torch.rand(300, 1))
    features_BC = torch.randn(16, 64).relu().bfloat16()  # what a bfloat16 trunk can give
    return head.to(dtype), features_BC.to(dtype).requires_grad_()


def dense_loss(logits_BK: Tensor) -> Tensor:
    target_BK = torch.zeros_like(logits_BK).scatter_add_(
        1, WORDS_BM, torch.full_like(WORDS_BM, 1, dtype=logits_BK.dtype)
    )
    return -(torch.log_softmax(logits_BK, 1) * target_BK / WORDS_BM.shape[1]).sum(1).mean()


@pytest.mark.parametrize("gamma", [1.0, 4.0])
def test_logits_and_gradients_are_those_of_normalised_weights(gamma: float) -> None:
    head, features_BC = cosine(torch.float64, gamma)
    tensors = [features_BC, head.weight, head.gamma]
    expected = normalised(head, features_BC)
    torch.testing.assert_close(head(features_BC), expected, rtol=1e-12, atol=1e-12)
    exact = gradients(dense_loss(expected), tensors)
    for found, wanted in zip(gradients(dense_loss(head(features_BC)), tensors), exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    head, features_BC = cosine(torch.float32, gamma)
    single = head(features_BC)
    assert off(single.detach(), expected.detach()) < 1e-6
    loss = bow_cross_entropy(single, bag_of(WORDS_BM, "count"))
    for found, wanted in zip(gradients(loss, [features_BC, head.weight, head.gamma]), exact, strict=True):
        assert off(found, wanted) < 3e-6


def test_a_word_without_weights_has_logits_of_zero() -> None:
    head, features_BC = cosine(torch.float32, 1.0)
    head.weight.data[7] = 0
    logits_BK = head(features_BC)
    assert (logits_BK[:, 7] == 0).all()
    logits_BK.sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [1.0, 4.0])
def test_logits_are_float32_under_autocast(gamma: float) -> None:
    """In bfloat16 these gradients are off by 3e-3 and 1e-2."""
    head, features_BC = cosine(torch.float64, gamma)
    exact = gradients(dense_loss(head(features_BC)), [features_BC, head.weight])
    head, features_BC = cosine(torch.float32, gamma)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BK = head(features_BC.bfloat16())
    assert logits_BK.dtype == torch.float32
    loss = bow_cross_entropy(logits_BK, bag_of(WORDS_BM, "count"))
    (found,) = gradients(loss, [head.weight])
    assert off(found, exact[1]) < 1e-5


def test_the_rotation_heads_logits_are_float32_under_autocast() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(arch="wrn-10-1"))
    head: Any = RotationHead(backbone, 1)
    head.stage = nn.Identity()
    map_BChw = (3 + torch.randn(8, 64, 5, 5)).bfloat16()
    exact = copy.deepcopy(head).double()(map_BChw.double())
    with torch.autocast("cpu", torch.bfloat16):
        logits_B4 = head(map_BChw)
    assert logits_B4.dtype == torch.float32
    assert off(logits_B4.detach(), exact.detach()) < 1e-6
