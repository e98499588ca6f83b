"""Grouped ranking reward: cosine scores, rewards, and the gradients of every embedding.

Eq. 1 to 6 of `elva_kernels.reference` (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4), 3g and 4g.
In: query, positive [*, D], negatives [*, N, D] of bfloat16, float16, float32 or float64, any
    strides; mask [*, N], upstream [*], relevance [*, N] (in the scores' dtype, dense) or None. Or
    negatives in a bank [bank_rows, D], and `mask` their rows there, int64: -1 is masked, another
    that does not exist is NaN and never read.
Out: reward, margin_reward, rank_reward [*], rank int32 [*], scores [*, C], C = N + 1, in float32
    (float64 for float64); those gradients that are wanted, in the inputs' dtype. All contiguous. A
    bank's: `bank`.
Work split: one program = one group; tiles of ROWS candidates by BLOCK columns, two passes over D.
Bytes: (C + 1) D read twice (the second time partly from L2) and written once; floor: read once.
Numerics: float32 lanes (float64 for float64), products and sums not fused, lanes summed by a tree
    of stated shape every SPAN columns and then in float64; rows out of range are first scaled by an
    exact power of two. So a score's bits do not depend on strides, alignment, batch or GPU model.
    Ties: `ranks`. Deterministic, no atomics. Limits: none on N or D.
Reference: ranking_reward, ranking_reward_and_grad.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; to Python their arguments have no type.

import triton
import triton.language as tl

from elva_kernels.backends.triton.kernels.from_scores import lead
from elva_kernels.backends.triton.kernels.ranks import (
    block_sum,
    live_candidates,
    load_slope,
    settle,
    tree_sum,
)
from elva_kernels.backends.triton.kernels.rows import exponents, in_range, power

# What no load's width depends on: a kernel is not compiled anew for it, which takes seconds.
SIZES = ["candidates", "bank_rows", "inner", "mask_outer", "mask_inner", "mask_step"]
SIZES += ["upstream_outer", "upstream_inner"]
VALUES = ["mask", "upstream", "relevance", "reward", "margin_reward", "rank_reward", "rank"]
VALUES += ["scores", "scratch", "saved"]


@triton.jit
def row_pointers(positive, negatives, row_stride, index, WIDE: tl.constexpr):
    """Where the rows `index` begin: the positive's, or a negative's."""
    rows = tl.where(index == 0, positive, negatives + (index - 1) * row_stride)
    if WIDE:  # Triton 3.9 does not see through the choice, and would load element by element
        rows = tl.multiple_of(rows, [16])
    return rows


@triton.jit
def places(mask, mask_step, index, live, bank_rows):
    """Which live candidates have a row, and which of `row_pointers` it is."""
    there = live
    place = index
    if bank_rows is not None:
        given = live & (index > 0)
        row = tl.load(mask + (index - 1) * mask_step, mask=given, other=-1).to(tl.int64)
        there = live & ((index == 0) | ((row >= 0) & (row < bank_rows)))
        place = tl.where(given & there, row + 1, 0)
    return there, place


@triton.jit
def row_steps(positive_step, negative_step, index, WIDE: tl.constexpr):
    """From one element of a row to its next. One number, 1, where loads are wide."""
    steps = negative_step
    if not WIDE:
        steps = tl.where(index == 0, positive_step, negative_step)[:, None]
    return steps


@triton.jit
def products(
    query, query_step, query_k, rows, row_step, k, live, dim,
    SCALED: tl.constexpr, dtype: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Float64 [ROWS]: dot products with the query, and squared norms, both of scaled rows."""
    dot = tl.zeros([ROWS], tl.float64)
    square = tl.zeros([ROWS], tl.float64)
    for span in range(0, dim, SPAN):
        dots = tl.zeros([ROWS, BLOCK], dtype)
        squares = tl.zeros([ROWS, BLOCK], dtype)
        for start in range(span, min(span + SPAN, dim), BLOCK):
            column = start + tl.arange(0, BLOCK).to(tl.int64)
            inside = column < dim
            there = live[:, None] & inside[None, :]
            q = tl.load(query + column * query_step, mask=inside, other=0.0).to(dtype)
            c = tl.load(rows[:, None] + column[None, :] * row_step, mask=there, other=0.0).to(dtype)
            if SCALED:
                q *= power(query_k, dtype)
                c *= power(k, dtype)[:, None]
            dots += q[None, :] * c
            squares += c * c
        dot += tree_sum(dots).to(tl.float64)
        square += tree_sum(squares).to(tl.float64)
    return dot, square


@triton.jit
def measure(
    query, query_step, query_k, rows, row_step, live, dim, dtype: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Float64 [ROWS]: dot products and norms of scaled rows; and k.

    First unscaled; again where a row is out of range. Both give the same bits where both are sound.
    """
    k = tl.zeros([ROWS], tl.int32)
    dot, square = products(
        query, query_step, query_k, rows, row_step, k, live, dim, False, dtype, ROWS, BLOCK, SPAN
    )
    sound = in_range(square, dtype)
    if (query_k != 0) | (tl.sum((live & (sound == 0)).to(tl.int32), axis=0) > 0):
        k = tl.where(sound, 0, exponents(rows, row_step, live, dim, dtype, ROWS, BLOCK))
        dot, square = products(
            query, query_step, query_k, rows, row_step, k, live, dim, True, dtype, ROWS, BLOCK, SPAN
        )
    return dot, tl.sqrt(square), k


@triton.jit
def pack(value, k):
    """`k` in the lowest three bits of a float64, in two's complement, so that 0.0 holds k = 0."""
    bits = value.to(tl.int64, bitcast=True)
    return ((bits & -8) | (k.to(tl.int64) & 7)).to(tl.float64, bitcast=True)


@triton.jit
def unpack(packed):
    """The float64 and the k that `pack` took."""
    bits = packed.to(tl.int64, bitcast=True)
    return (bits & -8).to(tl.float64, bitcast=True), ((bits & 7) ^ 4).to(tl.int32) - 4


@triton.jit
def score_group(
    query, query_step, positive, positive_step, negatives, negative_step, row_stride, bank_rows,
    mask, mask_step, scores, norms, candidates, dim, WIDE: tl.constexpr, dtype: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Stores a group's scores, and in `norms` [2, C], if given, norms with k and unclamped scores.

    Returns the query's norm with its k.
    """
    one = tl.zeros([1], tl.int64)
    _, query_norms, query_ks = measure(
        query, query_step, tl.full([], 0, tl.int32), query + one, query_step, one == 0, dim, dtype,
        1, BLOCK, SPAN,
    )  # fmt: skip
    query_norm = tl.sum(query_norms, axis=0)
    query_k = tl.sum(query_ks, axis=0)
    FLUSH: tl.constexpr = 2.0**-300 if dtype == tl.float64 else 2.0**-50
    for start in range(0, candidates, ROWS):
        index = start + tl.arange(0, ROWS).to(tl.int64)
        inside = index < candidates
        live = live_candidates(mask, mask_step, index, candidates)
        there, place = places(mask, mask_step, index, live, bank_rows)
        rows = row_pointers(positive, negatives, row_stride, place, WIDE)
        row_step = row_steps(positive_step, negative_step, index, WIDE)
        dot, norm, k = measure(
            query, query_step, query_k, rows, row_step, there, dim, dtype, ROWS, BLOCK, SPAN
        )
        scale = query_norm * norm
        score = tl.where(scale == 0, 0.0, dot / tl.where(scale == 0, 1.0, scale))
        if bank_rows is not None:
            score = tl.where(live & (there == 0), float("nan"), score)
        score = tl.where(tl.abs(score) < FLUSH, 0.0, score)
        clamped = tl.where(score > 1, 1.0, tl.where(score < -1, -1.0, score))
        tl.store(scores + index, tl.where(live, clamped, float("-inf")), mask=inside)
        if norms is not None:
            tl.store(norms + index, pack(norm, k), mask=inside)
            tl.store(norms + candidates + index, score, mask=inside)
    return pack(query_norm, query_k)


@triton.jit
def keep_coefficients(
    scores, mask, mask_step, norms, slopes, saved, query_packed, candidates, inverse_temperature,
    SOFT: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Stores `saved` [2 C + 1]: a [C] with k, b [C], the query's b with its k, such that

    gradient of row i = 2^-(STEP k_i) (a q' + b c'),  x' = the scaled row,
    gradient of the query = 2^-(STEP k) (sum of a c' + b q').
    From ds/dc = (q^ - s c^) / |c| and ds/dq = (c^ - s q^) / |q|.
    """
    query_norm, query_k = unpack(query_packed)
    query_b = tl.full([], 0, tl.float64)
    for start in range(0, candidates, RANKS):
        index, slope = load_slope(
            scores, 1, mask, mask_step, slopes, start, candidates, inverse_temperature, SOFT, RANKS
        )
        inside = index < candidates
        packed = tl.load(norms + index, mask=inside, other=0.0).to(tl.float64)
        score = tl.load(norms + candidates + index, mask=inside, other=0.0).to(tl.float64)
        norm, k = unpack(packed)
        live = live_candidates(mask, mask_step, index, candidates)
        scale = query_norm * norm
        counts = live & (scale > 0)  # a zero row has gradient 0 and gives none
        a = tl.where(counts, slope / tl.where(counts, scale, 1.0), 0.0)
        b = tl.where(counts, -slope * score / tl.where(counts, norm * norm, 1.0), 0.0)
        unsound = slope != slope
        tl.store(saved + index, pack(tl.where(unsound, slope, a), k), mask=inside)
        tl.store(saved + candidates + index, tl.where(unsound, slope, b), mask=inside)
        query_b -= block_sum(tl.where(unsound, slope, tl.where(counts, slope * score, 0.0)))
    square = tl.where(query_norm > 0, query_norm * query_norm, 1.0)
    tl.store(saved + 2 * candidates, pack(query_b / square, query_k))


@triton.jit
def wanted_rows(grad_positive, grad_negatives, dim, index, listed, WIDE: tl.constexpr):
    """Where the candidates' gradients go, and those of `listed` that are wanted."""
    wanted = listed
    at = index
    if grad_negatives is None:
        if grad_positive is not None:
            wanted = listed & (index == 0)
            at = grad_positive + index * dim
    elif grad_positive is None:
        wanted = listed & (index > 0)
        at = grad_negatives + (index - 1) * dim
    else:
        at = row_pointers(grad_positive, grad_negatives, dim, index, WIDE)
    return at, wanted


@triton.jit
def gradient_rows(
    query, query_step, positive, positive_step, negatives, negative_step, row_stride, bank_rows,
    mask, mask_step, saved, weight, grad_query, grad_positive, grad_negatives, candidates, dim,
    WIDE: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes a group's gradients from its `saved`, those of which the pointer is not None.

    `weight` is the upstream gradient, float64.
    """
    query_b, query_k = unpack(tl.load(saved + 2 * candidates).to(tl.float64))
    query_scale = power(query_k, dtype)
    query_out = (query_scale.to(tl.float64) * weight).to(dtype)
    last = candidates
    if grad_query is None and grad_negatives is None:
        last = 1
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = column < dim
        q = tl.load(query + column * query_step, mask=inside, other=0.0).to(dtype) * query_scale
        pulls = tl.zeros([ROWS, BLOCK], dtype)
        for first in range(0, last, ROWS):
            index = first + tl.arange(0, ROWS).to(tl.int64)
            listed = index < last
            live = live_candidates(mask, mask_step, index, last)
            there, place = places(mask, mask_step, index, live, bank_rows)
            readable = there[:, None] & inside[None, :]
            packed = tl.load(saved + index, mask=listed, other=0.0).to(tl.float64)
            a, k = unpack(packed)
            rows = row_pointers(positive, negatives, row_stride, place, WIDE)
            row_step = row_steps(positive_step, negative_step, index, WIDE)
            at = rows[:, None] + column[None, :] * row_step
            c = tl.load(at, mask=readable, other=0.0).to(dtype)
            scale = power(k, dtype)
            c *= scale[:, None]
            if (grad_positive is not None) or (grad_negatives is not None):
                b = tl.load(saved + candidates + index, mask=listed, other=0.0).to(tl.float64)
                out = (scale.to(tl.float64) * weight).to(dtype)
                own = b.to(dtype)[:, None] * c
                gradient = (a.to(dtype)[:, None] * q[None, :] + own) * out[:, None]
                into, wanted = wanted_rows(grad_positive, grad_negatives, dim, index, listed, WIDE)
                tl.store(
                    into[:, None] + column[None, :],
                    tl.where(live[:, None], gradient, 0.0),
                    mask=wanted[:, None] & inside[None, :],
                )
            if grad_query is not None:
                pulls += a.to(dtype)[:, None] * c
        if grad_query is not None:
            total = tree_sum(tl.trans(pulls)) + query_b.to(dtype) * q
            tl.store(grad_query + column, total * query_out, mask=inside)


@triton.jit
def group_gradients(
    query, positive, negatives, bank_rows, mask, saved, weight,
    grad_query, grad_positive, grad_negatives, candidates, dim, group,
    query_strides, positive_strides, negative_strides, mask_step,
    WIDE: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`gradient_rows` of a group's inputs, into its part of each gradient."""
    if grad_query is not None:
        grad_query += group * dim
    if grad_positive is not None:
        grad_positive += group * dim
    if grad_negatives is not None:
        grad_negatives += group * (candidates - 1) * dim
    gradient_rows(
        query, query_strides[2], positive, positive_strides[2], negatives, negative_strides[2],
        negative_strides[3], bank_rows, mask, mask_step, saved, weight,
        grad_query, grad_positive, grad_negatives, candidates, dim, WIDE, dtype, ROWS, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=VALUES)
def reward_kernel(
    query, positive, negatives, mask, upstream, relevance,
    reward, margin_reward, rank_reward, rank, scores, scratch, saved,
    grad_query, grad_positive, grad_negatives,
    candidates, dim, bank_rows, inner,
    query_strides, positive_strides, negative_strides,
    mask_outer, mask_inner, mask_step, upstream_outer, upstream_inner,
    margin: tl.float64, rank_penalty: tl.float64, w_margin: tl.float64, w_rank: tl.float64,
    inverse_temperature: tl.float64, SOFT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Values; given `scratch` [*, 4, C] and `saved` coefficients; given their memory gradients."""
    dtype: tl.constexpr = scores.dtype.element_ty
    group = tl.program_id(0).to(tl.int64)
    query += lead(group, inner, query_strides)
    positive += lead(group, inner, positive_strides)
    negatives += lead(group, inner, negative_strides)
    if mask is not None:
        mask += lead(group, inner, (mask_outer, mask_inner))
    if relevance is not None:
        relevance += group * (candidates - 1)
    scores += group * candidates
    slopes = None
    norms = None
    if saved is not None:
        slopes = scratch + group * candidates * 4
        norms = slopes + candidates * 2
        saved += group * (candidates * 2 + 1)
    query_packed = score_group(
        query, query_strides[2], positive, positive_strides[2], negatives, negative_strides[2],
        negative_strides[3], bank_rows, mask, mask_step, scores, norms, candidates, dim, WIDE,
        dtype, ROWS, BLOCK, SPAN,
    )  # fmt: skip
    tl.debug_barrier()
    settle(
        scores, 1, mask, mask_step, relevance, slopes, candidates, reward + group,
        margin_reward + group, rank_reward + group, rank + group,
        margin, rank_penalty, w_margin, w_rank, inverse_temperature, SOFT, RANKS,
    )  # fmt: skip
    if saved is not None:
        tl.debug_barrier()
        keep_coefficients(
            scores, mask, mask_step, norms, slopes, saved, query_packed, candidates,
            inverse_temperature, SOFT, RANKS,
        )  # fmt: skip
    if (grad_query is not None) or (grad_positive is not None) or (grad_negatives is not None):
        weight = tl.full([], 1, tl.float64)
        if upstream is not None:
            upstream += lead(group, inner, (upstream_outer, upstream_inner))
            weight = tl.load(upstream).to(tl.float64)
        tl.debug_barrier()
        group_gradients(
            query, positive, negatives, bank_rows, mask, saved, weight,
            grad_query, grad_positive, grad_negatives, candidates, dim, group,
            query_strides, positive_strides, negative_strides, mask_step,
            WIDE, dtype, ROWS, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=VALUES)
def gradient_kernel(
    query, positive, negatives, mask, saved, upstream, grad_query, grad_positive, grad_negatives,
    candidates, dim, bank_rows, inner,
    query_strides, positive_strides, negative_strides,
    mask_outer, mask_inner, mask_step, upstream_outer, upstream_inner,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients, from what `reward_kernel` saved for the same inputs."""
    dtype: tl.constexpr = tl.float64 if query.dtype.element_ty == tl.float64 else tl.float32
    group = tl.program_id(0).to(tl.int64)
    query += lead(group, inner, query_strides)
    positive += lead(group, inner, positive_strides)
    negatives += lead(group, inner, negative_strides)
    if mask is not None:
        mask += lead(group, inner, (mask_outer, mask_inner))
    saved += group * (candidates * 2 + 1)
    weight = tl.load(upstream + lead(group, inner, (upstream_outer, upstream_inner))).to(tl.float64)
    group_gradients(
        query, positive, negatives, bank_rows, mask, saved, weight,
        grad_query, grad_positive, grad_negatives, candidates, dim, group,
        query_strides, positive_strides, negative_strides, mask_step,
        WIDE, dtype, ROWS, BLOCK,
    )  # fmt: skip
