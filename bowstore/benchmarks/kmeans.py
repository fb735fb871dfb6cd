"""k-means by each backend, on the same made-up vectors."""

import statistics
from importlib.util import find_spec

import torch
from torch import Tensor

from bowstore.benchmarks.config import KmeansBench
from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.benchmarks.rounds import interleaved
from bowstore.clustering.kmeans import Backend, Lloyd, default_backend, make_lloyd
from bowstore.clustering.lloyd_torch import TorchLloyd
from bowstore.environment import choose_device, cores, device_name
from bowstore.errors import UsageError

_FACTORS = 16  # of which vectors are made: real ones, too, lie near surfaces of few dimensions
_BLOCK = 1 << 18  # vectors that are made at a time


def bench_kmeans(config: KmeansBench) -> BenchResult:
    """Iterations/s of the backends, interleaved, after two to warm up: the first is exact in every backend.

    Raises:
        UsageError: fewer vectors than words, or a backend that does not run here.
    """
    vectors, dimensions, num_words, iterations = config.vectors, config.dimensions, config.num_words, config.iterations
    device, backends = choose_device(config.device), config.backends
    if num_words > vectors:
        raise UsageError(f"--K {num_words} words need as many vectors, --vectors {vectors} are fewer; raise it")
    there = _there(num_words, dimensions, device)
    for backend in backends:
        if backend not in there:
            raise UsageError(f"--backend {backend} does not run {_why_not(backend)}; choose one of {', '.join(there)}")
    default = default_backend((vectors, dimensions), num_words, device)
    chosen = tuple(backends) or there
    sample_Sp = _vectors(vectors, dimensions, device if set(chosen) == {"torch"} else torch.device("cpu"))
    ways: dict[str, Lloyd] = {
        backend: TorchLloyd(sample_Sp, num_words, 0, device)
        if backend == "torch"
        else make_lloyd(backend, sample_Sp.numpy(), num_words, 0, device)
        for backend in chosen
    }
    steps = {name: lloyd.step for name, lloyd in ways.items()}
    seconds = interleaved("bench kmeans", steps, config.rounds, device, warm=2)
    rates = {name: [1 / spent for spent in values] for name, values in seconds.items()}
    whole = {name: iterations / statistics.median(values) for name, values in rates.items()}
    return BenchResult(
        protocol="bench/kmeans",
        device=f"{device_name(device)}, {cores()} cores",
        inputs={},
        settings={"vectors": vectors, "dimensions": dimensions, "words": num_words, "iterations": iterations},
        unit="iterations",
        timings=[Timing(name, values, f"{whole[name]:.3g} s a vocabulary") for name, values in rates.items()],
        figures={f"seconds_{name}": value for name, value in whole.items()},
        notes=[f"the default here is {default}"],
        version=2,
    )


def _there(num_words: int, dimensions: int, device: torch.device) -> tuple[Backend, ...]:
    """The backends that run on this machine, on that device, at that size."""
    if device.type == "cuda" or find_spec("faiss") is None:
        return ("torch",)
    from bowstore.clustering.lloyd_faiss import SuperLloyd  # FAISS

    return ("faiss", "super", "torch") if SuperLloyd.suits(num_words, dimensions) else ("faiss", "torch")


def _why_not(backend: Backend) -> str:
    if backend == "super" and find_spec("faiss") is not None:
        return "on a GPU, below 1024 words or 128 dimensions, or with a FAISS before 1.15"
    return "on a GPU, or without FAISS"


def _vectors(count: int, dimensions: int, device: torch.device) -> Tensor:
    """Rectified mixtures of the same few factors, float32 (S, D), made on the device."""
    generator = torch.Generator(device).manual_seed(0)
    mixture = torch.randn(_FACTORS, dimensions, generator=generator, device=device)
    vectors = torch.empty(count, dimensions, device=device)
    for part in torch.split(vectors, _BLOCK):
        torch.mm(torch.randn(len(part), _FACTORS, generator=generator, device=device), mixture, out=part).relu_()
    return vectors
