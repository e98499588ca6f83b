"""Products of matrices for the in-batch ops and search.

Eq. (8) of `elva_kernels.reference`, and the gradients through it.
In: a [m, k], b [k, n], any strides: rows in one dtype both, or slopes in float32 (float64) and
    rows; scales float64 of a's columns, of c's rows and of c's columns, or None.
Out: c [m, n] in float32 (float64) = diag(row) a diag(inner) b diag(column), or c += it.
Work split: one program = a tile [ROWS, COLUMNS] of c, over all of the depth.
Bytes: a once a column of tiles, b once a row of them. Floor: the products' arithmetic.
Numerics: a float32 (float64) accumulator an element, over the depth in order, in tiles of one size
    whatever m and n are: an element's bits depend on its row of a and column of b alone, so copies
    of a row tie. bfloat16 and float16 rows are multiplied by matrix units, exactly. Slopes times
    bfloat16 rows are two products, of their halves: rounded once, they would be off by 2^-9. OUTER:
    one step of the depth at a time, for float64, which not every GPU has a unit for. No TF32.
    Scales apply in float64. Deterministic. Limits: none.
Reference: torch.mm.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; to Python their arguments have no type.

import triton
import triton.language as tl


@triton.jit
def load_scales(scales, step, index, inside, dtype: tl.constexpr):
    """In dtype; 0 for a row that is not finite."""
    scale = tl.load(scales + index * step, mask=inside, other=0.0).to(tl.float64)
    return tl.where(scale == scale, scale, 0.0).to(dtype)


@triton.jit
def step_by_step(
    a, a_row, a_step, inner, b, b_row, b_step, row, column, m, n, k, value: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile, one outer product after the other."""
    total = tl.zeros([ROWS, COLUMNS], value)
    x_at = a + row * a_row
    y_at = b + column * b_step
    for _ in range(k):
        x = tl.load(x_at, mask=row < m, other=0.0).to(value)
        y = tl.load(y_at, mask=column < n, other=0.0).to(value)
        if inner is not None:
            scale = tl.load(inner).to(value)
            x *= tl.where(scale == scale, scale, 0.0)
            inner += 2
        total += x[:, None] * y[None, :]
        x_at += a_step
        y_at += b_row
    return total


@triton.jit
def product_kernel(
    a, b, c, inner, outer_rows, outer_columns, m, n, k, a_row, a_step, b_row, b_step, c_row,
    ADD: tl.constexpr, OUTER: tl.constexpr, HALVES: tl.constexpr, operand: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile. `operand`: what tiles are multiplied in; inner scales are of float32 slopes."""
    value: tl.constexpr = c.dtype.element_ty
    across = tl.cdiv(n, COLUMNS)
    tile = tl.program_id(0).to(tl.int64)
    row = tile // across * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    if OUTER:
        total = step_by_step(
            a, a_row, a_step, inner, b, b_row, b_step, row, column, m, n, k, value, ROWS, COLUMNS
        )
    else:
        total = tl.zeros([ROWS, COLUMNS], value)
        for start in range(0, k, DEPTH):
            depth = start + tl.arange(0, DEPTH).to(tl.int64)
            x_at = a + row[:, None] * a_row + depth[None, :] * a_step
            y_at = b + depth[:, None] * b_row + column[None, :] * b_step
            x_there = (row < m)[:, None] & (depth < k)[None, :]
            y_there = (depth < k)[:, None] & (column < n)[None, :]
            y = tl.load(y_at, mask=y_there, other=0.0).to(operand)
            if inner is None:
                x = tl.load(x_at, mask=x_there, other=0.0).to(operand)
                total = tl.dot(x, y, total, input_precision="ieee")
            else:
                x = tl.load(x_at, mask=x_there, other=0.0).to(value)
                x *= load_scales(inner, 2, depth, depth < k, value)[None, :]
                if HALVES:
                    high = x.to(operand)
                    low = (x - high.to(tl.float32)).to(operand)
                    total = tl.dot(high, y, total)
                    total = tl.dot(low, y, total)
                else:
                    total = tl.dot(x, y, total, input_precision="ieee")
    inside = (row < m)[:, None] & (column < n)[None, :]
    if outer_rows is not None:
        exact = total.to(tl.float64)
        exact *= load_scales(outer_rows, 2, row, row < m, tl.float64)[:, None]
        exact *= load_scales(outer_columns, 2, column, column < n, tl.float64)[None, :]
        total = exact.to(value)
    at = c + row[:, None] * c_row + column[None, :]
    if ADD:
        total += tl.load(at, mask=inside, other=0.0).to(value)
    tl.store(at, total, mask=inside)
