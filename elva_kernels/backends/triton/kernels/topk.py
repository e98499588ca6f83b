"""Scores of flat search, out of products of queries and corpus rows.

In: products [Q, n] in float32 (float64), scaled by norms or powers of two; norms float64 [., 2] of
    queries and rows, NaN where one is not finite. Out: in place, cosines in [-1, 1] or dots;
    -inf where a row or its query is not finite. Never NaN, never -0.
Work split: one program = BLOCK rows of the corpus and one query. Bytes: one read and write.
Numerics: none but comparisons. Deterministic. Limits: none. Reference: reference.topk.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; to Python their arguments have no type.

import triton
import triton.language as tl

from elva_kernels.backends.triton.kernels.in_batch import clamped


@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["scores", "query_norms", "row_norms"],
)
def finish_scores_kernel(
    scores, query_norms, row_norms, rows, COSINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK scores of one query."""
    dtype: tl.constexpr = scores.dtype.element_ty
    across = tl.cdiv(rows, BLOCK)
    piece = tl.program_id(0).to(tl.int64)
    query = piece // across
    index = piece % across * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = index < rows
    score = tl.load(scores + query * rows + index, mask=inside, other=0.0).to(dtype)
    if COSINE:
        score = clamped(score, dtype)
    norm = tl.load(row_norms + 2 * index, mask=inside, other=0.0).to(tl.float64)
    query_norm = tl.load(query_norms + 2 * query).to(tl.float64)
    finite = (query_norm == query_norm).to(tl.int32)
    sound = (norm == norm) & (finite > 0)
    score = tl.where(sound, score + 0.0, float("-inf"))
    tl.store(scores + query * rows + index, score, mask=inside)
