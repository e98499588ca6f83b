"""Bounds of cosines by 8-bit codes: queries of two bytes against coded rows.

Eq. (17) of `elva_kernels.reference`.
In: codes int8 [P, D] and [Q, D] twice, without gaps; scales and losses float32; a mask bool [P] or
    None. Out: bounds float32 [Q, P], -inf where the mask hides the row. Never NaN.
Work split: one program = ROWS rows and QUERIES queries; programs of the same rows come one after
    the other, so that all but the first read them from the second-level cache.
Bytes: the codes once, the bounds written once. Floor up to 64 queries: the read, 0.38 ms for
    1,000,000 x 1536 on an H200 at 85 % of 4.8 TB/s; more are bound by the products (256: 1.3 ms at
    60 % of 1,979 integer TOPS).
Numerics: each byte's products are summed exactly in int32 (D up to 65,536). Then nine roundings in
    float32, below 1e-6 together, for which SCORE_ERROR leaves room. Deterministic.
Limits: D at most 65,536. Reference: reference.score_bounds.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; to Python their arguments have no type.

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["queries", "rows"],
    do_not_specialize_on_alignment=["query_scale", "query_lost", "scale", "lost", "mask", "bounds"],
)
def code_bounds_kernel(
    query_code, query_fine, query_scale, query_lost, code, scale, lost, mask, bounds,
    queries, rows, dim, FINE_STEP: tl.constexpr, ERROR: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile."""
    across = tl.cdiv(queries, QUERIES)
    tile = tl.program_id(0).to(tl.int64)
    row = tile // across * ROWS + tl.arange(0, ROWS).to(tl.int64)
    query = tile % across * QUERIES + tl.arange(0, QUERIES).to(tl.int64)
    whole = tl.zeros([ROWS, QUERIES], tl.int32)
    rest = tl.zeros([ROWS, QUERIES], tl.int32)
    for start in range(0, dim, DEPTH):
        depth = start + tl.arange(0, DEPTH).to(tl.int64)
        x_there = (row < rows)[:, None] & (depth < dim)[None, :]
        y_there = (depth < dim)[:, None] & (query < queries)[None, :]
        at = depth[:, None] + query[None, :] * dim
        x = tl.load(code + row[:, None] * dim + depth[None, :], mask=x_there, other=0).to(tl.int8)
        y = tl.load(query_code + at, mask=y_there, other=0).to(tl.int8)
        whole = tl.dot(x, y, whole, out_dtype=tl.int32)
        y = tl.load(query_fine + at, mask=y_there, other=0).to(tl.int8)
        rest = tl.dot(x, y, rest, out_dtype=tl.int32)
    gain = tl.load(query_scale + query, mask=query < queries, other=0.0).to(tl.float32)
    missed = tl.load(query_lost + query, mask=query < queries, other=0.0).to(tl.float32) + ERROR
    own_scale = tl.load(scale + row, mask=row < rows, other=0.0).to(tl.float32)
    own_lost = tl.load(lost + row, mask=row < rows, other=0.0).to(tl.float32)
    steps = whole.to(tl.float32) + rest.to(tl.float32) * FINE_STEP
    bound = own_scale[:, None] * gain[None, :] * steps
    bound += missed[None, :] * (1.0 + own_lost)[:, None] + own_lost[:, None]
    if mask is not None:
        found = tl.load(mask + row, mask=row < rows, other=0).to(tl.int1)
        bound = tl.where(found[:, None], bound, float("-inf"))
    inside = (row < rows)[:, None] & (query < queries)[None, :]
    tl.store(bounds + row[:, None] + query[None, :] * rows, bound, mask=inside)
