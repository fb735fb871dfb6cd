# ruff: noqa: ANN001, ANN201, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The Triton kernels of assign_triton.py, whose docstring defines alpha, reach and low.

Legend: n vectors, d dimensions, k words; x_tiles and word_tiles are descriptors of half-precision matrices (n, d) and
(k, d) that read zeros past their ends. Offsets into features are 64-bit. Kernels carry no annotations: Triton would
try to compile them. 65535 stands for no word.

Triton compiles a kernel anew for an integer that is 1, a multiple of 16 or neither, and for a pointer that is aligned
or not. What differs from call to call of one run is therefore kept out of that (`do_not_specialize`): one kernel
for all of them. What stays the same for a vocabulary may have a kernel of its own where it makes loads wider.
"""

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit(do_not_specialize=["n", "d", "row_step"], do_not_specialize_on_alignment=["x_ptr", "dim_step"])
def round_rows(
    x_ptr, middle_ptr, rounded_ptr, alpha_ptr, n, d, width, row_step, dim_step, scale, norm_share, rest_share, floor,
    ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Half-precision copies of shifted and scaled rows, padded with zeros to `width`; and alpha of each."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    norm = tl.zeros((ROWS,), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, DIMS):
        dims = first + tl.arange(0, DIMS).to(tl.int64)
        there = (rows < n)[:, None] & (dims < d)[None, :]
        x = tl.load(x_ptr + rows[:, None] * row_step + dims[None, :] * dim_step, mask=there, other=0.0)
        middle = tl.load(middle_ptr + dims, mask=dims < d, other=0.0)
        x = tl.where(there, (x - middle[None, :]) * scale, 0.0)
        rounded = x.to(rounded_ptr.dtype.element_ty)
        mask = (rows < n)[:, None] & (dims < width)[None, :]
        tl.store(rounded_ptr + rows[:, None] * width + dims[None, :], rounded, mask=mask)
        lost = x - rounded.to(tl.float32)
        norm += tl.sum(x * x, axis=1)
        rest += tl.sum(lost * lost, axis=1)
    alpha = norm_share * tl.sqrt(norm) + rest_share * tl.sqrt(rest) + floor
    tl.store(alpha_ptr + rows, alpha, mask=rows < n)


@triton.jit
def _low(
    x_tiles, word_tiles, alpha, half_norm_ptr, reach_ptr, row, block, k, d,
    ROWS: tl.constexpr, WORDS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """low_k of a block of rows and a block of words, infinite past the last word; and the words' ids."""
    products = tl.zeros((ROWS, WORDS), tl.float32)
    for dim in range(0, d, DIMS):
        products = tl.dot(x_tiles.load([row, dim]), word_tiles.load([block * WORDS, dim]).T, products)
    words = block * WORDS + tl.arange(0, WORDS)
    half_norm = tl.load(half_norm_ptr + words, mask=words < k, other=float("inf"))
    reach = tl.load(reach_ptr + words, mask=words < k, other=0.0)
    return half_norm[None, :] - alpha[:, None] * reach[None, :] - products, words


@triton.jit(do_not_specialize=["n", "k", "d", "ranges"])
def search(
    x_tiles, word_tiles, alpha_ptr, half_norm_ptr, reach_ptr, low_ptr, ids_ptr, others_ptr, n, k, d, ranges,
    ROWS: tl.constexpr, WORDS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The best words of the two best blocks of a range, and the least low_k of the range's other words."""
    # The ranges of a block of rows run side by side and share its rows in the L2 cache.
    part = tl.program_id(0) % ranges
    row = tl.program_id(0) // ranges * ROWS
    rows = row + tl.arange(0, ROWS)
    alpha = tl.load(alpha_ptr + rows, mask=rows < n, other=0.0)
    first = tl.full((ROWS,), float("inf"), tl.float32)
    second = tl.full((ROWS,), float("inf"), tl.float32)
    others = tl.full((ROWS,), float("inf"), tl.float32)
    first_id = tl.full((ROWS,), 65535, tl.int32)
    second_id = tl.full((ROWS,), 65535, tl.int32)
    blocks = tl.cdiv(k, WORDS)
    # Flattened with the loop over dimensions: the next block's tiles are fetched while this one's least is sought.
    for block in tl.range(part * blocks // ranges, (part + 1) * blocks // ranges, flatten=True):
        low, words = _low(x_tiles, word_tiles, alpha, half_norm_ptr, reach_ptr, row, block, k, d, ROWS, WORDS, DIMS)
        best = tl.min(low, axis=1)
        best_id = tl.min(tl.where(low == best[:, None], words[None, :], 65535), axis=1)
        runner_up = tl.min(tl.where(words[None, :] == best_id[:, None], float("inf"), low), axis=1)
        is_first = best < first
        is_second = best < second
        others = tl.minimum(others, tl.minimum(runner_up, tl.where(is_second, second, best)))
        second = tl.where(is_first, first, tl.where(is_second, best, second))
        second_id = tl.where(is_first, first_id, tl.where(is_second, best_id, second_id))
        first = tl.where(is_first, best, first)
        first_id = tl.where(is_first, best_id, first_id)
    to_first = (2 * part).to(tl.int64) * n + rows
    tl.store(low_ptr + to_first, first, mask=rows < n)
    tl.store(low_ptr + to_first + n, second, mask=rows < n)
    tl.store(ids_ptr + to_first, first_id, mask=rows < n)
    tl.store(ids_ptr + to_first + n, second_id, mask=rows < n)
    tl.store(others_ptr + part.to(tl.int64) * n + rows, others, mask=rows < n)


@triton.jit(do_not_specialize=["n", "k", "d", "ranges"])
def list_below(
    x_tiles, word_tiles, alpha_ptr, half_norm_ptr, reach_ptr, limit_ptr, listed_ptr, count_ptr, n, k, d, ranges,
    LISTED: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """All words whose low_k is at most the row's limit: the first LISTED that come, and their number."""
    part = tl.program_id(0) % ranges
    row = tl.program_id(0) // ranges * ROWS
    rows = row + tl.arange(0, ROWS)
    alpha = tl.load(alpha_ptr + rows, mask=rows < n, other=0.0)
    limit = tl.load(limit_ptr + rows, mask=rows < n, other=float("-inf"))
    blocks = tl.cdiv(k, WORDS)
    for block in range(part * blocks // ranges, (part + 1) * blocks // ranges):
        low, words = _low(x_tiles, word_tiles, alpha, half_norm_ptr, reach_ptr, row, block, k, d, ROWS, WORDS, DIMS)
        hit = low <= limit[:, None]
        # The lowest of every row at a time: there are few, and most blocks hold none.
        while tl.max(tl.max(hit.to(tl.int32), axis=1), axis=0) > 0:
            word = tl.min(tl.where(hit, words[None, :], 65535), axis=1)
            place = tl.atomic_add(count_ptr + rows, 1, mask=word < 65535)
            mask = (word < 65535) & (place < LISTED)
            tl.store(listed_ptr + rows.to(tl.int64) * LISTED + place, word, mask=mask)
            hit = hit & (words[None, :] != word[:, None])


@triton.jit(do_not_specialize=["row_step", "listed"], do_not_specialize_on_alignment=["x_ptr", "dim_step"])
def compare(
    x_ptr, words_ptr, rows_ptr, listed_ptr, ids_ptr, d, row_step, dim_step, listed,
    LANES: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The nearest of a row's listed words in float64; of equals the lowest id."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place)
    lanes = tl.arange(0, LANES)
    ids = tl.load(listed_ptr + place * listed + lanes, mask=lanes < listed, other=65535)
    squares = tl.zeros((LANES, DIMS), tl.float64)
    for first in range(0, d, DIMS):
        dims = first + tl.arange(0, DIMS).to(tl.int64)
        x = tl.load(x_ptr + row * row_step + dims * dim_step, mask=dims < d, other=0.0)
        there = (ids < 65535)[:, None] & (dims < d)[None, :]
        word = tl.load(words_ptr + ids.to(tl.int64)[:, None] * d + dims[None, :], mask=there, other=0.0)
        apart = word.to(tl.float64) - x.to(tl.float64)[None, :]
        squares += apart * apart
    distance = tl.where(ids < 65535, tl.sum(squares, axis=1), float("inf"))
    nearest_id = tl.min(tl.where(distance == tl.min(distance, axis=0), ids, 65535), axis=0)
    tl.store(ids_ptr + place, nearest_id)
