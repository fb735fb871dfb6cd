"""What needs an NVIDIA GPU and no images: words on tensor cores, k-means, evaluations. What decodes is in processes of
its own (test_gpu_sections.py)."""

from typing import Any

import numpy as np
import pytest
import torch
from gpu_words import SHAPES, exact_scores, excess
from gpu_words import rectified as rectified_on

from bowstore.clustering.kmeans import default_backend, kmeans
from bowstore.evaluate.logreg import logistic_regression
from bowstore.evaluate.retrieval import rankings
from bowstore.words.assign import assign_triton
from bowstore.words.assign.assign import assign, assign_reference, prepare_words
from bowstore.words.assign.assign_triton import HOPPER, OTHER, Tiles, nearest, prepare_fast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HALVES = torch.float16, torch.bfloat16


def rectified(n: int, d: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rectified_on(n, d, k, GPU)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("n", "d", "k"), SHAPES)
def test_words_on_tensor_cores_are_the_nearest(n: int, d: int, k: int, half: torch.dtype) -> None:
    features, words = rectified(n, d, k)
    found = nearest(features, prepare_fast(words, half))
    off = excess(features, words, found.ids_N, found.open_U)
    assert off.wrong == 0
    assert off.open == 0 or d == 3  # where every eighth word and vector is zero


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("tiles", [HOPPER, OTHER])
def test_scores_of_tensor_cores_lie_within_their_bound(tiles: Tiles, half: torch.dtype) -> None:
    if not assign_triton.fits(tiles, GPU):
        pytest.skip("this GPU has less shared memory")
    features, words = rectified(2000, 1024, 5000)
    fast = prepare_fast(words, half)
    rounded, alpha = assign_triton._round(features, fast)
    low, ids, _ = assign_triton._search(rounded, alpha, fast, tiles._replace(ranges=4))
    bound = alpha * fast.reach_J[ids.long()]
    exact = fast.scale**2 * exact_scores(features, words).T.gather(0, ids.long())
    error = (low.double() + bound.double() - exact).abs() / bound
    print(f"largest error {float(error.max()):.3f} of the bound")
    assert error.max() <= 1


def test_nothing_is_compiled_after_the_vocabulary_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr("triton.knobs.runtime.jit_post_compile_hook", lambda **about: compiled.append(about["repr"]))
    assign_triton.warm_up.cache_clear()
    features, words = rectified(6001, 40, 700)
    prepared = prepare_words(words)
    ready = list(compiled)
    for rows in (1, 16, 17, 1000, 6000):
        assign(features[1 : 1 + rows], prepared)
    assert compiled == ready


def test_assignment_of_a_gpu_is_that_of_faiss_and_of_float32() -> None:
    features, words = rectified(4000, 256, 3000)
    prepared = prepare_words(words)
    assert prepared.fast is not None, "tensor cores and Triton are there"
    ids = assign(features, prepared)
    assert ids.is_cuda
    assert ids.dtype == torch.uint16
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatL2(256)
    index.add(words.cpu().numpy())
    expected = index.search(features.cpu().numpy(), 1)[1][:, 0]
    assert (ids.long().cpu().numpy() != expected).mean() < 1e-3
    assert (ids.int() != assign_reference(features, prepared).int()).float().mean() < 1e-3
    on_cpu = assign(features.cpu(), prepare_words(words.cpu()))
    assert (ids.cpu().int() != on_cpu.int()).float().mean() < 1e-3


def test_ties_and_far_vectors_on_a_gpu() -> None:
    words = torch.randint(0, 3, (500, 4), device=GPU).float()
    features = torch.randint(0, 3, (300, 4), device=GPU).float()
    expected = torch.cdist(features.double(), words.double()).square().round().argmin(dim=1)
    assert torch.equal(assign(features, prepare_words(words)).long(), expected)
    assert assign(torch.zeros(3, 8, device=GPU), prepare_words(torch.zeros(500, 8, device=GPU))).tolist() == [0, 0, 0]
    features, words = rectified(50, 64, 700)
    features[7] *= 1e8
    found = nearest(features, prepare_fast(words))
    assert found.open_U.tolist() == [7]
    prepared = prepare_words(words)
    assert assign(features, prepared)[7] == assign_reference(features, prepared)[7]


def test_features_of_more_than_32_bit_offsets() -> None:
    if torch.cuda.mem_get_info(GPU)[0] < 24 << 30:
        pytest.skip("needs 24 GB")
    features = torch.zeros(2**31 // 1024 + 5000, 1024, device=GPU)
    some, words = rectified(3000, 1024, 2000)
    features[-3000:] = some
    prepared = prepare_words(words)
    assert torch.equal(assign(features, prepared)[-3000:].int(), assign(some, prepared).int())
    step = 2**31 // 3000 + 1
    strided = torch.zeros(3000, step, device=GPU)[:, -1024:]  # rows lie further apart than they are wide
    strided.copy_(some)
    assert torch.equal(assign(strided, prepared).int(), assign(some, prepared).int())


def test_kmeans_on_a_gpu_settles_where_faiss_does() -> None:
    sample = rectified(20_000, 64, 1)[0].cpu().numpy()
    found = [kmeans(sample, 200, seed=0, iterations=10, device=device) for device in (GPU, GPU, CPU)]
    assert default_backend((20_000, 64), 200, GPU) == "torch"
    assert np.array_equal(found[0].centroids_Kp, found[1].centroids_Kp)
    assert found[0].inertia == pytest.approx(found[2].inertia, rel=0.05)
    assert (found[0].counts_K > 0).all()


def test_retrieval_and_logistic_regression_are_those_of_a_cpu() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 6
    features = (rng.standard_normal((6, 24))[labels] + rng.standard_normal((600, 24))).astype(np.float32)
    train, test = (features[:400], labels[:400]), (features[400:], labels[400:])
    ours, theirs = (rankings(*train, *test, device=device) for device in (GPU, CPU))
    assert (ours[0] == theirs[0]).mean() > 0.99  # cosines may be rounded to another order
    np.testing.assert_allclose(ours[1], theirs[1], atol=0.01)
    how: dict[str, Any] = {"classes": 6, "standardise": False}
    fits = [logistic_regression(*train, np.arange(400) < 40, *test, **how, device=device) for device in (GPU, CPU)]
    assert fits[0].metrics == pytest.approx(fits[1].metrics, abs=0.01)
    assert fits[0].details["train_loss"] == pytest.approx(fits[1].details["train_loss"], rel=0.01)
