"""Rows of embeddings of any finite magnitude: scaled by an exact power of two, and their norms.

Eq. (1) and (8) of `elva_kernels.reference`.
In: rows [R, D] of bfloat16, float16, float32 or float64, any strides. Out: dense rows in the same
    dtype, zeros where one is not finite; norms float64 [R, 2]: 1 / |row 2^-e| (0 for a zero row,
    NaN for one that is not finite), and e. Gradients on rows from gradients on unit rows.
Work split: one program = one row, BLOCK columns at a time.
Bytes: a row read twice (again from cache) and written once; its gradient likewise.
Numerics: lanes in float32 (float64), summed by a tree of stated shape and then in float64; e is 0
    but for rows out of range. So a row times a power of two gives the same cosines, bit for bit.
    Deterministic. Limits: none. Reference: `reference.rows.unit`.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; to Python their arguments have no type.

import triton
import triton.language as tl

from elva_kernels.backends.triton.kernels.ranks import block_sum

# A row is scaled by 2^-(STEP k), k = -3 .. 3: after it no product overflows, and what underflows is
# at least 2^70 below a score that counts (FLUSH).


@triton.jit
def power(k, dtype: tl.constexpr):
    """2^-(STEP k) in dtype: STEP = 256 for float64, else 32."""
    if dtype == tl.float64:
        bits = (1023 - 256 * k.to(tl.int64)) << 52
    else:
        bits = (127 - 32 * k.to(tl.int32)) << 23
    return bits.to(dtype, bitcast=True)


@triton.jit
def in_range(square, dtype: tl.constexpr):
    """Whether a row needs no scaling, by its squared norm; not for NaN."""
    LEAST: tl.constexpr = 2.0**-200 if dtype == tl.float64 else 2.0**-20
    MOST: tl.constexpr = 2.0**400 if dtype == tl.float64 else 2.0**60
    return (square >= LEAST) & (square <= MOST)


@triton.jit
def exponents(
    rows, row_step, live, dim, dtype: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each row's k, by the bits of its largest entry; 0 for a row of zeros or not finite."""
    INTEGER: tl.constexpr = tl.int64 if dtype == tl.float64 else tl.int32
    top = tl.zeros([ROWS], INTEGER)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        there = live[:, None] & (column < dim)[None, :]
        c = tl.load(rows[:, None] + column[None, :] * row_step, mask=there, other=0.0).to(dtype)
        top = tl.maximum(top, tl.max(tl.abs(c).to(INTEGER, bitcast=True), axis=1))
    if dtype == tl.float64:
        exponent = (top >> 52).to(tl.int32)
        k = ((exponent + 129) >> 8) - 4
        finite = exponent < 2047
    else:
        exponent = top >> 23
        k = ((exponent + 17) >> 5) - 4
        finite = exponent < 255
    k = tl.minimum(tl.maximum(k, -3), 3)
    return tl.where(finite & (top > 0), k, 0)


@triton.jit
def square_of(rows, step, dim, k, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Float64: the squared norm of one row times 2^-(STEP k)."""
    square = tl.full([], 0, tl.float64)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(rows + column * step, mask=column < dim, other=0.0).to(dtype)
        x *= power(k, dtype)
        square += block_sum(x * x).to(tl.float64)
    return square


@triton.jit(do_not_specialize_on_alignment=["norms"])
def units_kernel(
    rows, units, norms, dim, row_stride, step,
    SCALED: tl.constexpr, dtype: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dense rows in range, and their norms. float16 is in range as it is: not SCALED."""
    row = tl.program_id(0).to(tl.int64)
    rows += row * row_stride
    k = tl.full([], 0, tl.int32)
    square = square_of(rows, step, dim, k, dtype, BLOCK)
    STEP: tl.constexpr = 256 if dtype == tl.float64 else 32
    if SCALED & (in_range(square, dtype) == 0):
        one = tl.zeros([1], tl.int64)
        k = tl.sum(exponents(rows + one, step, one == 0, dim, dtype, 1, BLOCK), axis=0)
        square = square_of(rows, step, dim, k, dtype, BLOCK)
    finite = square < float("inf")
    inverse = tl.where(square > 0, 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    tl.store(norms + 2 * row, tl.where(finite, inverse, float("nan")))
    tl.store(norms + 2 * row + 1, (k * STEP).to(tl.float64))
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(rows + column * step, mask=column < dim, other=0.0).to(dtype)
        x = tl.where(finite, x * power(k, dtype), 0.0)
        tl.store(units + row * dim + column, x, mask=column < dim)


@triton.jit(do_not_specialize_on_alignment=["norms"])
def unit_gradient_kernel(
    units, grad_units, norms, gradients, dim, dtype: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(g - u (u . g)) / |row| of u = unit / |unit|; 0 for a zero row, NaN where the norm is."""
    row = tl.program_id(0).to(tl.int64)
    inverse = tl.load(norms + 2 * row).to(tl.float64)
    shift = tl.load(norms + 2 * row + 1).to(tl.float64)
    STEP: tl.constexpr = 256 if dtype == tl.float64 else 32
    k = (shift / STEP).to(tl.int32)
    along = tl.full([], 0, tl.float64)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        at = row * dim + column
        x = tl.load(units + at, mask=column < dim, other=0.0).to(tl.float64)
        g = tl.load(grad_units + at, mask=column < dim, other=0.0).to(tl.float64)
        along += block_sum(x * g)
    along *= inverse * inverse
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        at = row * dim + column
        x = tl.load(units + at, mask=column < dim, other=0.0).to(tl.float64)
        g = tl.load(grad_units + at, mask=column < dim, other=0.0).to(tl.float64)
        gradient = (g - x * along) * inverse * power(k, dtype).to(tl.float64)
        gradient = tl.where(inverse == 0, 0.0, gradient)
        if gradients.dtype.element_ty != tl.float64:
            gradient = gradient.to(tl.float32)
        tl.store(gradients + at, gradient, mask=column < dim)
