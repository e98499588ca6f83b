"""Statistics of rows of in-batch scores, and what InfoNCE makes of the rows.

Eq. (9) to (14) of `elva_kernels.reference` (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4).
In: cosines [R, width] in float32 (float64), rounded beyond [-1, 1]; targets, ids, norms of queries
    and candidates. Out: counts int32, the hardest negative, sums float64; the rows masked in place
    (-inf where a candidate is no negative), then their slopes in place.
Work split: one program = a row of scores, or BLOCK columns of it, or BLOCK columns of all rows.
Bytes: a row of scores is read twice (again from cache) and written once; slopes: once each.
Numerics: exponentials in the scores' dtype; sums of BLOCK terms by a tree of stated shape, then in
    float64. Ties by lower index. Deterministic, no atomics. Limits: none.
Reference: reference.statistics_of_scores, info_nce_of_scores.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; to Python their arguments have no type.

import triton
import triton.language as tl

from elva_kernels.backends.triton.kernels.ranks import block_sum


@triton.jit
def inverse_of(temperature, dtype: tl.constexpr):
    """1 / T; a temperature that is not above 0 is NaN already."""
    return (1.0 / tl.load(temperature).to(tl.float64)).to(dtype)


@triton.jit
def clamped(score, dtype: tl.constexpr):
    """In [-1, 1], and 0 where the products may have underflowed; never -0."""
    FLUSH: tl.constexpr = 2.0**-300 if dtype == tl.float64 else 2.0**-50
    score = tl.where(tl.abs(score) < FLUSH, 0.0, score)
    return tl.where(score > 1, 1.0, tl.where(score < -1, -1.0, score))


@triton.jit
def score_rows_kernel(
    scores, query_norms, candidate_norms, target, ids, max_score: tl.float64,
    n_greater, n_equal, target_score, hardest_score, hardest_index, total, moment, temperature,
    candidates, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query: masks its scores, counts, and sums where there is a temperature."""
    dtype: tl.constexpr = scores.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    scores += row * width
    own = tl.load(target + row).to(tl.int64)
    query_norm = tl.load(query_norms + 2 * row).to(tl.float64)
    own_norm = tl.load(candidate_norms + 2 * own).to(tl.float64)
    bad_query = (query_norm != query_norm).to(tl.int32)
    bad = bad_query | (own_norm != own_norm).to(tl.int32)
    mine = clamped(tl.load(scores + own).to(dtype), dtype)
    own_id = own
    if ids is not None:
        own_id = tl.load(ids + own).to(tl.int64)
    greater = tl.full([], 0, tl.int32)
    equal = tl.full([], 0, tl.int32)
    hardest = tl.full([], float("-inf"), dtype)
    place = tl.full([], -1, tl.int64)
    for start in range(0, width, BLOCK):
        index = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = index < candidates
        rival = inside & (index != own)
        if ids is not None:
            rival &= tl.load(ids + index, mask=inside, other=0).to(tl.int64) != own_id
        norm = tl.load(candidate_norms + 2 * index, mask=inside, other=0.0).to(tl.float64)
        sound = (norm == norm) & (bad_query == 0)
        score = clamped(tl.load(scores + index, mask=inside, other=0.0).to(dtype), dtype)
        live = rival & sound & ((score > max_score) == 0)
        # NaN, a bad pair's own score, is below all numbers and equal to NaN.
        greater += tl.sum((live & ((bad > 0) | (score > mine))).to(tl.int32), axis=0)
        same = tl.where(bad > 0, rival & (sound == 0), live & (score == mine))
        equal += tl.sum(same.to(tl.int32), axis=0)
        score = tl.where(live, score, float("-inf"))
        tl.store(scores + index, score, mask=index < width)
        best = tl.max(score, axis=0)
        first = tl.min(tl.where(score == best, index, width), axis=0)
        place = tl.where(best > hardest, first, place)
        hardest = tl.maximum(hardest, best)
    tl.store(n_greater + row, greater)
    tl.store(n_equal + row, equal)
    tl.store(target_score + row, tl.where(bad > 0, float("nan"), mine))
    tl.store(hardest_score + row, hardest)
    tl.store(hardest_index + row, place)
    if temperature is not None:
        inverse_temperature = inverse_of(temperature, dtype)
        peak = tl.where(hardest > float("-inf"), hardest, 0.0)
        sums = tl.full([], 0, tl.float64)
        moments = tl.full([], 0, tl.float64)
        tl.debug_barrier()  # other threads' stores above
        for start in range(0, width, BLOCK):
            index = start + tl.arange(0, BLOCK).to(tl.int64)
            there = index < width
            score = tl.load(scores + index, mask=there, other=float("-inf")).to(dtype)
            live = score > float("-inf")
            gap = tl.where(live, score - peak, 0.0)
            term = tl.where(live, tl.exp(gap * inverse_temperature), 0.0)
            sums += block_sum(term).to(tl.float64)
            moments += block_sum(term * gap).to(tl.float64)
        tl.store(total + row, sums)
        tl.store(moment + row, moments)


@triton.jit
def column_sums_kernel(
    scores, peak, total, moment, temperature, rows, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of masked scores into their sums, row after row."""
    dtype: tl.constexpr = scores.dtype.element_ty
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = column < width
    inverse_temperature = inverse_of(temperature, dtype)
    old = tl.load(peak + column, mask=inside, other=float("-inf")).to(dtype)
    top = old
    at = scores + column
    for _ in range(rows):
        top = tl.maximum(top, tl.load(at, mask=inside, other=float("-inf")).to(dtype))
        at += width
    base = tl.where(top > float("-inf"), top, 0.0)
    grown = tl.where(old > float("-inf"), old - base, 0.0)
    shrink = tl.exp(grown * inverse_temperature).to(tl.float64)
    before = tl.load(total + column, mask=inside, other=0.0).to(tl.float64)
    sums = before * shrink
    moments = tl.load(moment + column, mask=inside, other=0.0).to(tl.float64)
    moments = (moments + before * grown.to(tl.float64)) * shrink
    at = scores + column
    for _ in range(rows):
        score = tl.load(at, mask=inside, other=float("-inf")).to(dtype)
        live = score > float("-inf")
        gap = tl.where(live, score - base, 0.0)
        term = tl.where(live, tl.exp(gap * inverse_temperature), 0.0)
        sums += term.to(tl.float64)
        moments += (term * gap).to(tl.float64)
        at += width
    tl.store(peak + column, top, mask=inside)
    tl.store(total + column, sums, mask=inside)
    tl.store(moment + column, moments, mask=inside)


@triton.jit
def slope_rows_kernel(
    scores, row_peak, row_factor, target_slope, target, column_peak, column_factor, temperature,
    width, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one query's masked scores: softmax slopes, in place."""
    dtype: tl.constexpr = scores.dtype.element_ty
    across = tl.cdiv(width, BLOCK)
    piece = tl.program_id(0).to(tl.int64)
    row = piece // across
    index = piece % across * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = index < width
    inverse_temperature = inverse_of(temperature, dtype)
    at = scores + row * width + index
    score = tl.load(at, mask=inside, other=float("-inf")).to(dtype)
    live = score > float("-inf")
    gap = tl.where(live, score - tl.load(row_peak + row).to(dtype), 0.0)
    slope = tl.exp(gap * inverse_temperature) * tl.load(row_factor + row).to(dtype)
    if column_peak is not None:
        peak = tl.load(column_peak + index, mask=inside, other=0.0).to(dtype)
        factor = tl.load(column_factor + index, mask=inside, other=0.0).to(dtype)
        slope += tl.exp(tl.where(live, score - peak, 0.0) * inverse_temperature) * factor
    slope = tl.where(live, slope, 0.0)
    own = tl.load(target + row).to(tl.int64)
    slope = tl.where(index == own, tl.load(target_slope + row).to(dtype), slope)
    tl.store(at, slope, mask=inside)
