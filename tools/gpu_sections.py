"""The sections of a GPU check that need no images: driver, search, k-means, training steps.

Each is a function of a `Check`, whose name is the section's (gpu_plan.py says what it proves).
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu_process import Check
from gpu_words import SHAPES, TOY_SHAPES, excess, rectified

from bowstore import gpu
from bowstore.benchmarks.rounds import seconds_of
from bowstore.exact import exact_float32
from bowstore.words.assign.assign import assign as assign_words
from bowstore.words.assign.assign import assign_reference, prepare_words

_GIB = 1 << 30


def machine(check: Check) -> None:
    """What is there, and what it can do at most: the figures that all others are held against."""
    device, rounds = check.device, check.size(5, 3, 2)
    driver = gpu.ask_driver()
    check.claim("driver", None, f"CUDA {'.'.join(map(str, driver.cuda))}" if driver.cuda else "none")
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        told = f"compute capability {properties.major}.{properties.minor}, {properties.total_memory / _GIB:.1f} GiB"
        check.claim("search on tensor cores", None, f"{'yes' if gpu.runs_triton(device) else 'no'}; {told}")
        check.claim("video library", not (note := gpu.decoder_note()), note or "")
        check.claim("memory is free", not (note := gpu.memory_note(device)), note or "")
    _copies(check, rounds)
    _products(check, rounds)


def _copies(check: Check, rounds: int) -> None:
    """GB/s to the device, from pinned and other memory, and within it."""
    size = check.size(_GIB, _GIB, 1 << 22)
    there = torch.empty(size, dtype=torch.uint8, device=check.device)
    for name, source in {
        "copy from pinned memory": torch.ones(size, dtype=torch.uint8, pin_memory=check.device.type == "cuda"),
        "copy from other memory": torch.ones(size, dtype=torch.uint8),
        "copy on the device": torch.ones_like(there),
    }.items():
        spent = [
            seconds_of(lambda source=source: there.copy_(source, non_blocking=True), check.device)
            for _ in range(rounds + 1)
        ]
        check.figure(name, *(size / 1e9 / seconds for seconds in spent[1:]), unit="GB/s")


def _products(check: Check, rounds: int) -> None:
    """TFLOP/s of a square matrix product in every precision."""
    side = check.size(8192, 8192, 128)
    left, right = (torch.randn(side, side, device=check.device) for _ in range(2))
    ways: dict[str, Callable[[], Any]] = {"float32 product": lambda: _exact(left, right)}
    if check.device.type == "cuda":
        ways["TF32 product"] = lambda: _tf32(left, right)
    for dtype in (torch.bfloat16, torch.float16):
        halves = left.to(dtype), right.to(dtype)
        ways[f"{str(dtype).removeprefix('torch.')} product"] = lambda halves=halves: torch.mm(*halves)
    for name, way in ways.items():
        spent = [seconds_of(way, check.device) for _ in range(rounds + 1)]
        check.figure(name, *(2 * side**3 / 1e12 / seconds for seconds in spent[1:]), unit="TFLOP/s")


def _exact(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    with exact_float32():
        return torch.mm(left, right)


def _tf32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        return torch.mm(left, right)
    finally:
        matmul.fp32_precision = before


# Of Triton 3.6 with NumPy 2.4; it says nothing about the kernels.
_OLD_INTERPRETER = "InterpreterError: TypeError('only 0-dimensional arrays can be converted"
_COMPILE = """
import sys, torch
from gpu_words import rectified
from bowstore.words.assign.assign_triton import HOPPER, OTHER, fits, nearest, prepare_fast
device = torch.device(sys.argv[1])
tiles, half = {"hopper": HOPPER, "other": OTHER}[sys.argv[2]], getattr(torch, sys.argv[3])
if device.type == "cuda" and not fits(tiles, device):
    print("this GPU has less shared memory")
    raise SystemExit
features, words = rectified(int(sys.argv[4]), int(sys.argv[5]), 90, device)
found = nearest(features, prepare_fast(words, half), tiles)
print(len(found.open_U), "open,", found.searched_twice, "searched twice")
"""


def kernels(check: Check) -> None:
    """Each tiling and precision in a process of its own, so that they compile side by side and one crash is one."""
    if not check.toy and not gpu.runs_triton(check.device):
        check.claim("the search", None, "in float32 on this GPU, without Triton")
        return
    cases = [(tiles, half) for tiles in ("other", "hopper") for half in ("float16", "bfloat16")]
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if check.toy else {})}

    def one(case: tuple[str, str]) -> tuple[float, "subprocess.CompletedProcess[str]"]:
        begun = time.perf_counter()
        arguments = [str(check.device), *case, *map(str, check.size((3000, 1024), (3000, 1024), (9, 40)))]
        done = subprocess.run(
            [sys.executable, "-c", _COMPILE, *arguments], env=environment, capture_output=True, text=True
        )
        return time.perf_counter() - begun, done

    with ThreadPoolExecutor(check.size(4, 4, 1)) as pool:
        for (tiles, half), (spent, done) in zip(cases, pool.map(one, cases[: check.size(4, 4, 1)]), strict=False):
            said = (done.stdout if done.returncode == 0 else done.stderr or f"exit code {done.returncode}").strip()
            print(done.stdout, done.stderr)
            runs: bool | None = done.returncode == 0
            if check.toy and _OLD_INTERPRETER in said:
                runs, said = None, "not tried: Triton's interpreter is too old for this NumPy"
            check.claim(f"{tiles} {half}", runs, f"{spent:.1f} s; {said.splitlines()[-1][:120]}")


def words(check: Check) -> None:
    """Proven words are the nearest in float64; where nothing is proven, float32 may miss them by its rounding alone."""
    for n, d, k in check.size(SHAPES, SHAPES, TOY_SHAPES):
        features, vocabulary = rectified(n, d, k, check.device)
        prepared = prepare_words(vocabulary)
        if prepared.fast is None:
            # The bound of assign_reference's docstring, for half squared distances.
            found = excess(features, vocabulary, assign_words(features, prepared), share=2 * (d + 2) * 2.0**-24)
        else:
            from bowstore.words.assign.assign_triton import nearest

            proven = nearest(features, prepared.fast)
            found = excess(features, vocabulary, proven.ids_N, proven.open_U)
        few = found.open == 0 or d == 3  # where every eighth word and vector is zero
        check.claim(
            f"nearest of {n} x {d}, K = {k}", found.wrong == 0 and few, f"{found.wrong} wrong, {found.open} open"
        )
    _hard_words(check)


def _hard_words(check: Check) -> None:
    """Ties, copies and vectors too far off for half precision."""
    generator = torch.Generator(check.device).manual_seed(0)
    vocabulary, features = (
        torch.randint(0, 3, (n, 4), generator=generator, device=check.device).float() for n in (500, 300)
    )
    expected = torch.cdist(features.double(), vocabulary.double()).square().round().argmin(dim=1)
    found = assign_words(features, prepare_words(vocabulary)).long()
    check.claim("ties go to the lower id", torch.equal(found, expected))
    same = assign_words(torch.zeros(3, 8, device=check.device), prepare_words(torch.zeros(500, 8, device=check.device)))
    check.claim("of copies the first", same.tolist() == [0, 0, 0])
    features, vocabulary = rectified(50, 64, 700, check.device)
    features[7] *= 1e8
    prepared = prepare_words(vocabulary)
    ids = assign_words(features, prepared)
    check.claim("a vector far off", bool((ids.int() == assign_reference(features, prepared).int())[7]))
    if (needed := check.size(24, 24, 0)) and torch.cuda.mem_get_info(check.device)[0] >= needed * _GIB:
        features = torch.zeros(2**31 // 1024 + 5000, 1024, device=check.device)
        some, vocabulary = rectified(3000, 1024, 2000, check.device)
        features[-3000:] = some
        prepared = prepare_words(vocabulary)
        same = torch.equal(assign_words(features, prepared)[-3000:].int(), assign_words(some, prepared).int())
        check.claim("offsets above 32 bits", same)


def assign(check: Check) -> None:
    """`bowstore bench assign` at the paper's size."""
    from bowstore.benchmarks.assign import bench_assign

    images, dimensions, k = check.size((256, 1024, 20000), (256, 1024, 20000), (2, 16, 300))
    with check.heard():
        result = bench_assign(
            images=images, positions=check.size(196, 196, 9), dimensions=dimensions, num_words=k,
            rounds=check.size(5, 3, 2), device=check.device,
        )  # fmt: skip
    check.bench(result)
    rates = {timing.name: list(timing.rates) for timing in result.timings}
    check.figure("assign images/s", *rates["assign"], unit="images/s")
    check.figure("assign over the float32 product", result.figures["ratio_over_matmul"])
    names = {"share_unlike_float32": "words unlike float32's", "share_unlike_faiss": "words unlike FAISS's"}
    for name, value in result.figures.items():
        if name.startswith("share"):
            check.figure(names.get(name, name.replace("_", " ")), value)


def kmeans(check: Check) -> None:
    """`bowstore bench kmeans` at the paper's size; in small the same bytes twice, and FAISS's inertia."""
    from bowstore.benchmarks.config import KmeansBench
    from bowstore.benchmarks.kmeans import bench_kmeans

    vectors, dimensions, k = check.size((5_120_000, 1024, 20_000), (5_120_000, 1024, 20_000), (600, 8, 20))
    rounds, device = check.size(3, 1, 2), check.device.type
    result = bench_kmeans(
        KmeansBench(vectors=vectors, dimensions=dimensions, num_words=k, rounds=rounds, device=device)
    )
    check.bench(result)
    for timing in result.timings:
        name = "k-means s, 25 iterations" if timing.name == "torch" else f"{timing.name}, s, 25 iterations"
        check.figure(name, *(25 / rate for rate in timing.rates), unit="s")
    _small_kmeans(check)


def _small_kmeans(check: Check) -> None:
    from bowstore.clustering.kmeans import kmeans as cluster

    count, k = check.size((20_000, 200), (20_000, 200), (400, 10))
    sample = rectified(count, 64, 1, check.device)[0].cpu().numpy()

    def found(device: torch.device, backend: Any) -> Any:
        return cluster(sample, k, seed=0, iterations=10, device=device, backend=backend)

    first, again = (found(check.device, "torch") for _ in range(2))
    check.claim("the same centroids twice", (first.centroids_Kp == again.centroids_Kp).all().item())
    other = found(torch.device("cpu"), "torch")
    check.claim(
        "inertia as on the CPU",
        abs(first.inertia / other.inertia - 1) < 0.01,
        f"{first.inertia:.6g} {other.inertia:.6g}",
    )
    check.claim("no word without vectors", bool((first.counts_K > 0).all()))


def step(check: Check) -> None:
    """ResNet-50, batch 256, K = 20000, bags of CutMix, each way with one thing more than the one before."""
    from gpu_step import StepWay

    ways = (
        StepWay("eager", {"compile": False}),
        StepWay("compiled", {"compile": "auto"}),  # on a GPU
        StepWay("compiled, tuned", {"compile": "auto"}, tuned=True),
        StepWay("tuned, stem of four channels", {"compile": "auto", "pad_stem": True}, tuned=True),
    )
    result = _bench_step(check, ways)
    rates = {timing.name: list(timing.rates) for timing in result.timings}
    best = max((way.name for way in ways), key=lambda name: max(rates[name]))
    check.figure("training images/s", *rates[best], unit="images/s", note=best)
    check.figure("targets, share of the step", result.figures["share_targets"])
    if check.device.type == "cuda":
        check.figure("most memory", torch.cuda.max_memory_allocated(check.device) / _GIB, unit="GiB")


def faiss(check: Check) -> None:
    """FAISS loaded after torch and before it, and its search on a GPU where it is built for one."""
    for order in ("torch, faiss", "faiss, torch"):
        done = subprocess.run([sys.executable, "-c", f"import {order}"], capture_output=True, text=True)
        said = done.stderr.strip().splitlines()
        check.claim(f"import {order}", done.returncode == 0, said[-1][:150] if done.returncode and said else "")
    import faiss as library

    on_gpu = hasattr(library, "GpuIndexFlatL2") and library.get_num_gpus() > 0
    check.claim("version", None, f"{library.__version__}, {'with' if on_gpu else 'without'} GPU")
    features, vocabulary = rectified(check.size(20_000, 20_000, 200), 64, check.size(2000, 2000, 30), check.device)
    index: Any = library.IndexFlatL2(64)
    if on_gpu and check.device.type == "cuda":
        resources = library.StandardGpuResources()
        index = library.GpuIndexFlatL2(resources, 64)
    index.add(vocabulary.cpu().numpy())
    expected = torch.from_numpy(index.search(features.cpu().numpy(), 1)[1][:, 0])
    ids = assign_words(features, prepare_words(vocabulary)).cpu().long()
    check.figure("words unlike FAISS's", float((ids != expected).float().mean()))


def teacher(check: Check) -> None:
    """The compiled step with and without a bfloat16 teacher, whose conv4 is assigned to 20000 words."""
    from gpu_step import StepWay

    result = _bench_step(
        check, [StepWay("compiled", {"compile": "auto"}, tuned=True)], check.size("conv4", "conv4", "block2")
    )
    check.figure("over the teacher in the loop", result.figures["ratio_over_teacher_in_the_loop"])


def _bench_step(check: Check, ways: Any, teacher_layer: str | None = None) -> Any:
    from gpu_step import StepSettings, bench_step

    settings = StepSettings(
        arch=check.size("resnet50", "resnet50", "wrn-10-1"), size=check.size(224, 224, 16),
        batch=check.size(256, 256, 8), num_words=check.size(20_000, 20_000, 30), grid=check.size(14, 14, 4),
        steps=check.size(20, 10, 2), rounds=check.size(5, 3, 2), device=check.device,
    )  # fmt: skip
    with check.heard(), tempfile.TemporaryDirectory(dir=check.scratch) as folder:
        result = bench_step(settings, ways, Path(folder), teacher_layer=teacher_layer)
    check.bench(result)
    return result


def trunk(check: Check) -> None:
    """ResNet-50 to conv4, batch 256."""
    from gpu_trunk import bench_trunk

    arch, layer, size, batch = check.size(("resnet50", "conv4", 224, 256), ("resnet50", "conv4", 224, 256),
                                          ("wrn-10-1", "block2", 16, 8))  # fmt: skip
    with check.heard():
        result = bench_trunk(
            arch, layer, size=size, batch=batch, rounds=check.size(7, 3, 2), device=check.device,
            compiled=check.device.type == "cuda",
        )  # fmt: skip
    check.bench(result)
    for name, value in result.figures.items():
        check.figure(name.replace("_", " "), value, note="of the largest value")


def targets(check: Check) -> None:
    """`bowstore bench targets` on made-up words of 14 x 14."""
    from gpu_made_up import made_up_index, made_up_store

    from bowstore.benchmarks.config import TargetsBench
    from bowstore.benchmarks.targets import bench_targets
    from bowstore.config import StorageConfig

    with tempfile.TemporaryDirectory(dir=check.scratch) as name:
        folder = Path(name)
        index = made_up_index(folder / "shards", check.size(20_000, 10_000, 40))
        store = made_up_store(folder / "words.zarr", index, num_words=check.size(20_000, 20_000, 30), grid=14)
        config = TargetsBench(
            batch=check.size(256, 256, 8), batches=check.size(200, 100, 3), rounds=check.size(5, 3, 2),
            device=check.device.type,
        )  # fmt: skip
        result = bench_targets(store, index.root, None, config, StorageConfig(cache=folder / "cache"))
    check.bench(result)
    for name, value in result.figures.items():
        check.figure(name.replace("_", " "), value)


def head(check: Check) -> None:
    """The loss against its dense form, logits in float32; then head, bag and optimiser alone."""
    from bowstore.models.heads import CosineHead
    from bowstore.words.targets.bags import bag_of, bow_cross_entropy, mix_bags

    device, (batch, features, k, slots) = (
        check.device,
        check.size((256, 2048, 20_000, 196), (256, 2048, 20_000, 196), (8, 16, 30, 9)),
    )
    torch.manual_seed(0)
    network = CosineHead(features, k).to(device)
    pooled_BC = torch.rand(batch, features, device=device, requires_grad=True)
    words_BM = torch.randint(k, (batch, slots), device=device)
    partner_B, kept_B = torch.randperm(batch, device=device), torch.rand(batch, device=device)
    bag = mix_bags(bag_of(words_BM, "count"), partner_B, kept_B)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits_BK = network(pooled_BC)
    check.claim("logits in float32", logits_BK.dtype == torch.float32, str(logits_BK.dtype))
    logits_BK = logits_BK.detach().float().requires_grad_()
    dense_BK = torch.zeros_like(logits_BK).scatter_add_(1, bag.words_BM, bag.weights_BM)
    dense = -(dense_BK * torch.log_softmax(logits_BK, dim=1)).sum(dim=1).mean()
    (expected,) = torch.autograd.grad(dense, logits_BK)
    loss = bow_cross_entropy(logits_BK, bag)
    (gradient,) = torch.autograd.grad(loss, logits_BK)
    off = float(((loss - dense).abs() / dense.abs()).detach())
    check.claim("loss as in the dense form", off < 1e-6, f"off by {off:.1e}")
    off = float((gradient - expected).abs().max() / expected.abs().max())
    check.claim("gradient as in the dense form", off < 1e-5, f"off by {off:.1e} of the largest")
