import numpy as np
import pytest
import torch

from bowstore.words.targets.bags import Bag, Form, MeanBag, bag_entropy, bag_of, bow_cross_entropy, mix_bags

WORDS, SLOTS, BATCH = 50, 16, 12


def words(rows: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, WORDS, (rows, 4, 4)).astype(np.uint16)


def bags(maps: np.ndarray, form: Form = "count") -> Bag:
    return bag_of(torch.from_numpy(maps.reshape(len(maps), -1).astype(np.int64)), form)


def dense(bag: Bag, size: int = WORDS) -> torch.Tensor:
    result = torch.zeros(len(bag.words_BM), size)
    for row in range(len(bag.words_BM)):
        for word, weight in zip(bag.words_BM[row].tolist(), bag.weights_BM[row].tolist(), strict=True):
            result[row, word] += weight
    return result


def histogram(maps: np.ndarray) -> torch.Tensor:
    return torch.stack([torch.bincount(torch.from_numpy(m.flatten().astype(np.int64)), minlength=WORDS) for m in maps])


def test_count_bags_are_the_normalised_histogram() -> None:
    maps = words()
    bag = bags(maps)
    assert bag.words_BM.dtype == torch.int64
    assert bag.weights_BM.dtype == torch.float32
    assert torch.allclose(dense(bag), histogram(maps) / SLOTS)


def test_binary_bags_hold_each_distinct_word_once() -> None:
    maps = words(10)
    bag = bags(maps, "binary")
    present = (histogram(maps) > 0).float()
    assert torch.allclose(dense(bag), present / present.sum(1, keepdim=True))
    assert torch.allclose(bag.weights_BM.sum(1), torch.ones(10))


@pytest.mark.parametrize("form", ["count", "binary"])
def test_cutmix_of_bags_is_the_mixture_of_the_dense_bags(form: Form) -> None:
    bag = bags(words(BATCH), form)
    partner, kept = torch.arange(BATCH).roll(1), torch.rand(BATCH)
    mixed = mix_bags(bag, partner, kept)
    expected = kept[:, None] * dense(bag) + (1 - kept[:, None]) * dense(bag)[partner]
    assert torch.allclose(dense(mixed), expected, atol=1e-6)
    assert torch.allclose(mixed.weights_BM.sum(1), torch.ones(BATCH), atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_the_sparse_loss_equals_the_dense_one(scale: float) -> None:
    bag = bags(words(BATCH))
    bag = mix_bags(bag, torch.arange(BATCH).flip(0), torch.rand(BATCH))
    logits = (scale * torch.randn(BATCH, WORDS)).requires_grad_()
    sparse = bow_cross_entropy(logits, bag)
    (ours,) = torch.autograd.grad(3 * sparse, logits)
    expected = torch.nn.functional.cross_entropy(logits, dense(bag))
    (theirs,) = torch.autograd.grad(3 * expected, logits)
    assert sparse.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_loss_is_float32_for_low_precision_logits() -> None:
    bag = bag_of(torch.tensor([[0, 1]]), "count")
    logits = torch.tensor([[10.0, 1.0, 3.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = bow_cross_entropy(logits, bag)
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_entropy_is_the_least_loss() -> None:
    bag = mix_bags(bags(words(BATCH)), torch.arange(BATCH).roll(1), torch.rand(BATCH))
    target = dense(bag)
    assert bag_entropy(bag, WORDS).item() == pytest.approx(torch.special.entr(target).sum(1).mean().item(), abs=1e-5)
    best = torch.log(target.clamp_min(1e-30))
    assert bow_cross_entropy(best, bag).item() == pytest.approx(bag_entropy(bag, WORDS).item(), abs=1e-4)


@pytest.mark.parametrize("form", ["count", "binary"])
def test_the_mean_bags_entropy_is_the_loss_of_the_best_constant_prediction(form: Form) -> None:
    maps = words(200)
    bag = bags(maps, form)
    constant = torch.log(dense(bag).mean(0, keepdim=True).clamp_min(1e-30)).expand(200, -1)
    mean = MeanBag(WORDS)
    for start in range(0, 200, 64):
        mean.add(bags(maps[start : start + 64], form))
    assert mean.entropy() == pytest.approx(bow_cross_entropy(constant, bag).item(), abs=1e-4)
