"""k-means by FAISS and by our own iteration, on the same made-up vectors."""

import statistics
import time

import numpy as np
import torch
from numpy.typing import NDArray

from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.environment import cores, device_name
from bowstore.errors import UsageError
from bowstore.progress import Progress
from bowstore.words.kmeans import FaissLloyd, Lloyd, TorchLloyd, default_backend

_FACTORS = 16  # that vectors are made of: real ones, too, lie near surfaces of few dimensions


def bench_kmeans(
    *, vectors: int, dimensions: int, words: int, iterations: int, rounds: int, device: torch.device
) -> BenchResult:
    """Iterations/s of every backend, interleaved; a vocabulary's time is `iterations` of them.

    Args:
        vectors: of the sample.
        dimensions: of a vector.
        words: K.
        iterations: of a vocabulary, for the table's remark.
        rounds: interleaved iterations that are timed, after one to warm up.
        device: where k-means runs.
    """
    if words > vectors:
        raise UsageError(f"--K {words} words need as many vectors, --vectors {vectors} are fewer; raise it")
    sample = _vectors(vectors, dimensions)
    ways: dict[str, Lloyd] = {kind.name: kind(sample, words, 0, device) for kind in (FaissLloyd, TorchLloyd)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with Progress("bench kmeans", (rounds + 1) * len(ways), "iterations") as progress:
        for number in range(rounds + 1):
            for name, lloyd in ways.items():
                begun = time.perf_counter()
                lloyd.step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds = time.perf_counter() - begun
                if number:
                    rates[name].append(1 / seconds)
                progress.advance(note=f"{name} {seconds:.2f} s")
    whole = {name: iterations / statistics.median(values) for name, values in rates.items()}
    return BenchResult(
        protocol="bench/kmeans",
        device=f"{device_name(device)}, {cores()} cores",
        inputs={},
        settings={"vectors": vectors, "dimensions": dimensions, "words": words, "iterations": iterations},
        unit="iterations",
        timings=[Timing(name, values, f"{whole[name]:.3g} s a vocabulary") for name, values in rates.items()],
        figures={f"seconds_{name}": value for name, value in whole.items()},
        notes=[f"the default here is {default_backend(sample, device)}"],
    )


def _vectors(count: int, dimensions: int) -> NDArray[np.float32]:
    """Rectified mixtures of the same few factors, float32 (S, D)."""
    generator = np.random.default_rng(0)
    mixture = generator.standard_normal((_FACTORS, dimensions), np.float32)
    vectors: NDArray[np.float32] = generator.standard_normal((count, _FACTORS), np.float32) @ mixture
    return np.maximum(vectors, 0, out=vectors)
