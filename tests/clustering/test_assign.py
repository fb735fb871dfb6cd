import time

import faiss
import pytest
import torch
from feature_sets import KINDS, make_vectors, real_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bowstore.exact import exact_float32
from bowstore.words.assign import assign as module
from bowstore.words.assign.assign import assign, assign_reference, prepare_words


def in_blocks(features_ND: Tensor, vocabulary_KD: Tensor, block: int | None, block_words: int | None) -> Tensor:
    """`assign_reference` with so many scores at a time, of so many words; None for as many as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CPU_BLOCK", block or module._CPU_BLOCK)
        patch.setattr(module, "_CPU_BLOCK_WORDS", block_words or module._CPU_BLOCK_WORDS)
        return assign_reference(features_ND, prepare_words(vocabulary_KD))


def check_nearest(features_ND: Tensor, vocabulary_KD: Tensor, ids_N: Tensor) -> None:
    """The chosen word is the nearest in float64, or within the documented rounding of it."""
    assert ids_N.dtype == torch.uint16
    distances_NK = torch.cdist(features_ND.double(), vocabulary_KD.double()).square()
    chosen_N = distances_NK.gather(1, ids_N.long()[:, None])[:, 0]
    norm, norm_N = vocabulary_KD.double().norm(dim=1).max(), features_ND.double().norm(dim=1)
    bound_N = 4 * (features_ND.shape[1] + 2) * 2.0**-24 * (norm_N * norm + norm**2 / 2)
    rounding_N = 1e-12 * norm_N.square()  # of the distances here, where vectors lie far off
    assert (chosen_N <= distances_NK.min(dim=1).values + bound_N + rounding_N).all()


@pytest.mark.parametrize(("n", "d", "k"), [(1000, 64, 300), (1, 1, 1), (257, 3, 1), (50, 200, 4100), (300, 2, 65535)])
def test_nearest_word(n: int, d: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n)
    features, words = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    check_nearest(features, words, assign(features, prepare_words(words)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 60),
    d=st.integers(1, 80),
    k=st.integers(1, 300),
    seed=st.integers(0, 1000),
    block=st.sampled_from([None, 50]),
    block_words=st.sampled_from([None, 1, 13]),
)
def test_nearest_word_of_any_kind(
    kind: str, n: int, d: int, k: int, seed: int, block: int | None, block_words: int | None
) -> None:
    features, words = make_vectors(kind, n, d, k, seed)
    ids = in_blocks(features, words, block, block_words)
    check_nearest(features, words, ids)


def agree_with_faiss(features: Tensor, words: Tensor) -> None:
    index = faiss.IndexFlatL2(words.shape[1])
    index.add(words.numpy())
    expected = index.search(features.numpy(), 1)[1][:, 0]
    ids = assign(features, prepare_words(words))
    assert (ids.long().numpy() != expected).mean() < 1e-3  # none but near ties
    check_nearest(features, words, ids)
    check_nearest(features, words, torch.from_numpy(expected).to(torch.uint16))


def test_agrees_with_faiss() -> None:
    generator = torch.Generator().manual_seed(5)
    agree_with_faiss(
        torch.randn(3000, 96, generator=generator).relu(), torch.randn(700, 96, generator=generator).relu()
    )


def test_agrees_with_faiss_on_photographs() -> None:
    agree_with_faiss(*real_vectors(24, 500))


@pytest.mark.parametrize(("block", "block_words"), [(5, 2), (999, 7), (1 << 21, 300), (64, 4096)])
def test_blocks_do_not_change_the_result(block: int, block_words: int) -> None:
    generator = torch.Generator().manual_seed(7)
    # Small whole numbers: every score is exact, so ties are real ties.
    features = torch.randint(0, 3, (200, 4), generator=generator).float()
    words = torch.randint(0, 3, (300, 4), generator=generator).float()
    expected = torch.cdist(features.double(), words.double()).square().round().argmin(dim=1)
    ids = in_blocks(features, words, block, block_words)
    assert torch.equal(ids.long(), expected)


def test_ties_go_to_the_lower_id() -> None:
    words = torch.tensor([[5.0, 5.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.0]])
    for block_words in (1, 2, 5):
        assert in_blocks(features, words, None, block_words).tolist() == [1, 2, 1, 1]


def test_zeros_and_huge_norms() -> None:
    assert assign(torch.zeros(3, 8), prepare_words(torch.zeros(5, 8))).tolist() == [0, 0, 0]
    generator = torch.Generator().manual_seed(11)
    words = torch.randn(50, 16, generator=generator) * 1e15
    features = words[[7, 3, 49]] + torch.randn(3, 16, generator=generator) * 1e12
    assert assign(features, prepare_words(words)).tolist() == [7, 3, 49]


def test_vectors_may_lie_in_any_layout() -> None:
    words = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    maps_Bchw = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(1))
    plain = maps_Bchw.permute(0, 2, 3, 1).reshape(-1, 6)
    assert torch.equal(
        assign(plain, prepare_words(words)).long(),
        assign(plain.T.contiguous().T, prepare_words(words)).long(),
    )
    assert len(assign(plain[:0], prepare_words(words))) == 0


def test_exact_float32_overrules_autocast_and_leaves_settings_alone() -> None:
    left, right = torch.randn(8, 8), torch.randn(8, 8)
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (left @ right).dtype == torch.bfloat16
        with exact_float32():
            assert (left @ right).dtype == torch.float32
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == before


def test_costs_hardly_more_than_the_matrix_product() -> None:
    generator = torch.Generator().manual_seed(0)
    features, words = torch.randn(512, 512, generator=generator), torch.randn(4096, 512, generator=generator)
    prepared, scores = prepare_words(words), torch.empty(512, 4096)

    def seconds(call: object) -> float:
        start = time.perf_counter()
        call()  # type: ignore[operator]
        return time.perf_counter() - start

    product = min(seconds(lambda: torch.mm(features, prepared.words_DK, out=scores)) for _ in range(7))
    whole = min(seconds(lambda: assign(features, prepared)) for _ in range(7))
    assert whole < 3 * product  # a gross bound for a busy machine; measured 1.0 to 1.1 at D = 1024, K = 20000
