"""Assigning words against the matrix product that it cannot do without, and against FAISS.

All ways run interleaved in one process, because machines are noisy: the median of the rounds' ratios counts.
"""

import statistics
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bowstore.benchmarks.result import BenchResult, Timing
from bowstore.benchmarks.rounds import Way, interleaved
from bowstore.environment import cores, device_name
from bowstore.exact import cpu_threads, exact_float32
from bowstore.progress import say
from bowstore.words.assign.assign import PreparedWords, assign, assign_reference, prepare_words
from bowstore.words.encode.workers import compute_workers, workers

if TYPE_CHECKING:
    from bowstore.words.assign.assign_triton import FastWords, Tiles

# What bounds it, by what the ratio over each is called.
_BOUNDS = {"matrix product": "matmul", "float16 product": "half_matmul", "FAISS": "faiss"}
_FACTORS = 16  # of which features and words are made: real ones, too, lie near surfaces of few dimensions
_GPU_CALLS = 10  # a timing: `encode` assigns one batch after the other, and a GPU that idles between two is slower
_SCORES = 1 << 30  # of a matrix product, held at a time


def bench_assign(
    *, images: int, positions: int, dimensions: int, num_words: int, rounds: int, device: torch.device
) -> BenchResult:
    """Images/s of `assign`, of the float32 matrix product of the same shape, and of FAISS's exhaustive search.

    On a GPU with tensor cores also the float16 product, and the shares of vectors that needed a second look; then, once
    the figure has been printed, the float32 reference and the search in three tilings.

    Args:
        images: in a batch.
        positions: feature vectors of an image.
        dimensions: of a vector.
        num_words: K.
        rounds: interleaved rounds, after one to warm up.
        device: where features and words lie.
    """
    features_ND, vocabulary_KD = _vectors(images * positions, dimensions, num_words, device)
    prepared = prepare_words(vocabulary_KD)
    ways: dict[str, Way] = {
        "assign": _spread(features_ND, lambda part_ND: partial(assign, part_ND, prepared)),
        "matrix product": _spread(features_ND, partial(_product, right_DK=vocabulary_KD.T.contiguous())),
        **_faiss(features_ND, vocabulary_KD),
    }
    if prepared.fast:  # on tensor cores, and nothing else
        ways["float16 product"] = _product(features_ND.half(), vocabulary_KD.T.contiguous().half())
    rates = _rates("bench assign", ways, rounds, images, device)
    say(", ".join(f"{name} {statistics.median(values):.0f} images/s" for name, values in rates.items()))
    if prepared.fast:  # last, because compiling takes long: the figure has been printed, whatever becomes of the rest
        others = _other_searches(features_ND, prepared, prepared.fast)
        rates |= _rates("bench assign, other searches", others, rounds, images, device)
    operations = 2.0 * positions * dimensions * num_words
    teraflops = {name: operations * statistics.median(values) / 1e12 for name, values in rates.items()}
    return BenchResult(
        protocol="bench/assign",
        device=f"{device_name(device)}, {cores()} cores",
        inputs={},
        settings={
            "images": images,
            "positions": positions,
            "dimensions": dimensions,
            "words": num_words,
            "threads": cores() if device.type == "cpu" else torch.get_num_threads(),
        },
        unit="images",
        timings=[Timing(name, values, f"{teraflops[name]:.3g} TFLOP/s") for name, values in rates.items()],
        figures={
            **{f"ratio_over_{name}": _ratio(rates, way) for way, name in _BOUNDS.items() if way in rates},
            "teraflops": teraflops["assign"],
            **_agreement(features_ND, prepared),
        },
        notes=["of made-up features of 16 factors; the shares of second looks depend on the features"],
    )


def _rates(what: str, ways: dict[str, Way], rounds: int, images: int, device: torch.device) -> dict[str, list[float]]:
    """Images/s of each way in interleaved rounds."""
    calls = _GPU_CALLS if device.type == "cuda" else 1
    seconds = interleaved(what, {name: _repeated(way, calls) for name, way in ways.items()}, rounds, device)
    return {name: [calls * images / spent for spent in values] for name, values in seconds.items()}


def _repeated(way: Way, calls: int) -> Way:
    def repeat() -> None:
        for _ in range(calls):
            way()

    return repeat


def _spread(features_ND: Tensor, make: Callable[[Tensor], Way]) -> Way:
    """A way for all vectors: on a CPU cut up for workers of one thread each, as `bowstore encode` does it."""
    if features_ND.is_cuda:
        return make(features_ND)
    ways = [make(part_ND) for part_ND in features_ND.chunk(compute_workers(features_ND.device))]

    def all_ways() -> None:
        with cpu_threads(features_ND.device, 1), exact_float32(), workers(len(ways)) as pool:
            list(pool.map(lambda way: way(), ways))

    return all_ways


def _vectors(count: int, dimensions: int, num_words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features (N, D) and words (K, D), rectified mixtures of the same few factors."""
    generator = torch.Generator(device).manual_seed(0)
    mixture = torch.randn(_FACTORS, dimensions, generator=generator, device=device)
    features = torch.randn(count, _FACTORS, generator=generator, device=device) @ mixture
    vocabulary = torch.randn(num_words, _FACTORS, generator=generator, device=device) @ mixture
    return features.relu_(), vocabulary.relu_()


def _product(left_ND: Tensor, right_DK: Tensor) -> Way:
    """Their product, in as many parts as memory requires, into memory allocated before."""
    rows = max(1, min(len(left_ND), _SCORES // right_DK.shape[1]))
    buffer = torch.empty(rows, right_DK.shape[1], dtype=left_ND.dtype, device=left_ND.device)

    def product() -> None:
        with exact_float32():
            for start in range(0, len(left_ND), rows):
                part_ND = left_ND[start : start + rows]
                torch.mm(part_ND, right_DK, out=buffer[: len(part_ND)])

    return product


def _faiss(features_ND: Tensor, vocabulary_KD: Tensor) -> dict[str, Way]:
    """FAISS on the features' device; nothing without it, or for a GPU that the installed FAISS does not support."""
    if not find_spec("faiss"):
        return {}
    import faiss  # if it is there

    index: Any
    if features_ND.is_cuda:
        if not hasattr(faiss, "GpuIndexFlatL2"):
            return {}
        import_module("faiss.contrib.torch_utils")  # lets indexes take tensors
        config = faiss.GpuIndexFlatConfig()
        config.device = features_ND.device.index or 0
        resources = faiss.StandardGpuResources()  # has to outlive the index
        index = faiss.GpuIndexFlatL2(resources, vocabulary_KD.shape[1], config)
        index.add(vocabulary_KD)
        return {"FAISS": lambda: (resources, index.search(features_ND, 1))}
    faiss.omp_set_num_threads(cores())
    index = faiss.IndexFlatL2(vocabulary_KD.shape[1])
    index.add(vocabulary_KD.numpy())
    return {"FAISS": lambda: index.search(features_ND.numpy(), 1)}


def _other_searches(features_ND: Tensor, prepared: PreparedWords, fast: "FastWords") -> dict[str, Way]:
    """The float32 reference, and the search in each of three tilings that fits the GPU.

    Each further tiling is compiled anew, which takes longer than all rounds.
    """
    from bowstore.words.assign.assign_triton import HOPPER, OTHER, fits, nearest  # Triton

    tilings = [HOPPER, HOPPER._replace(rows=128), OTHER]
    return {
        "float32 reference": partial(assign_reference, features_ND, prepared),
        **{
            _name(tiles): partial(nearest, features_ND, fast, tiles)
            for tiles in tilings
            if fits(tiles, features_ND.device)
        },
    }


def _name(tiles: "Tiles") -> str:
    return f"{tiles.rows}x{tiles.words}x{tiles.dims} {tiles.warps} warps {tiles.stages} stages"


def _agreement(features_ND: Tensor, prepared: PreparedWords) -> dict[str, float]:
    """Shares of vectors whose word differs from the float32 reference's, and of those searched again."""
    if not prepared.fast:
        return {}
    from bowstore.words.assign.assign_triton import nearest  # Triton

    some = features_ND[: 1 << 15]
    unlike = assign(some, prepared).int() != assign_reference(some, prepared).int()
    found = nearest(some, prepared.fast)
    return {
        "share_unlike_float32": float(unlike.float().mean()),
        "share_compared": found.compared / len(some),
        "share_searched_twice": found.searched_twice / len(some),
        "share_left_to_float32": len(found.open_U) / len(some),
    }


def _ratio(rates: dict[str, list[float]], other: str) -> float:
    """Median over the rounds of `assign`'s rate over another's."""
    return statistics.median(ours / theirs for ours, theirs in zip(rates["assign"], rates[other], strict=True))
