# ruff: noqa: ANN001, ANN201, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The Triton kernels of assign_triton.py, whose docstring defines alpha, reach and low.

Legend: n vectors, d dimensions, k words; x_tiles and word_tiles are half-precision matrices (n, d) and (k, d), d a
multiple of 16: with BULK descriptors, which the tensor memory accelerator of Hopper and later reads, else pointers,
whose tiles older GPUs fetch ahead, too. Offsets into features are 64-bit. Kernels carry no annotations: Triton would
try to compile them. 65535 stands for no word.

Triton compiles a kernel anew for an integer that is 1, a multiple of 16 or neither, and for a pointer that is aligned
or not. What differs from call to call of one run is therefore kept out of that (`do_not_specialize`): one kernel
for all of them. What stays the same for a vocabulary may have a kernel of its own where it makes loads wider.

The search looks at a block of words as four columns: of eight words in a row, two go to each. So lie the scores that
a thread gets from a product on tensor cores, and what a thread has of a row is one column: all of the search happens
within threads, and only the end of a range brings the columns together. A score carries its place in its column in
its lowest bits, so that the least score names its word: three comparisons a score find the two least.
"""

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

PLACES = tl.constexpr(32)  # of a column, at most; a score gives up so many of its steps
FAR = tl.constexpr(2.0**100)  # the half norm of what is no word; finite, because place bits make infinity no number


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
    x_tiles, word_tiles, alpha, half_norm_ptr, reach_ptr, row, block, n, k, d,
    ROWS: tl.constexpr, WORDS: tl.constexpr, DIMS: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """low_k of a block of rows and a block of words; half norms and reach go on to the end of the last block."""
    products = tl.zeros((ROWS, WORDS), tl.float32)
    words = block * WORDS + tl.arange(0, WORDS)
    if BULK:
        for dim in range(0, d, DIMS):
            products = tl.dot(x_tiles.load([row, dim]), word_tiles.load([block * WORDS, dim]).T, products)
    else:
        # Past the ends the last vector and the last word come again: nobody asks for those scores.
        rows = tl.minimum(row + tl.arange(0, ROWS), n - 1).to(tl.int64)
        x_ptrs = x_tiles + rows[:, None] * d + tl.arange(0, DIMS)[None, :]
        word_ptrs = word_tiles + tl.minimum(words, k - 1).to(tl.int64)[:, None] * d + tl.arange(0, DIMS)[None, :]
        for dim in range(0, d, DIMS):
            there = tl.arange(0, DIMS)[None, :] < d - dim
            x = tl.load(x_ptrs + dim, mask=there, other=0.0)
            products = tl.dot(x, tl.load(word_ptrs + dim, mask=there, other=0.0).T, products)
    return tl.load(half_norm_ptr + words)[None, :] - alpha[:, None] * tl.load(reach_ptr + words)[None, :] - products


@triton.jit
def _two_least(low, keep, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Of each column the least score and the next, (ROWS, 4) each; both with their places in their lowest bits."""
    place = 2 * tl.arange(0, WORDS // 8)[:, None] + tl.arange(0, 2)[None, :]
    bits = tl.reshape(low, (ROWS, WORDS // 8, 4, 2)).to(tl.int32, bitcast=True)
    # `keep` is an argument because one instruction packs a constant with what a register holds; two constants take two.
    left, right = tl.split(((bits & keep) | place[None, :, None, :]).to(tl.float32, bitcast=True))
    least = tl.permute(tl.minimum(left, right), (0, 2, 1))
    other = tl.permute(tl.maximum(left, right), (0, 2, 1))
    for step in tl.static_range(4):  # halves, as often as there are two
        if WORDS >> step >= 16:
            left, right = tl.split(tl.reshape(least, (ROWS, 4, WORDS // 16 >> step, 2)))
            left_other, right_other = tl.split(tl.reshape(other, (ROWS, 4, WORDS // 16 >> step, 2)))
            least = tl.minimum(left, right)
            other = tl.minimum(tl.maximum(left, right), tl.minimum(left_other, right_other))
    return tl.reshape(least, (ROWS, 4)), tl.reshape(other, (ROWS, 4))


@triton.jit
def _word(packed, block, keep, WORDS: tl.constexpr):
    """The word of a packed score (ROWS, 4) of a block; 65535 for none."""
    place = packed.to(tl.int32, bitcast=True) & ~keep
    word = block * WORDS + 8 * (place // 2) + 2 * tl.arange(0, 4)[None, :] + place % 2
    return tl.where(packed < FAR, word, 65535)


@triton.jit
def _unpacked(packed, keep):
    """The score without its place."""
    return (packed.to(tl.int32, bitcast=True) & keep).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n", "k", "ranges", "keep"])
def search(
    x_tiles, word_tiles, alpha_ptr, half_norm_ptr, reach_ptr, low_ptr, ids_ptr, others_ptr, n, k, d, ranges, keep,
    ROWS: tl.constexpr, WORDS: tl.constexpr, DIMS: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """The two best of a range's words that are the best of a column of a block, and the least low_k of all its others.

    `keep` is -PLACES.
    """
    # The ranges of a block of rows run side by side and share its rows in the L2 cache.
    part = tl.program_id(0) % ranges
    row = tl.program_id(0) // ranges * ROWS
    rows = row + tl.arange(0, ROWS)
    alpha = tl.load(alpha_ptr + rows, mask=rows < n, other=0.0)
    first = tl.full((ROWS, 4), FAR, tl.float32)
    second = tl.full((ROWS, 4), FAR, tl.float32)
    others = tl.full((ROWS, 4), FAR, tl.float32)
    first_block = tl.zeros((ROWS, 4), tl.int32)
    second_block = tl.zeros((ROWS, 4), tl.int32)
    blocks = tl.cdiv(k, WORDS)
    # Flattened with the loop over dimensions: the next block's tiles are fetched while this one's least is sought.
    for block in tl.range(part * blocks // ranges, (part + 1) * blocks // ranges, flatten=True):
        low = _low(x_tiles, word_tiles, alpha, half_norm_ptr, reach_ptr, row, block, n, k, d, ROWS, WORDS, DIMS, BULK)
        best, runner_up = _two_least(low, keep, ROWS, WORDS)
        others = tl.minimum(others, tl.minimum(runner_up, tl.maximum(second, best)))
        is_first = best < first
        second_block = tl.where(is_first, first_block, tl.where(best < second, block, second_block))
        first_block = tl.where(is_first, block, first_block)
        second = tl.minimum(second, tl.maximum(first, best))
        first = tl.minimum(first, best)
    first_id, second_id = _word(first, first_block, keep, WORDS), _word(second, second_block, keep, WORDS)
    for step in tl.static_range(2):  # four columns to two to one
        a, b = tl.split(tl.reshape(first, (ROWS, 2 >> step, 2)))
        a_id, b_id = tl.split(tl.reshape(first_id, (ROWS, 2 >> step, 2)))
        a2, b2 = tl.split(tl.reshape(second, (ROWS, 2 >> step, 2)))
        a2_id, b2_id = tl.split(tl.reshape(second_id, (ROWS, 2 >> step, 2)))
        a_others, b_others = tl.split(tl.reshape(others, (ROWS, 2 >> step, 2)))
        ahead = b < a  # then b is the first, and a or b2 the second
        next_a, next_a_id = tl.where(ahead, a, a2), tl.where(ahead, a_id, a2_id)
        next_b, next_b_id = tl.where(ahead, b2, b), tl.where(ahead, b2_id, b_id)
        others = tl.minimum(tl.minimum(a_others, b_others), tl.maximum(next_a, next_b))
        others = tl.minimum(others, tl.where(ahead, a2, b2))
        first, first_id = tl.where(ahead, b, a), tl.where(ahead, b_id, a_id)
        second, second_id = tl.minimum(next_a, next_b), tl.where(next_b < next_a, next_b_id, next_a_id)
    to_first = (2 * part).to(tl.int64) * n + rows
    tl.store(low_ptr + to_first, _unpacked(tl.reshape(first, (ROWS,)), keep), mask=rows < n)
    tl.store(low_ptr + to_first + n, _unpacked(tl.reshape(second, (ROWS,)), keep), mask=rows < n)
    tl.store(ids_ptr + to_first, tl.reshape(first_id, (ROWS,)), mask=rows < n)
    tl.store(ids_ptr + to_first + n, tl.reshape(second_id, (ROWS,)), mask=rows < n)
    tl.store(others_ptr + part.to(tl.int64) * n + rows, _unpacked(tl.reshape(others, (ROWS,)), keep), mask=rows < n)


@triton.jit(do_not_specialize=["n", "k", "ranges"])
def list_below(
    x_tiles, word_tiles, alpha_ptr, half_norm_ptr, reach_ptr, limit_ptr, listed_ptr, count_ptr, n, k, d, ranges,
    LISTED: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, DIMS: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """All words whose low_k is at most the row's limit: the first LISTED that come, and their number."""
    part = tl.program_id(0) % ranges
    row = tl.program_id(0) // ranges * ROWS
    rows = row + tl.arange(0, ROWS)
    alpha = tl.load(alpha_ptr + rows, mask=rows < n, other=0.0)
    limit = tl.load(limit_ptr + rows, mask=rows < n, other=0.0)
    blocks = tl.cdiv(k, WORDS)
    for block in range(part * blocks // ranges, (part + 1) * blocks // ranges):
        low = _low(x_tiles, word_tiles, alpha, half_norm_ptr, reach_ptr, row, block, n, k, d, ROWS, WORDS, DIMS, BULK)
        words = block * WORDS + tl.arange(0, WORDS)
        hit = (low <= limit[:, None]) & (rows < n)[:, None] & (words < k)[None, :]
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
