"""Gradient of a bank of negatives: for each of its rows the sum over the groups that name it.

Eq. 1 to 6 of `elva_kernels.reference` (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4).
In: query [G, D] and bank [M, D] of bfloat16, float16, float32 or float64, any strides; upstream [G]
    or None; the coefficients float64 [G, 2 C + 1] that `reward.reward_kernel` saved; the places in
    the index [G, N] that name a row, `order` int64 [L], sorted stably: first[r] to first[r + 1].
Out: gradients [M, D] in the bank's dtype, contiguous; 0 in a row that nobody names.
Work split: one program = a bank row, BLOCK columns at a time, or every `across`-th BLOCK of them;
    ROWS of the places that name it at a time.
Bytes: a row of the query for each place (mostly from L2), the bank's named rows once, M D written.
Numerics: float64; sums of ROWS places by a tree of stated shape, then place after place; the row's
    power of two at the end, rounded once. Deterministic, no atomics. Limits: none.
Reference: ranking_reward_and_grad.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; to Python their arguments have no type.

import triton
import triton.language as tl

from elva_kernels.backends.triton.kernels.ranks import block_sum, tree_sum
from elva_kernels.backends.triton.kernels.reward import unpack
from elva_kernels.backends.triton.kernels.rows import power


@triton.jit
def load_places(order, saved, upstream, upstream_step, place, end, negatives):
    """Of some places: the group; a and b times the upstream gradient; the row's k, the query's."""
    listed = place < end
    flat = tl.load(order + place, mask=listed, other=0).to(tl.int64)
    group = flat // negatives
    candidate = flat % negatives + 1
    saved += group * (2 * negatives + 3)
    a, k = unpack(tl.load(saved + candidate, mask=listed, other=0.0).to(tl.float64))
    at = saved + negatives + 1 + candidate
    b = tl.load(at, mask=listed, other=0.0).to(tl.float64)
    at = saved + 2 * negatives + 2
    _, query_k = unpack(tl.load(at, mask=listed, other=0.0).to(tl.float64))
    if upstream is not None:
        at = upstream + group * upstream_step
        weight = tl.load(at, mask=listed, other=0.0).to(tl.float64)
        a *= weight
        b *= weight
    return group, a, b, k, query_k


@triton.jit(
    do_not_specialize=["negatives", "across", "upstream_step"],
    do_not_specialize_on_alignment=["upstream", "saved", "order", "first"],
)
def bank_gradient_kernel(
    query, bank, upstream, saved, order, first, gradients, negatives, dim, across,
    query_stride, query_step, bank_stride, bank_step, upstream_step,
    dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the bank, or a part of its columns."""
    piece = tl.program_id(0).to(tl.int64)
    row = piece // across
    begin = tl.load(first + row).to(tl.int64)
    end = tl.load(first + row + 1).to(tl.int64)
    for start in range(piece % across * BLOCK, dim, across * BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = column < dim
        pull = tl.zeros([BLOCK], tl.float64)
        own = tl.full([], 0, tl.float64)
        row_k = tl.full([], 0, tl.int32)
        for at in range(begin, end, ROWS):
            place = at + tl.arange(0, ROWS).to(tl.int64)
            group, a, b, k, query_k = load_places(
                order, saved, upstream, upstream_step, place, end, negatives
            )
            there = (place < end)[:, None] & inside[None, :]
            rows = (query + group * query_stride)[:, None] + column[None, :] * query_step
            q = tl.load(rows, mask=there, other=0.0).to(dtype) * power(query_k, dtype)[:, None]
            pull += tree_sum(tl.trans(a[:, None] * q.to(tl.float64)))
            own += block_sum(b)
            least = tl.min(k, axis=0)  # all places say the same, those behind the end 0
            row_k = tl.where(least < 0, least, tl.max(k, axis=0))
        gradient = pull
        if end > begin:
            own_row = bank + row * bank_stride + column * bank_step
            scale = power(row_k, dtype)
            c = tl.load(own_row, mask=inside, other=0.0).to(dtype) * scale
            gradient = (pull + own * c.to(tl.float64)) * scale.to(tl.float64)
        if gradients.dtype.element_ty != tl.float64:
            gradient = gradient.to(tl.float32)
        tl.store(gradients + row * dim + column, gradient, mask=inside)
