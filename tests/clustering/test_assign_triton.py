"""The search on tensor cores, without any: in Triton's interpreter, and compiled for GPUs that are not here."""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from bowstore.words.assign import assign_kernels as kernels
from bowstore.words.assign.assign_triton import HOPPER, OTHER, Tiles, prepare_fast, tiles_for


def test_the_kernels_in_the_interpreter() -> None:
    """In a process of its own, because Triton reads the variable when it is imported."""
    file = Path(__file__).with_name("interpreted_assign_triton.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def compiled(kernel: triton.JITFunction, tiles: Tiles, capability: int, half: str, **sizes: int) -> CompiledKernel:
    """A kernel as a GPU of that compute capability would run it, for widths and addresses aligned to 16 bytes."""
    types = {
        "x_tiles": f"tensordesc<{half}[{tiles.rows},{tiles.dims}]>" if tiles.bulk else f"*{half}",
        "word_tiles": f"tensordesc<{half}[{tiles.words},{tiles.dims}]>" if tiles.bulk else f"*{half}",
        "rounded_ptr": f"*{half}",
        "rows_ptr": "*i64",
        **dict.fromkeys(("ids_ptr", "listed_ptr", "count_ptr"), "*i32"),
        **dict.fromkeys(("n", "k", "d", "width", "ranges", "keep", "row_step", "listed"), "i32"),
        **dict.fromkeys(("scale", "norm_share", "rest_share", "floor"), "fp32"),
        "dim_step": "i64",
        **dict.fromkeys(sizes, "constexpr"),
    }
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name == "d" or signature[name].startswith("*")
    }
    return triton.compile(
        ASTSource(kernel, signature, sizes, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages},
    )


SEARCHES = [(kernels.search, {}), (kernels.list_below, {"LISTED": 128})]


def blocks(tiles: Tiles) -> dict[str, int]:
    return {"ROWS": tiles.rows, "WORDS": tiles.words, "DIMS": tiles.dims, "BULK": tiles.bulk}


@pytest.mark.parametrize(("kernel", "sizes"), SEARCHES)
def test_compiles_for_hopper(kernel: triton.JITFunction, sizes: dict[str, int]) -> None:
    made = compiled(kernel, HOPPER, 90, "fp16", **sizes, **blocks(HOPPER))
    assert "wgmma.mma_async" in made.asm["ptx"]  # tensor cores, fed from shared memory,
    assert "cp.async.bulk.tensor" in made.asm["ptx"]  # which the tensor memory accelerator fills
    assert HOPPER.shared_bytes <= made.metadata.shared <= 227 * 1024  # no more copies than the tiles in flight


@pytest.mark.parametrize(
    ("kernel", "sizes", "capability", "half"),
    [(*SEARCHES[0], 80, "bf16"), (*SEARCHES[1], 80, "fp16"), (*SEARCHES[0], 89, "fp16"), (*SEARCHES[0], 120, "fp16")],
)
def test_compiles_for_other_gpus(kernel: triton.JITFunction, sizes: dict[str, int], capability: int, half: str) -> None:
    made = compiled(kernel, OTHER, capability, half, **sizes, **blocks(OTHER))
    assert "mma.sync" in made.asm["ptx"]
    assert "cp.async.cg.shared.global" in made.asm["ptx"]  # fetched ahead, 16 bytes at a time
    assert made.metadata.shared <= 99 * 1024  # what a block may take on an RTX 30, 40 or 50, or an L4
    assert capability > 100 or stack_bytes(made) == 0


def test_the_other_kernels_compile() -> None:
    tiles = Tiles(16, 16, 16, 4, 2)
    assert compiled(kernels.round_rows, tiles, 90, "fp16", ROWS=16, DIMS=128).asm["cubin"]
    assert compiled(kernels.round_rows, tiles, 80, "bf16", ROWS=16, DIMS=128).asm["cubin"]
    for lanes in (2, 16, 128):
        assert compiled(kernels.compare, tiles, 90, "fp16", LANES=lanes, DIMS=4096 // lanes).asm["cubin"]


def test_sizes_of_one_compile() -> None:
    """Triton compiles a one among the arguments as a constant."""
    tiles = Tiles(16, 16, 16, 4, 2)
    assert compiled(kernels.round_rows, tiles, 90, "fp16", ROWS=16, DIMS=128, dim_step=1).asm["cubin"]
    assert compiled(kernels.compare, tiles, 90, "fp16", LANES=2, DIMS=2048, d=1, dim_step=1).asm["cubin"]


def test_the_least_score_is_sought_within_threads_and_registers() -> None:
    """Three comparisons a score, none of which chooses an id; the ends of ranges are few."""
    made = compiled(kernels.search, HOPPER, 90, "fp16", **blocks(HOPPER))
    scores = (
        HOPPER.rows * HOPPER.words // (32 * HOPPER.warps)
    )  # of a thread, of a block; the compiler writes them twice
    used = Counter(re.findall(r"^\s+(?:@\S+ )?([a-z]+)\.\S*", made.asm["ptx"], re.MULTILINE))
    assert used["min"] + used["max"] <= 2 * 3.2 * scores
    assert used["selp"] + used["setp"] < scores
    assert ".ftz" not in made.asm["ptx"]  # places are kept in numbers that are nearly zero, too
    assert stack_bytes(made) == 0


def stack_bytes(made: CompiledKernel) -> int:
    """Of memory that a thread of a kernel takes for what its registers do not hold."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", usage)
    assert found, usage
    return int(found[1])


def test_tiles_without_a_gpu_are_small() -> None:
    assert tiles_for(torch.device("cpu")) == OTHER


def test_scaled_words_fill_the_range_of_float16() -> None:
    for size in (1e-30, 1.0, 3e4, 1e30):
        fast = prepare_fast(size * torch.randn(50, 9, generator=torch.Generator().manual_seed(0)))
        assert 32 <= fast.rounded_KD.abs().max() <= 64
        assert fast.rounded_KD.shape == (50, 16)
        assert 0 < fast.floor < fast.norm_share < 2.0**-10 < 1 < fast.rest_share < 1.001
