from typing import Any

import numpy as np
import pytest
import torch

from bowstore.words import kmeans as module
from bowstore.words.kmeans import FaissLloyd, TorchLloyd, distinct_rows, kmeans

CPU = torch.device("cpu")


def sample(n: int = 3000, d: int = 16) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.maximum(rng.normal(size=(n, 5)) @ rng.normal(size=(5, d)), 0).astype(np.float32) + 0.1


def run(vectors: np.ndarray, k: int, **values: Any) -> module.Clusters:
    return kmeans(vectors, k, **{"seed": 0, "iterations": 6, "device": CPU, "shown": False, **values})


def test_one_step_of_both_backends_gives_the_same_words() -> None:
    vectors = sample()
    faiss_way, torch_way = FaissLloyd(vectors, 20, 3, CPU), TorchLloyd(vectors, 20, 3, CPU)
    first = np.arange(20) * 7
    faiss_way.step()  # FAISS has no centroids before
    for lloyd in (faiss_way, torch_way):
        lloyd.put(np.arange(20), first)
    assert np.array_equal(faiss_way.centroids(), torch_way.centroids())
    inertia, other = faiss_way.step()[0], torch_way.step()[0]
    assert inertia == pytest.approx(other, rel=1e-4)
    assert np.allclose(faiss_way.centroids(), torch_way.centroids(), rtol=1e-4, atol=1e-5)
    words, distances = faiss_way.nearest()
    others, squared = torch_way.nearest()
    assert (words == others).mean() > 0.999
    assert np.allclose(distances, squared, atol=1e-2)


def test_one_step_against_a_plain_lloyd() -> None:
    vectors = sample(400, 6)
    lloyd = TorchLloyd(vectors, 7, 1, CPU)
    before = lloyd.centroids().copy()
    inertia, _ = lloyd.step()
    squared = ((vectors[:, None].astype(np.float64) - before[None]) ** 2).sum(-1)
    words = squared.argmin(1)
    assert inertia == pytest.approx(squared.min(1).mean(), rel=1e-5)
    expected = np.stack([vectors[words == word].mean(0) for word in range(7)])
    assert np.allclose(lloyd.centroids(), expected, rtol=1e-5)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_inertia_never_grows_and_is_what_it_says(backend: str) -> None:
    vectors = sample()
    found = run(vectors, 25, backend=backend, iterations=12)
    assert (np.diff(found.inertia_history) <= 1e-6 * found.inertia_history[0]).all()
    squared = ((vectors[:, None].astype(np.float64) - found.centroids_Kp[None]) ** 2).sum(-1)
    assert found.inertia == pytest.approx(squared.min(1).mean(), rel=1e-3)
    assert found.counts_K.sum() == len(vectors)
    again = run(vectors, 25, backend=backend, iterations=12)
    assert np.array_equal(found.centroids_Kp, again.centroids_Kp)
    assert backend in found.backend


def test_faiss_gives_the_same_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, found = sample(8000, 48), []
    for threads in (1, 2, 3, 5):
        monkeypatch.setattr(module, "cores", lambda threads=threads: threads)
        found.append(run(vectors, 300, backend="faiss", iterations=3).centroids_Kp)
    assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_dead_words_and_copies_are_put_elsewhere(backend: str) -> None:
    rng = np.random.default_rng(0)
    few = np.repeat(rng.normal(size=(40, 8)).astype(np.float32) * 9, 100, axis=0)  # forty places, each a hundred times
    found = run(few, 40, backend=backend, iterations=3)
    assert (found.counts_K > 0).all()
    assert found.duplicates == 0
    assert found.inertia == pytest.approx(0, abs=1e-2)
    assert found.refilled > 0 or sum(found.splits) > 0


def test_distinct_rows() -> None:
    rows = np.array([[1, 2], [1, 2], [3, 4], [0.0, 1], [3, 4]], np.float32)
    assert distinct_rows(rows, 10) == 3
    assert distinct_rows(rows, 2) == 2


def test_a_cpu_takes_faiss() -> None:
    assert module.default_backend(sample(10, 4), CPU) == "faiss"
