"""Statistics of rows of in-batch scores, and what InfoNCE makes of the rows.

Eq. (9) to (14) of `elva_kernels.reference` (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4).
In: cosines [R, width] in float32 (float64), rounded beyond [-1, 1], none of them NaN; targets int64
    [R, P], -1 for none, -2 for one that does not exist; segments of a list of other candidates that
    are no negatives; norms of queries and candidates. Out: counts int32 and scores [R, P], the
    hardest negative, sums float64; the rows masked in place (-inf where a candidate is no
    negative), then their slopes in place.
Work split: one program = a row of scores, or BLOCK columns of it, or BLOCK columns of all rows.
Bytes: a row of scores is read twice (again from cache) and written once, and read once more from
    cache for every AT_ONCE positives after the first; slopes: once each.
Numerics: exponentials in the scores' dtype; sums of BLOCK terms by a tree of stated shape, then in
    float64. Ties by lower index. Deterministic, no atomics. Limits: none.
Reference: reference.statistics_of_scores, info_nce_of_scores.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; to Python their arguments have no type.

import triton
import triton.language as tl

from elva_kernels.backends.triton.kernels.ranks import block_sum

# A thread loads an element at a time, so no width depends on these: a kernel is not compiled anew
# for them.
SIZES = ["candidates", "width", "rows", "positives", "segments"]
TENSORS = ["scores", "query_norms", "candidate_norms", "target", "temperature", "total", "moment"]
TENSORS += ["skipped", "skipped_first", "skipped_last", "n_greater", "n_equal", "target_score"]
TENSORS += ["hardest_score", "hardest_index", "peak", "row_peak", "row_factor", "target_slope"]
TENSORS += ["column_peak", "column_factor"]


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
def own_scores(scores, target, bad_query, candidate_norms, candidates, dtype: tl.constexpr):
    """Of products that are not masked yet: -inf for no positive, NaN for a pair not finite."""
    exists = (target >= 0) & (target < candidates)
    norm = tl.load(candidate_norms + 2 * target, mask=exists, other=0.0).to(tl.float64)
    score = clamped(tl.load(scores + target, mask=exists, other=0.0).to(dtype), dtype)
    bad = bad_query | (norm != norm).to(tl.int32) | (exists == 0).to(tl.int32)
    return tl.where(target == -1, float("-inf"), tl.where(bad > 0, float("nan"), score))


@triton.jit
def store_own_scores(
    scores, target, bad_query, candidate_norms, target_score, positives, candidates,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The scores of a query's positives."""
    dtype: tl.constexpr = scores.dtype.element_ty
    for start in range(0, positives, BLOCK):
        which = start + tl.arange(0, BLOCK).to(tl.int64)
        there = which < positives
        own = tl.load(target + which, mask=there, other=-1).to(tl.int64)
        score = own_scores(scores, own, bad_query, candidate_norms, candidates, dtype)
        tl.store(target_score + which, score, mask=there)


@triton.jit
def strike(scores, listed, first, last, candidates, BLOCK: tl.constexpr):
    """NaN, which no product is, for the candidates that are listed from `first` to `last`."""
    for start in range(first, last, BLOCK):
        place = start + tl.arange(0, BLOCK).to(tl.int64)
        candidate = tl.load(listed + place, mask=place < last, other=-1).to(tl.int64)
        exists = (candidate >= 0) & (candidate < candidates)
        nowhere = tl.full([BLOCK], float("nan"), scores.dtype.element_ty)
        tl.store(scores + candidate, nowhere, mask=exists)


@triton.jit
def strike_all(
    scores, target, positives, skipped, skipped_first, skipped_last, segments, candidates,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """NaN for all candidates that are no negatives, when every thread has read what it needs."""
    tl.debug_barrier()
    strike(scores, target, 0, positives, candidates, BLOCK)
    if skipped is not None:
        for segment in range(segments):
            first = tl.load(skipped_first + segment).to(tl.int64)
            last = tl.load(skipped_last + segment).to(tl.int64)
            strike(scores, skipped, first, last, candidates, BLOCK)
    tl.debug_barrier()


@triton.jit
def count_further(
    scores, target_score, n_greater, n_equal, positives, width, hardest, unsound,
    AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts for the positives from the second, against a masked row; `unsound` equal NaN."""
    dtype: tl.constexpr = scores.dtype.element_ty
    for start in range(1, positives, AT_ONCE):
        which = start + tl.arange(0, AT_ONCE).to(tl.int64)
        there = which < positives
        own = tl.load(target_score + which, mask=there, other=float("-inf")).to(dtype)
        bar = tl.where(own == float("-inf"), float("inf"), own)
        bar = tl.where(own == own, bar, float("-inf"))  # below all negatives
        greater = tl.zeros([AT_ONCE], tl.int32)
        equal = tl.zeros([AT_ONCE], tl.int32)
        if tl.min(bar, axis=0) <= hardest:
            for first in range(0, width, BLOCK):
                index = first + tl.arange(0, BLOCK).to(tl.int64)
                score = tl.load(scores + index, mask=index < width, other=float("-inf")).to(dtype)
                greater += tl.sum((score[None, :] > bar[:, None]).to(tl.int32), axis=1)
                equal += tl.sum((score[None, :] == bar[:, None]).to(tl.int32), axis=1)
        tl.store(n_greater + which, greater, mask=there)
        tl.store(n_equal + which, tl.where(own == own, equal, unsound), mask=there)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def score_rows_kernel(
    scores, query_norms, candidate_norms, target, skipped, skipped_first, skipped_last,
    max_score: tl.float64,
    n_greater, n_equal, target_score, hardest_score, hardest_index, total, moment, temperature,
    candidates, width, positives, segments,
    ONE: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One query: masks its scores, counts, and sums where there is a temperature.

    ONE positive with nothing else to skip is known by its index; else what is no negative is NaN
    in the place of its product.
    """
    dtype: tl.constexpr = scores.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    scores += row * width
    target += row * positives
    target_score += row * positives
    n_greater += row * positives
    n_equal += row * positives
    own = tl.load(target).to(tl.int64)
    query_norm = tl.load(query_norms + 2 * row).to(tl.float64)
    bad_query = (query_norm != query_norm).to(tl.int32)
    mine = own_scores(scores, own, bad_query, candidate_norms, candidates, dtype)
    bad = (mine != mine).to(tl.int32)
    if not ONE:
        store_own_scores(
            scores, target, bad_query, candidate_norms, target_score, positives, candidates, BLOCK
        )
        if skipped is not None:
            skipped_first += row * segments
            skipped_last += row * segments
        strike_all(
            scores, target, positives, skipped, skipped_first, skipped_last, segments, candidates,
            BLOCK,
        )  # fmt: skip
    greater = tl.full([], 0, tl.int32)
    equal = tl.full([], 0, tl.int32)
    unsound = tl.full([], 0, tl.int32)
    hardest = tl.full([], float("-inf"), dtype)
    place = tl.full([], -1, tl.int64)
    for start in range(0, width, BLOCK):
        index = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = index < candidates
        product = tl.load(scores + index, mask=inside, other=0.0).to(dtype)
        rival = inside & ((index != own) if ONE else (product == product))
        norm = tl.load(candidate_norms + 2 * index, mask=inside, other=0.0).to(tl.float64)
        sound = (norm == norm) & (bad_query == 0)
        score = clamped(product, dtype)
        live = rival & sound & ((score > max_score) == 0)
        # NaN, a bad pair's own score, is below all numbers and equal to NaN.
        greater += tl.sum((live & ((bad > 0) | (score > mine))).to(tl.int32), axis=0)
        same = tl.where(bad > 0, rival & (sound == 0), live & (score == mine))
        equal += tl.sum(same.to(tl.int32), axis=0)
        if not ONE:
            unsound += tl.sum((rival & (sound == 0)).to(tl.int32), axis=0)
        score = tl.where(live, score, float("-inf"))
        tl.store(scores + index, score, mask=index < width)
        best = tl.max(score, axis=0)
        first = tl.min(tl.where(score == best, index, width), axis=0)
        place = tl.where(best > hardest, first, place)
        hardest = tl.maximum(hardest, best)
    tl.store(n_greater, tl.where(own == -1, 0, greater))
    tl.store(n_equal, tl.where(own == -1, 0, equal))
    if ONE:
        tl.store(target_score, mine)
    tl.store(hardest_score + row, hardest)
    tl.store(hardest_index + row, place)
    if not ONE:
        tl.debug_barrier()  # other threads' stores above
        count_further(
            scores, target_score, n_greater, n_equal, positives, width, hardest, unsound,
            AT_ONCE, BLOCK,
        )  # fmt: skip
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


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
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
def add_target_slopes(
    slope, index, target, target_slope, positives, dtype: tl.constexpr, ONE: tl.constexpr
):
    """The slopes of the positives in order, where a masked score has left 0."""
    if ONE:
        own = tl.load(target).to(tl.int64)
        slope = tl.where(index == own, tl.load(target_slope).to(dtype), slope)
    else:
        for p in range(positives):
            own = tl.load(target + p).to(tl.int64)
            more = tl.load(target_slope + p).to(dtype)
            slope = tl.where(index == own, slope + more, slope)
    return slope


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def slope_rows_kernel(
    scores, row_peak, row_factor, target_slope, target, column_peak, column_factor, temperature,
    width, positives, ONE: tl.constexpr, BLOCK: tl.constexpr,
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
    target += row * positives
    target_slope += row * positives
    slope = add_target_slopes(slope, index, target, target_slope, positives, dtype, ONE)
    tl.store(at, slope, mask=inside)
