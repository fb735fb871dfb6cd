import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
import torch
import xxhash

from bowstore.clustering import kmeans as module
from bowstore.clustering import lloyd_faiss
from bowstore.clustering.kmeans import kmeans
from bowstore.clustering.lloyd import distinct_rows
from bowstore.clustering.lloyd_faiss import FaissLloyd, SuperLloyd
from bowstore.clustering.lloyd_torch import TorchLloyd
from bowstore.errors import UsageError
from bowstore.words.encode import sample as sampling

CPU = torch.device("cpu")


def sample(n: int = 3000, d: int = 16) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.maximum(rng.normal(size=(n, 5)) @ rng.normal(size=(5, d)), 0).astype(np.float32) + 0.1


def run(vectors: np.ndarray, k: int, **values: Any) -> module.Clusters:
    return kmeans(vectors, k, **{"seed": 0, "iterations": 6, "device": CPU, **values})


def test_one_step_of_both_backends_gives_the_same_words() -> None:
    vectors = sample()
    faiss_way, torch_way = FaissLloyd(vectors, 20, 3), TorchLloyd(vectors, 20, 3, CPU)
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
        monkeypatch.setattr(lloyd_faiss, "cores", lambda threads=threads: threads)
        found.append(run(vectors, 300, backend="faiss", iterations=3).centroids_Kp)
    assert all(np.array_equal(found[0], other) for other in found[1:])
    assert torch.get_num_threads() == 1, "PyTorch's are as they were: a training may follow"


@pytest.mark.parametrize(("n", "d"), [(5000, 131), (2049, 160)])  # slices of 2048, and what is left
def test_super_gives_the_same_for_any_number_of_threads(n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, found = sample(n, d), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(lloyd_faiss, "cores", lambda threads=threads: threads)
        faiss.omp_set_num_threads(threads)
        found.append(run(vectors, 1025, backend="super", iterations=3))
        assert faiss.omp_get_max_threads() == threads  # the setting is the process's, not ours
    for other in found[1:]:
        assert np.array_equal(found[0].centroids_Kp, other.centroids_Kp)
        assert found[0].inertia_history == other.inertia_history


def test_super_does_not_depend_on_the_process() -> None:
    code = (
        "import faiss, numpy, torch; from bowstore.clustering.kmeans import kmeans; faiss.omp_set_num_threads(3)\n"
        "x = numpy.random.default_rng(0).normal(size=(2100, 128)).astype('f')\n"
        "found = kmeans(x, 1024, seed=1, iterations=3, device=torch.device('cpu'))\n"
        "print(found.backend, xxhash.xxh3_64_hexdigest(found.centroids_Kp.tobytes()))"
    )
    other = subprocess.run(
        [sys.executable, "-c", "import xxhash; " + code],
        env={**os.environ, "OMP_NUM_THREADS": "4"}, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    vectors = np.random.default_rng(0).normal(size=(2100, 128)).astype(np.float32)
    found = run(vectors, 1024, seed=1, iterations=3)
    assert other == [*found.backend.split(), xxhash.xxh3_64_hexdigest(found.centroids_Kp.tobytes())]
    assert other[-2] == "superkmeans"


def test_a_step_of_super_is_nearly_the_exact_one() -> None:
    """From the same words: what the pruned search misses is nearly as near, and the last search misses nothing."""
    vectors = sample(6000, 192)
    pruned, exact = (SuperLloyd(vectors, 1100, 0) for _ in range(2))
    for lloyd in (pruned, exact):
        lloyd.step()
    for _ in range(4):
        exact._word_S = np.empty(0, np.int32)
        (inertia, _), (least, _) = pruned.step(), exact.step()
        assert inertia == pytest.approx(least, rel=2e-3)
    words, distances = pruned.nearest()
    index = faiss.IndexFlatL2(192)
    index.add(pruned.centroids())
    others_S1 = index.search(vectors, 1)[1]
    assert (words == others_S1[:, 0]).mean() > 0.999
    assert distances == pytest.approx(((vectors - pruned.centroids()[words]) ** 2).sum(1), abs=1e-2)


def test_super_ends_where_faiss_ends() -> None:
    vectors = sample(5000, 128)
    found, other = (run(vectors, 1024, backend=backend, iterations=8) for backend in ("super", "faiss"))
    assert found.inertia == pytest.approx(other.inertia, rel=0.02)
    assert (np.diff(found.inertia_history) <= 1e-3 * found.inertia_history[0]).all()
    assert found.counts_K.min() > 0
    assert found.duplicates == 0
    again, differs = (run(vectors, 1024, backend="super", iterations=8, seed=seed) for seed in (0, 1))
    assert np.array_equal(found.centroids_Kp, again.centroids_Kp)
    assert not np.array_equal(found.centroids_Kp, differs.centroids_Kp)


def test_words_that_run_empty_are_put_elsewhere_at_once() -> None:
    """Half of the vectors are the same one, so that half of the first words are copies of each other."""
    vectors = sample(6000, 128)
    vectors[::2] = 0
    found = run(vectors, 1024, backend="super", iterations=6)
    assert found.splits[0] > 400
    assert sum(found.splits[2:]) < 60
    assert found.counts_K.min() > 0
    assert found.duplicates == 0
    assert found.inertia < run(vectors, 500, backend="faiss", iterations=6).inertia


@pytest.mark.parametrize("backend", ["faiss", "super", "torch"])
def test_dead_words_and_copies_are_put_elsewhere(backend: str) -> None:
    rng = np.random.default_rng(0)
    few = np.repeat(rng.normal(size=(40, 32)).astype(np.float32) * 9, 100, axis=0)  # forty places, each a hundred times
    found = run(few, 40, backend=backend, iterations=3)
    assert (found.counts_K > 0).all()
    assert found.duplicates == 0
    # On some processors FAISS's products round equal vectors apart, by their row: such a place keeps two words that are
    # all but copies (3 of the 40 on a Zen 3), and as many places must share one. All others have their own.
    split = sum(len(np.unique(words)) - 1 for words in found.words_S.reshape(40, 100))
    assert split <= (4 if backend == "faiss" else 0)
    apart = np.linalg.norm(few - found.centroids_Kp[found.words_S], axis=1).reshape(40, 100).max(axis=1)
    assert (apart > 0.1).sum() <= 2 * split
    assert split or found.inertia == pytest.approx(0, abs=1e-2)
    assert found.refilled > 0 or sum(found.splits) > 0


def test_distinct_rows() -> None:
    rows = np.array([[1, 2], [1, 2], [3, 4], [0.0, 1], [3, 4]], np.float32)
    assert distinct_rows(rows, 10) == [0, 2, 3]
    assert distinct_rows(rows, 2) == [0, 2]


def test_what_a_device_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.default_backend((5000, 128), 1024, CPU) == "super"
    assert module.default_backend((5000, 127), 1024, CPU) == "faiss"
    assert module.default_backend((5000, 128), 1023, CPU) == "faiss"
    with monkeypatch.context() as without:
        without.setattr(module, "find_spec", lambda name: None)
        assert module.default_backend((5000, 128), 1024, CPU) == "torch"
    assert module.default_backend((10 << 20, 1024), 2000, torch.device("cuda")) == "torch"
    monkeypatch.delattr(faiss, "super_kmeans_assign_iteration")  # as before 1.15
    assert module.default_backend((5000, 128), 1024, CPU) == "faiss"


def test_torch_gives_the_same_twice_and_in_deterministic_mode() -> None:
    vectors = sample(3000, 40)
    plain = run(vectors, 50, backend="torch", iterations=4)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        strict = run(vectors, 50, backend="torch", iterations=4)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert np.array_equal(plain.centroids_Kp, strict.centroids_Kp)


def test_products_of_matrices_are_outside_the_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """There cuBLAS asks for a setting that has to be made before CUDA starts."""
    seen = []
    product = torch.addmm

    def addmm(*args: Any, **values: Any) -> torch.Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return product(*args, **values)

    monkeypatch.setattr(torch, "addmm", addmm)
    run(sample(500, 8), 9, backend="torch", iterations=2)
    assert seen
    assert not any(seen)


def test_kmeans_needs_no_faiss_for_torch() -> None:
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "import torch, numpy; from bowstore.benchmarks.kmeans import bench_kmeans\n"
        "from bowstore.benchmarks.config import KmeansBench\n"
        "from bowstore.clustering.kmeans import kmeans; cpu = torch.device('cpu'); x = numpy.eye(9, dtype='f')\n"
        "print(kmeans(x, 3, seed=0, iterations=2, device=cpu, backend='torch').backend)\n"
        "bench_kmeans(KmeansBench(vectors=50, dimensions=4, num_words=3, iterations=2, rounds=1, device='cpu', "
        "backends=['torch']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch ")


@pytest.mark.parametrize(("words", "pca", "copies"), [(1023, None, 0), (1024, None, 1), (1024, 64, 0.5), (900, 128, 1)])
def test_memory_counts_what_kmeans_copies(
    words: int, pca: int | None, copies: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = SimpleNamespace(layers={"conv4": SimpleNamespace(channels=128)})
    config = SimpleNamespace(pca=pca, sample_per_word=256)
    job: Any = SimpleNamespace(teacher=teacher, num_words={"conv4": words}, config=config, device=CPU)
    vectors = 10_000_000
    room = int(4 * 128 * vectors * (1 + copies))
    plans: Any = {"conv4": SimpleNamespace(vectors=vectors)}
    monkeypatch.setattr(sampling, "available_memory", lambda: room)
    sampling.check_memory(job, plans)
    monkeypatch.setattr(sampling, "available_memory", lambda: room - 1)
    message = f"the samples of conv4 take {room / 1e9:.1f} GB of memory, .* lower --sample-per-word"
    with pytest.raises(UsageError, match=message):
        sampling.check_memory(job, plans)
