"""The kernels of assign_triton.py in Triton's interpreter, on the CPU; test_assign_triton.py runs this file."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from feature_sets import KINDS, make_vectors, real_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction, create_function_from_signature

from bowstore.benchmarks.assign import bench_assign
from bowstore.clustering.lloyd_torch import TorchLloyd
from bowstore.words.assign import assign as assign_module
from bowstore.words.assign import assign_kernels, assign_triton
from bowstore.words.assign.assign import assign, assign_reference, prepare_words
from bowstore.words.assign.assign_triton import FastWords, Nearest, Tiles, likely, nearest, prepare_fast

HALVES = torch.float16, torch.bfloat16
TILES = Tiles(rows=64, words=64, dims=32, warps=4, stages=2)
BULK = TILES._replace(bulk=True)
far = pytest.mark.filterwarnings(  # NumPy's, on what a GPU computes in silence: infinite and undefined bounds
    "ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning"
)


@pytest.fixture(scope="module", autouse=True)
def _sizes_of_ranges() -> Any:
    """Triton 3.6 makes a Python number of an array of one value, which NumPy refuses from 2.4 on; 3.8 does not."""
    plain = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield


@pytest.fixture(scope="module", autouse=True)
def _bfloat16_products() -> Any:
    """The interpreter holds bfloat16 as its bits and multiplies those: give it the numbers."""
    plain = interpreter.InterpreterBuilder.create_dot

    def numbers(bits: Any) -> Any:
        if bits.dtype != interpreter.tl.bfloat16:
            return bits
        data = (bits.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, interpreter.tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return plain(self, numbers(a), numbers(b), *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


def scores(features_ND: Tensor, words_KD: Tensor) -> Tensor:
    """Squared distances in float64, or one constant less a row, with the last bits right for whole numbers."""
    middle = words_KD.double().mean(dim=0).round()
    features, words = features_ND.double() - middle, words_KD.double() - middle
    return words.square().sum(dim=1) - 2 * features @ words.T


def check_proven(features_ND: Tensor, words_KD: Tensor, found: Nearest) -> None:
    """All but the open vectors have the nearest word, to float64's rounding; of equals the lowest."""
    settled_N = torch.ones(len(features_ND), dtype=torch.bool)
    settled_N[found.open_U] = False
    scores_NK = scores(features_ND, words_KD)[settled_N]
    chosen_N = scores_NK.gather(1, found.ids_N[settled_N].long()[:, None])[:, 0]
    sizes_N = features_ND[settled_N].double().norm(dim=1) + words_KD.double().norm(dim=1).max()
    assert (chosen_N <= scores_NK.amin(dim=1) + 1e-12 * sizes_N.square()).all()
    ids_N = found.ids_N[settled_N].long()
    first_NK = (words_KD[ids_N][:, None] == words_KD).all(dim=2).int().argmax(dim=1)
    assert torch.equal(first_NK, ids_N)  # of identical words the first


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    ("n", "d", "k", "tiles"),
    [
        (1, 1, 1, TILES),
        (5, 4, 47, Tiles(16, 16, 16, 4, 2)),
        (5, 4, 97, Tiles(16, 32, 16, 4, 2)),
        (3, 5, 1, TILES),
        (1, 9, 64, TILES),
        (3, 5, 70, BULK),
        (33, 20, 300, TILES),
        (70, 129, 513, TILES._replace(ranges=3)),
        (70, 129, 513, BULK._replace(ranges=3)),
        (32, 64, 128, TILES._replace(ranges=1)),
        (40, 31, 65, TILES._replace(ranges=7)),
        (6, 3, 65535, Tiles(16, 128, 16, 4, 2)),
    ],
)
def test_the_nearest_word_for_odd_shapes(n: int, d: int, k: int, tiles: Tiles, half: torch.dtype) -> None:
    features, words = make_vectors("normal", n, d, k, seed=n)
    found = nearest(features, prepare_fast(words, half), tiles)
    assert len(found.open_U) == 0
    check_proven(features, words, found)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 40),
    d=st.integers(1, 70),
    k=st.integers(1, 150),
    half=st.sampled_from(HALVES),
    tiles=st.sampled_from([TILES, BULK]),
    seed=st.integers(0, 1000),
)
@far
def test_the_nearest_word_of_any_kind(
    kind: str, n: int, d: int, k: int, half: torch.dtype, tiles: Tiles, seed: int
) -> None:
    features, words = make_vectors(kind, n, d, k, seed)
    fast = prepare_fast(words, half)
    found = nearest(features, fast, tiles)
    check_proven(features, words, found)
    assert len(found.open_U) == 0 or kind in ("far", "zeros") or k == 1
    prepared = prepare_words(words)._replace(fast=fast)
    check_contract(features, words, assign(features, prepared))


def test_the_likely_word_is_nearly_always_the_nearest() -> None:
    features, words = real_vectors(4, 150)
    features[5] *= 1e6  # infinite in half precision, were it not moved to its edge
    found = likely(features, prepare_fast(words), largest=float(features.abs().max()), tiles=TILES)
    scores_NK = scores(features, words)
    least_N = scores_NK.amin(dim=1)
    chosen_N = scores_NK.gather(1, found[:, None])[:, 0]
    assert (chosen_N == least_N).double().mean() > 0.97
    apart_N = least_N + features.double().square().sum(dim=1)
    assert ((chosen_N - least_N) <= 0.01 * apart_N.abs()).all()


def test_kmeans_by_likely_words_moves_as_by_nearest_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = real_vectors(4, 150)[0][:600].contiguous().numpy()
    exact, fast = (TorchLloyd(sample, 40, 0, torch.device("cpu")) for _ in range(2))
    before = [exact.step()[0] for _ in range(3)]
    monkeypatch.setattr(assign_module, "runs_triton", lambda device: True)
    searches = Mock(wraps=likely)
    monkeypatch.setattr(assign_triton, "likely", searches)
    assert [fast.step()[0] for _ in range(3)] == pytest.approx(before, rel=0.01)
    assert searches.call_count == 3
    words, distances = fast.nearest()  # proven
    apart = np.square(sample[:, None].astype(np.float64) - fast.centroids()[None]).sum(-1)
    assert np.array_equal(words, apart.argmin(1))
    assert np.allclose(distances, apart.min(1), rtol=1e-4)


def check_contract(features_ND: Tensor, words_KD: Tensor, ids_N: Tensor) -> None:
    assert ids_N.dtype == torch.uint16
    distances_NK = torch.cdist(features_ND.double(), words_KD.double()).square()
    chosen_N = distances_NK.gather(1, ids_N.long()[:, None])[:, 0]
    norm, norm_N = words_KD.double().norm(dim=1).max(), features_ND.double().norm(dim=1)
    bound_N = 4 * (features_ND.shape[1] + 2) * 2.0**-24 * (norm_N * norm + norm**2 / 2)
    assert (chosen_N <= distances_NK.amin(dim=1) + bound_N + 1e-12 * norm_N.square()).all()


def bounds(features_ND: Tensor, fast: FastWords, ranges: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the search found, and the bound e of what it listed: low (M, N), ids (M, N), others (R, N), e (M, N)."""
    rounded_ND, alpha_N = assign_triton._round(features_ND, fast)
    tiles = TILES._replace(ranges=ranges)
    low_MN, ids_MN, others_RN = assign_triton._search(rounded_ND, alpha_N, fast, tiles)
    last = len(fast.words_KD) - 1
    return low_MN, ids_MN, others_RN, alpha_N * fast.reach_J[ids_MN.clamp(max=last).long()]


@far
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([kind for kind in KINDS if kind != "far"]),
    d=st.integers(1, 100),
    k=st.integers(1, 200),
    ranges=st.integers(1, 4),
    half=st.sampled_from(HALVES),
    seed=st.integers(0, 1000),
)
def test_every_score_lies_within_its_bound(
    kind: str, d: int, k: int, ranges: int, half: torch.dtype, seed: int
) -> None:
    features, words = make_vectors(kind, 20, d, k, seed)
    fast = prepare_fast(words, half)
    low_MN, ids_MN, others_RN, bound_MN = bounds(features, fast, ranges)
    shifted_ND = (features.double() - fast.middle_D) * fast.scale
    words_KD = (words.double() - fast.middle_D) * fast.scale
    exact_KN = words_KD.square().sum(dim=1)[:, None] / 2 - words_KD @ shifted_ND.T
    exact_KN = torch.cat([exact_KN, torch.full((1, 20), torch.inf)])
    listed_MN = exact_KN.gather(0, ids_MN.clamp(max=k).long())
    tiny_N = 1e-13 * (shifted_ND.norm(dim=1) + words_KD.norm(dim=1).max()).square()  # float64's own rounding
    finite_N = bound_MN.isfinite().all(dim=0)
    assert finite_N.all() or (kind == "large" and k == 1)  # one word has no size for features to be compared with
    assert (low_MN <= listed_MN + tiny_N)[:, finite_N].all()
    assert (listed_MN <= low_MN + 2 * bound_MN + tiny_N)[(ids_MN < k) & finite_N].all()
    exact_KN.scatter_(0, ids_MN.clamp(max=k).long(), torch.inf)
    assert (others_RN.amin(dim=0) <= exact_KN.amin(dim=0) + tiny_N)[finite_N].all()


@pytest.mark.parametrize("words_of_a_tile", [16, 32, 64, 128])
@pytest.mark.parametrize("shift", [0, 40_000])
def test_the_search_lists_the_best_columns_and_keeps_the_least_other(words_of_a_tile: int, shift: int) -> None:
    """Exact numbers, scores of both signs: the packed search against the same on a table of all scores."""
    features, words = make_vectors("whole numbers", 21, 6, 301, seed=shift)
    fast = prepare_fast(words)
    fast = fast._replace(half_norm_J=fast.half_norm_J + fast.scale**2 * shift)
    rounded_ND, alpha_N = assign_triton._round(features, fast)
    tiles = Tiles(32, words_of_a_tile, 16, 4, 2, ranges=2)
    low_MN, ids_MN, others_RN = assign_triton._search(rounded_ND, torch.zeros_like(alpha_N), fast, tiles)
    scores_NK = fast.half_norm_J[:301] - rounded_ND.float() @ fast.rounded_KD.float().T
    scores_NK = (scores_NK.view(torch.int32) & -32).view(torch.float32)
    assert torch.equal(low_MN, scores_NK.T.gather(0, ids_MN.long()))
    blocks = -(-301 // words_of_a_tile)
    scores_NK = torch.nn.functional.pad(scores_NK, (0, blocks * words_of_a_tile - 301), value=2.0**100)
    for part in range(2):
        own = slice(part * blocks // 2 * words_of_a_tile, (part + 1) * blocks // 2 * words_of_a_tile)
        columns = scores_NK[:, own].view(21, -1, words_of_a_tile // 8, 4, 2).transpose(2, 3).flatten(3).flatten(1, 2)
        ranked = columns.sort(dim=2).values
        best = ranked[:, :, 0].sort(dim=1).values
        assert torch.equal(low_MN[2 * part : 2 * part + 2], best[:, :2].T)
        assert torch.equal(others_RN[part], torch.cat([best[:, 2:], ranked[:, :, 1]], dim=1).amin(dim=1))
    assert shift or (scores_NK < 0).any()


def test_bounds_are_not_idle() -> None:
    """Rounding does change the order of real distances, so without the bound some words would be wrong."""
    features, words = real_vectors(24, 1000)
    features = features[:256]
    tiles, exact = Tiles(256, 128, 256, 8, 2, ranges=4), scores(features, words).argmin(dim=1)
    shares = []
    for half in HALVES:
        fast = prepare_fast(words, half)
        found = nearest(features, fast, tiles)
        assert torch.equal(found.ids_N.long(), exact)
        rounded_ND, alpha_N = assign_triton._round(features, fast)
        low_MN, ids_MN, _ = assign_triton._search(rounded_ND, torch.zeros_like(alpha_N), fast, tiles)
        rough = ids_MN.gather(0, low_MN.argmin(dim=0, keepdim=True))[0]
        shares.append((found.compared, found.searched_twice, int((rough != exact).sum())))
    (compared, twice, wrong), (compared_bf16, twice_bf16, wrong_bf16) = shares
    assert 0 < compared < 0.5 * 256
    assert compared < compared_bf16
    assert twice < twice_bf16
    assert wrong < wrong_bf16
    assert wrong_bf16 > 0


def test_ties_go_to_the_lower_id() -> None:
    features, words = make_vectors("whole numbers", 60, 3, 200, seed=1)
    fast = prepare_fast(words)
    found = nearest(features, fast, TILES)
    assert found.searched_twice > 0  # many words at the same distance
    assert torch.equal(found.ids_N.long(), scores(features, words).argmin(dim=1))


def test_more_candidates_than_the_list_holds_are_left_open() -> None:
    words = torch.ones(300, 8)
    found = nearest(torch.zeros(3, 8), prepare_fast(words), TILES)
    assert found.open_U.tolist() == [0, 1, 2]
    prepared = prepare_words(words)._replace(fast=prepare_fast(words))
    assert assign(torch.zeros(3, 8), prepared).tolist() == [0, 0, 0]


def test_words_that_drop_out_of_the_list_are_not_forgotten() -> None:
    """In each block of 64 words one is near, the nearer the later the block: listed last, then pushed out by two."""
    distances = torch.full((320,), 100.0)
    distances[::64] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    words = distances[:, None] * torch.nn.functional.normalize(make_vectors("normal", 1, 30, 320, seed=0)[1])
    for order in (words, words.view(5, 64, 30).flip(0).reshape(320, 30)):
        fast = prepare_fast(order)
        features = torch.zeros(1, 30)
        low_MN, ids_MN, others_RN, bound_MN = bounds(features, fast, ranges=1)
        shift = float(low_MN[0, 0] + bound_MN[0, 0]) - fast.scale**2 / 2  # of what is the same for all words
        listed = (low_MN + bound_MN - shift)[:, 0] / fast.scale**2
        assert torch.allclose(listed, torch.tensor([0.5, 2.0]), atol=0.1)
        assert abs(float(others_RN[0, 0] - shift) / fast.scale**2 - 4.5) < 0.1 + float(bound_MN.max()) / fast.scale**2
        assert sorted(ids_MN[:, 0].tolist()) == ([192, 256] if order is words else [0, 64])


@far
def test_vectors_beyond_half_precision_are_left_open_and_assigned() -> None:
    features, words = make_vectors("normal", 30, 16, 100, seed=0)
    features[[3, 17]] *= 1e7
    found = nearest(features, prepare_fast(words), TILES)
    assert found.open_U.tolist() == [3, 17]
    check_proven(features, words, found)
    prepared = prepare_words(words)
    ids = assign(features, prepared._replace(fast=prepare_fast(words)))
    assert torch.equal(ids.long(), assign_reference(features, prepared).long())


@far
def test_what_is_no_number_gets_some_word() -> None:
    """The caller finds out; but an id that is none would end every other work on a GPU."""
    features, words = make_vectors("normal", 12, 16, 100, seed=0)
    features[0], features[1], features[2, 3], features[3, 3] = torch.nan, -torch.inf, torch.inf, torch.nan
    features[4, :2] = torch.tensor([torch.inf, -torch.inf])
    words[:50, 3] = 0
    found = nearest(features, prepare_fast(words), TILES)
    assert found.open_U.tolist() == [0, 1, 2, 3, 4]
    prepared = prepare_words(words)
    ids = assign(features, prepared._replace(fast=prepare_fast(words))).long()
    assert (ids < 100).all()
    assert torch.equal(ids[5:], scores(features[5:], words).argmin(dim=1))


@far
def test_rows_are_taken_in_blocks_of_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    features, words = make_vectors("duplicates", 50, 12, 90, seed=4)
    features[33] *= 1e8
    fast = prepare_fast(words)
    whole = nearest(features, fast, TILES)
    assert whole.open_U.tolist() == [33]
    settled = torch.arange(50) != 33
    for name, value, layout in (
        ("_ROUNDED_ELEMENTS", 7 * 16, features),
        ("_ROUNDED_ELEMENTS", 7 * 16, features.T.contiguous().T),
        ("_ROWS", 13, features),
    ):
        monkeypatch.setattr(assign_triton, name, value)
        parts = nearest(layout, fast, TILES)
        assert torch.equal(parts.ids_N[settled], whole.ids_N[settled])
        assert parts.open_U.tolist() == [33]
        assert (parts.compared, parts.searched_twice) == (whole.compared, whole.searched_twice)
    none = nearest(features[:0], fast, TILES)
    assert len(none.ids_N) == len(none.open_U) == 0


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    few, words = make_vectors("duplicates", 3, 6, 40, seed=2)
    step = 2**30 + 12345  # so that only the product of row and step needs more
    sparse = np.memmap(tmp_path / "features", np.float32, "w+", shape=(2 * step + 6,))  # 9 GB, of which a page is used
    features = torch.from_numpy(sparse).as_strided((3, 6), (step, 1))
    features.copy_(few)
    found = nearest(features, prepare_fast(words), TILES)
    assert found.compared == 3  # which reads the features a second time
    assert torch.equal(found.ids_N, nearest(few, prepare_fast(words), TILES).ids_N)


class Launches:
    """What Triton would compile for a GPU: one kernel for each of these keys."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: set[str] = set()
        backend = make_backend(GPUTarget("cuda", 90, 32))
        for name in ("round_rows", "search", "list_below", "compare"):
            kernel = getattr(assign_kernels, name)
            compiled = JITFunction(kernel.fn, **kernel.kwargs)
            binder = create_function_from_signature(compiled.signature, compiled.params, backend)
            monkeypatch.setattr(kernel, "run", self._recorded(name, kernel.run, binder))

    def _recorded(self, name: str, run: Any, binder: Any) -> Any:
        def recorded(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            _, specialization, options = binder(*args, **kwargs)
            constants = [kwargs[key] for key in sorted(kwargs)]
            self.keys.add(f"{name} {specialization} {constants} {options}")
            return run(*args, grid=grid, warmup=warmup, **kwargs)

        return recorded


@far
@pytest.mark.parametrize("d", [1, 16])
def test_nothing_is_compiled_after_the_warm_up(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    assign_triton.warm_up.cache_clear()
    monkeypatch.setattr(assign_triton, "OTHER", TILES)
    monkeypatch.setattr(assign_triton, "_PROGRAMS_PER_PROCESSOR", 24)  # so that few rows give many ranges
    assign_triton.warm_up(torch.device("cpu"), d)
    warm = set(launches.keys)
    assert len(warm) == 5  # two for the comparison: of short lists and long ones
    used = set()
    for n, k, kind in (
        (1, 1, "normal"),
        (1, 640, "near duplicates"),
        (16, 250, "zeros"),
        (33, 90, "duplicates"),
    ):
        features, words = make_vectors(kind, n + 1, d, k, seed=n)
        launches.keys.clear()
        nearest(features[1:], prepare_fast(words))  # whose address is no multiple of 16
        used |= launches.keys
    assert used == warm


def test_bench_assign_says_its_figure_before_it_tries_three_tilings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bowstore.words.assign.assign.runs_triton", lambda device: True)
    monkeypatch.setattr(assign_triton, "fits", lambda tiles, device: True)
    monkeypatch.setattr("bowstore.benchmarks.assign.compute_workers", lambda device: 1)  # as one stream of a GPU
    result = bench_assign(images=1, positions=5, dimensions=8, num_words=40, rounds=1, device=torch.device("cpu"))
    names = [timing.name for timing in result.timings]
    assert names == [
        "assign", "matrix product", "FAISS", "float16 product", "float32 reference", "256x128x64 8 warps 4 stages",
        "128x128x64 8 warps 4 stages", "128x128x64 8 warps 3 stages",
    ]  # fmt: skip
    shares = ("unlike_float32", "compared", "searched_twice", "left_to_float32")
    assert all(0 <= result.figures[f"share_{share}"] <= 1 for share in shares)
    assert result.figures["ratio_over_half_matmul"] > 0
    said = capsys.readouterr().err
    assert said.index("assign ") < said.index("images/s, matrix product") < said.index("other searches")
