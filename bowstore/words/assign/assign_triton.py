"""The nearest word on a GPU's tensor cores: half-precision products, exact answers, no matrix of distances.

Legend: N vectors, D dimensions, K words, J words padded to whole blocks, R ranges of words, M listed words of a
vector, U vectors looked at again.

Let mu be the words' median in each dimension, X = S (x - mu) and C_k = S (c_k - mu) with S a power of two. Neither
changes which word is nearest. The shift makes the products, and with them their rounding, smaller; a median, because
a few words can lie far off and would drag a mean along. S keeps float16 from overflow. The nearest word has the least
s_k = |C_k|^2 / 2 - X.C_k. The search rounds X and C_k to half precision (X', C'_k), multiplies on tensor cores, sums
in float32, and holds half norms and scores in float32. With

    r = |X - X'|,  p_k = |C'_k|,  q_k = |C_k - C'_k|      taken from the data, not from the format
    X.C_k - X'.C'_k = (X - X').C'_k + X.(C_k - C'_k)      at most r p_k + |X| q_k
    gamma = (5/4 (D + 2) + 8) 2^-23                       float32 sums in any order, in groups of four terms or more,
                                                          each truncated, as tensor cores do
    tau = 2^-18                                           of a score, what its place in the lowest 5 bits changes

a computed score is off by at most alpha' reach_k, where

    reach_k = max(p_k, q_k / t),  t = max q / max p
    alpha' = r + t |X| + gamma (|X| + r) + 2^-21 max |C|  the last for half norms and the score's own rounding
    alpha = (1 + 4 tau) (alpha' + tau (1 + t) (|X| + max |C| / 2))

and low_k = computed score - alpha reach_k, whose 5 lowest bits give way to the word's place. Before that, low_k is at
least s_k - (alpha + alpha') reach_k and at most s_k - (alpha - alpha') reach_k; so it is no larger than |s_k| +
2 alpha reach_k, which is at most ((1 + t) (|X| + max |C| / 2) + 2 alpha) reach_k since |C_k| <= p_k + q_k <=
(1 + t) reach_k. Cutting its bits off changes it by tau of that, no more than (alpha - alpha') reach_k. (reach_k is no
less than 2^-40 of the largest, so that numbers too small for all their bits do not matter.)

So low_k <= s_k <= low_k + 2 e_k with e_k = alpha reach_k, and only a word whose low_k is at most the least
low_j + 2 e_j can be nearest. If there is one such word, it is the nearest, proven. If there are several, they are
compared in float64, and of equal distances the lower id wins. The search cuts each range of words into blocks and a
block into four columns, lists the two best of the words that are the best of their column of their block, and keeps
the least low_k of all the others; where that cannot exclude them, a second search of those vectors lists every word
below the bound. Vectors that are open even then (more such words than the list holds, or a vector too far off for half
precision) are named to the caller.

Shift and float16 are measured choices. On ImageNet photographs, K = 20000 (conv4 of a ResNet-50, D = 1024, and of a
ResNet-18, D = 256): bfloat16 without the shift gives 9 % and 7 % of the vectors a word that is not the nearest, and
leaves 90 % and 31 % of them to the second search. float16, eight times finer at the same speed, with the shift: 0.4 %
and 0.6 %, of which all are caught; 37 % and 16 % need the comparison, 4 % and 1 % the second search. Places and columns
came later: the same arithmetic on a CPU (1500 vectors of an untrained ResNet-50, D = 1024, K = 20000) has bounds 3.6 %
wider with them, compares 7.9 % of the vectors instead of 7.7 %, and searches 0.07 % twice instead of 0.2 %.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-untyped]

from bowstore.words.assign import assign_kernels as kernels

_NO_WORD = 65535
_LONG_LIST = 128  # words that the second search can list for a vector, and all ranges of the first together
_SHORT_LIST = 16  # of eight ranges; there are kernels for these two lengths and no others
_ROUNDED_ELEMENTS = 1 << 28  # of the half-precision copy of the features that exists at a time: 512 MiB
_ROWS = 1 << 19  # searched at a time, so that what is listed for them takes no more than that
_PROGRAMS_PER_PROCESSOR = 12  # reckoned, not measured: the last, partly filled wave of programs costs at most 8 %
# At least four, so that row blocks in flight should stay in the L2 cache (not measured); at most 64, for short lists.
_RANGES = 4, 64
_TAU = kernels.PLACES.value * 2.0**-23
_MOST_WORDS = 4 * kernels.PLACES.value  # of a tile
_LARGEST_HALF = 60000.0  # a little less than float16 holds
_LARGEST = 6  # log2 of the largest component of a scaled word: features may be 1000 times larger in float16


class Tiles(NamedTuple):
    """How a search is cut up.

    Attributes:
        rows: vectors of a program.
        words: words scored at a time, a power of two from 16 to 128.
        dims: dimensions multiplied at a time.
        warps: of a program.
        stages: tiles in flight.
        bulk: whether the tensor memory accelerator fetches tiles, which Hopper and later have.
        ranges: programs that share the words for one block of rows; 0 to choose by the number of vectors.
    """

    rows: int
    words: int
    dims: int
    warps: int
    stages: int
    bulk: bool = False
    ranges: int = 0

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the tiles in flight."""
        return 2 * self.stages * (self.rows + self.words) * self.dims


# How near the larger one comes to the products alone on an H100 is in docs/results/gpu.md; four ranges to 32 make no
# difference. What compiling tells: for 9.0 it takes 245 of a thread's 255 registers and spills none; of the 1109
# instructions for a block of scores in its loop 719 seek the least; 128 x 256, which would draw no more from the L2
# cache, of which a byte serves 85 operations, spills. For 8.0 and 8.9 the other takes 252 instructions for 64 products
# on tensor cores, and 436 to seek the least; that it is the best there is an estimate.
HOPPER = Tiles(rows=256, words=128, dims=64, warps=8, stages=4, bulk=True)
OTHER = Tiles(rows=128, words=128, dims=64, warps=8, stages=3)


class FastWords(NamedTuple):
    """A vocabulary laid out for `nearest`, in the terms of the module's docstring.

    Attributes:
        words_KD: float32, as they are.
        rounded_KD: C', half precision, columns padded with zeros to a multiple of 16.
        middle_D: float32, mu.
        half_norm_J: float32, |C_k|^2 / 2, to the end of the last block of words; beyond the words `FAR`.
        reach_J: float32, to the same length.
        scale: S.
        norm_share: of alpha, for each unit of |X|.
        rest_share: of alpha, for each unit of r.
        floor: of alpha.
    """

    words_KD: Tensor
    rounded_KD: Tensor
    middle_D: Tensor
    half_norm_J: Tensor
    reach_J: Tensor
    scale: float
    norm_share: float
    rest_share: float
    floor: float


class Nearest(NamedTuple):
    """What `nearest` found.

    Attributes:
        ids_N: int32, nearest words; without meaning for `open_U`.
        open_U: int64, ascending, vectors whose word is not settled.
        compared: vectors that needed a comparison in float64.
        searched_twice: those of them that needed the second search.
    """

    ids_N: Tensor
    open_U: Tensor
    compared: int
    searched_twice: int


def prepare_fast(vocabulary_KD: Tensor, half: torch.dtype = torch.float16) -> FastWords:
    """Lay out a float32 vocabulary (K, D), K <= 65535, for `nearest`; `half` is float16 or bfloat16."""
    dims = vocabulary_KD.shape[1]
    middle_D = vocabulary_KD.median(dim=0).values
    exact_KD = vocabulary_KD.double() - middle_D
    largest = float(exact_KD.abs().max())
    scale = 2.0 ** min(max(_LARGEST - math.frexp(largest)[1], -120), 120)
    exact_KD *= scale
    width = -(-dims // 16) * 16  # so that tiles are fetched 16 bytes at a time
    rounded_KD = torch.zeros(len(exact_KD), width, dtype=half, device=exact_KD.device)
    rounded_KD[:, :dims] = exact_KD
    norm_K = rounded_KD.double().norm(dim=1)
    rest_K = (exact_KD - rounded_KD[:, :dims]).norm(dim=1)
    share = float(rest_K.max() / torch.maximum(norm_K, rest_K).max()) if rest_K.any() else 0.0
    gamma = (1.25 * (dims + 2) + 8) * 2.0**-23
    slack = 1 + gamma  # of the norms' own float32 sums
    more = 1 + 4 * _TAU
    reach_K = (torch.maximum(norm_K, rest_K / share) if share else norm_K).float() * (1 + 2.0**-20)
    beyond, pad = -len(exact_KD) % _MOST_WORDS, torch.nn.functional.pad
    return FastWords(
        words_KD=vocabulary_KD.contiguous(),
        rounded_KD=rounded_KD,
        middle_D=middle_D,
        half_norm_J=pad((exact_KD.square().sum(dim=1) / 2).float(), (0, beyond), value=kernels.FAR.value),
        reach_J=pad(reach_K.clamp(min=2.0**-40 * float(reach_K.max())), (0, beyond)),
        scale=scale,
        norm_share=more * slack * (share + gamma + 2.0**-23 + _TAU * (1 + share)),
        rest_share=more * slack * (1 + gamma),
        floor=more * (2.0**-21 + _TAU * (1 + share) / 2) * float(exact_KD.norm(dim=1).max()),
    )


def fits(tiles: Tiles, device: torch.device) -> bool:
    """Whether a GPU can fetch such tiles, and its shared memory holds those in flight."""
    properties: Any = torch.cuda.get_device_properties(device)
    if tiles.bulk and torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return tiles.shared_bytes < int(properties.shared_memory_per_block_optin)


def tiles_for(device: torch.device) -> Tiles:
    """The larger of the two tilings that fits; on a CPU, for Triton's interpreter, the smaller."""
    return HOPPER if device.type == "cuda" and fits(HOPPER, device) else OTHER


@functools.cache
@torch.no_grad()
def warm_up(device: torch.device, dims: int) -> None:
    """Compile every kernel that `nearest` needs for words of a width on a device, and launch each once.

    A kernel takes Triton seconds, so this belongs before the work, and into the thread that starts it: two threads
    that come upon a new kernel at the same time compile it twice. What was compiled before costs nothing here.
    """
    features_ND, row_U = torch.zeros(1, dims, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    words = prepare_fast(features_ND)
    with _on(device):
        rounded_ND, alpha_N = _round(features_ND, words)
        _search(rounded_ND, alpha_N, words, tiles_for(device))
        _list_all(rounded_ND, alpha_N, torch.full_like(alpha_N, -torch.inf), words, tiles_for(device))
        for listed in (_SHORT_LIST, _LONG_LIST):
            _compare(features_ND, words, row_U, torch.full((1, listed), _NO_WORD, dtype=torch.int32, device=device))


def _on(device: torch.device) -> torch.cuda.device:
    """Launches inside the block go to this device; nothing for a CPU."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


@torch.no_grad()
def nearest(features_ND: Tensor, words: FastWords, tiles: Tiles | None = None) -> Nearest:
    """The nearest word of each vector, proven (see the module's docstring), but for the vectors named open.

    Args:
        features_ND: float32 (N, D), finite, in any layout.
        words: from `prepare_fast`, on the same device.
        tiles: how the search is cut; None for what fits the device.
    """
    tiles = tiles or tiles_for(features_ND.device)
    step = min(_ROWS, max(1, _ROUNDED_ELEMENTS // words.rounded_KD.shape[1]))
    ids_N = torch.empty(len(features_ND), dtype=torch.int32, device=features_ND.device)
    open_U, compared, searched_twice = [ids_N.new_empty(0, dtype=torch.int64)], 0, 0
    with _on(features_ND.device):
        for start in range(0, len(features_ND), step):
            part = _nearest(features_ND[start : start + step], words, tiles)
            ids_N[start : start + step] = part.ids_N
            open_U.append(part.open_U + start)
            compared, searched_twice = compared + part.compared, searched_twice + part.searched_twice
    return Nearest(ids_N, torch.cat(open_U), compared, searched_twice)


@torch.no_grad()
def likely(features_ND: Tensor, words: FastWords, *, largest: float, tiles: Tiles | None = None) -> Tensor:
    """The word with the least score by half-precision products, unproven, int64 (N,); nothing waits for the device.

    Args:
        features_ND: float32 (N, D), finite.
        words: from `prepare_fast`, on the same device.
        largest: no component of a feature is larger, by its absolute value.
        tiles: how the search is cut; None for what fits the device.
    """
    if 2 * largest * words.scale > _LARGEST_HALF:  # what would be infinite in half precision is moved to its edge
        reach = _LARGEST_HALF / words.scale
        features_ND = torch.clamp(features_ND, words.middle_D - reach, words.middle_D + reach)
    with _on(features_ND.device):
        rounded_ND, alpha_N = _round(features_ND, words)
        # The search ranks words by their score less alpha times their reach: without alpha by the score alone.
        low_MN, ids_MN, _ = _search(rounded_ND, alpha_N.zero_(), words, tiles or tiles_for(features_ND.device))
    return ids_MN.gather(0, low_MN.argmin(dim=0, keepdim=True))[0].long()


def _nearest(features_ND: Tensor, words: FastWords, tiles: Tiles) -> Nearest:
    rounded_ND, alpha_N = _round(features_ND, words)
    low_MN, ids_MN, others_RN = _search(rounded_ND, alpha_N, words, tiles)
    reach_MN = words.reach_J[ids_MN.clamp(max=len(words.words_KD) - 1).long()]
    limit_N = (low_MN + 2 * alpha_N * reach_MN).amin(dim=0)
    # Too far off for half precision, scores are no numbers: such a limit excludes nothing, and nothing is below it.
    limit_N = torch.where(alpha_N < torch.inf, limit_N, torch.nan)
    possible_MN = low_MN <= limit_N
    count_N = possible_MN.sum(dim=0)
    excluded_N = (others_RN > limit_N).all(dim=0)
    ids_N = ids_MN.gather(0, low_MN.argmin(dim=0, keepdim=True))[0]
    several_U = (excluded_N & (count_N != 1)).nonzero()[:, 0]
    if len(several_U):
        listed_MU = torch.where(possible_MN[:, several_U], ids_MN[:, several_U], _NO_WORD)
        ids_N[several_U] = _compare(features_ND, words, several_U, listed_MU.T.contiguous())
    again_U = (~excluded_N).nonzero()[:, 0]
    open_U = again_U
    if len(again_U):
        listed_UM, count_U = _list_all(rounded_ND[again_U], alpha_N[again_U], limit_N[again_U], words, tiles)
        ids_N[again_U] = _compare(features_ND, words, again_U, listed_UM)
        open_U = again_U[(count_U < 1) | (count_U > _LONG_LIST)]
    return Nearest(ids_N, open_U, len(several_U) + len(again_U), len(again_U))


def _round(features_ND: Tensor, words: FastWords) -> tuple[Tensor, Tensor]:
    """X' of each vector, padded like the words, and its alpha."""
    (rows, dims), width = features_ND.shape, words.rounded_KD.shape[1]
    rounded_ND = torch.empty(rows, width, dtype=words.rounded_KD.dtype, device=features_ND.device)
    alpha_N = torch.empty(rows, device=features_ND.device)
    kernels.round_rows[(triton.cdiv(rows, 16),)](
        features_ND, words.middle_D, rounded_ND, alpha_N, rows, dims, width, *features_ND.stride(),
        words.scale, words.norm_share, words.rest_share, words.floor, ROWS=16, DIMS=128,
    )  # fmt: skip
    return rounded_ND, alpha_N


def _search(rounded_ND: Tensor, alpha_N: Tensor, words: FastWords, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """The words listed by each range, M = 2 R: low_k (M, N) and ids (M, N); least low_k of all others (R, N)."""
    rows, device = len(rounded_ND), rounded_ND.device
    ranges = tiles.ranges or _ranges(rows, len(words.rounded_KD), tiles, device)
    low_MN = torch.empty(2 * ranges, rows, device=device)
    ids_MN = torch.empty(2 * ranges, rows, dtype=torch.int32, device=device)
    others_RN = torch.empty(ranges, rows, device=device)
    kernels.search[(triton.cdiv(rows, tiles.rows) * ranges,)](
        *_operands(rounded_ND, alpha_N, words, tiles), low_MN, ids_MN, others_RN,
        rows, *words.rounded_KD.shape, ranges, -kernels.PLACES.value, **_launch(tiles),
    )  # fmt: skip
    return low_MN, ids_MN, others_RN


def _list_all(
    rounded_UD: Tensor, alpha_U: Tensor, limit_U: Tensor, words: FastWords, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """Every word with low_k up to the limit: int32 (U, 128), as far as they fit, and how many there are, int32 (U,)."""
    rows, device = len(rounded_UD), rounded_UD.device
    ranges = _ranges(rows, len(words.rounded_KD), tiles, device)
    listed_UM = torch.full((rows, _LONG_LIST), _NO_WORD, dtype=torch.int32, device=device)
    count_U = torch.zeros(rows, dtype=torch.int32, device=device)
    kernels.list_below[(triton.cdiv(rows, tiles.rows) * ranges,)](
        *_operands(rounded_UD, alpha_U, words, tiles), limit_U, listed_UM, count_U,
        rows, *words.rounded_KD.shape, ranges, LISTED=_LONG_LIST, **_launch(tiles),
    )  # fmt: skip
    return listed_UM, count_U


def _compare(features_ND: Tensor, words: FastWords, rows_U: Tensor, listed_UM: Tensor) -> Tensor:
    """Of each row's listed words the nearest in float64, of equals the lowest id, int32 (U,)."""
    (rows, listed), dims = listed_UM.shape, features_ND.shape[1]
    ids_U = torch.empty(rows, dtype=torch.int32, device=rows_U.device)
    lanes = _SHORT_LIST if listed <= _SHORT_LIST else _LONG_LIST
    kernels.compare[(rows,)](
        features_ND, words.words_KD, rows_U, listed_UM, ids_U, dims, *features_ND.stride(), listed,
        LANES=lanes, DIMS=4096 // lanes,
    )  # fmt: skip
    return ids_U


def _operands(rounded_ND: Tensor, alpha_N: Tensor, words: FastWords, tiles: Tiles) -> tuple[Any, ...]:
    matrices: tuple[Any, Any] = rounded_ND, words.rounded_KD
    if tiles.bulk:
        shapes = [tiles.rows, tiles.dims], [tiles.words, tiles.dims]
        matrices = tuple(map(TensorDescriptor.from_tensor, matrices, shapes))
    return *matrices, alpha_N, words.half_norm_J, words.reach_J


def _launch(tiles: Tiles) -> dict[str, int]:
    names = "ROWS", "WORDS", "DIMS", "num_warps", "num_stages", "BULK"
    return dict(zip(names, tiles[:6], strict=True))


def _ranges(rows: int, k: int, tiles: Tiles, device: torch.device) -> int:
    """Enough for programs that keep every processor of the GPU busy to the end."""
    gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if gpu else 1
    wanted = _PROGRAMS_PER_PROCESSOR * processors * tiles.rows // rows
    return min(max(wanted, _RANGES[0]), _RANGES[1], -(-k // tiles.words))
