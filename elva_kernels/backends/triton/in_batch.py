"""The in-batch ops' steps by the Triton kernels, imported when they are first launched."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elva_kernels.backends.gpu.in_batch import GpuSteps
from elva_kernels.backends.steps import Slopes, Units, part_of
from elva_kernels.backends.triton import INTERPRETED, launch
from elva_kernels.reference import compute_dtype


class Tile(NamedTuple):
    """Of a product: its sizes and the warps that work on it, the loads under way."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# By what tiles are multiplied in. `depth` decides the order of sums, so it is the same everywhere.
# Sized by what the compiler reports (tests/kernels/triton_resources.json), not yet timed on a GPU.
_TILES = {
    torch.bfloat16: Tile(128, 64, 32, 8, 3),
    torch.float16: Tile(128, 64, 32, 8, 3),
    torch.float32: Tile(64, 64, 16, 8, 2),
    torch.float64: Tile(32, 32, 32, 4, 1),
}
BLOCK = 128  # scores, or columns of an embedding, at a time
AT_ONCE = 8  # positives, after the first, counted in a pass over a row of scores
_COLUMNS = 128  # of scores in a program that walks over all rows


def multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    inner: Tensor | None = None,
    outer: tuple[Tensor, Tensor] | None = None,
    add: bool = False,
) -> None:
    """The first columns of out [m, n or more] = a [m, k] b [k, n], or += it.

    `inner`: norms [k, 2] whose first column scales a's columns; `outer`: of out's rows and columns.
    """
    from elva_kernels.backends.triton.kernels import matrix

    (m, k), n = a.shape, b.shape[1]
    if m == 0 or n == 0:
        return
    operand = product_operand(a.dtype, b.dtype)
    tile = tile_of(operand)
    rows, columns = (None, None) if outer is None else outer
    with launch.on(out.device):
        matrix.product_kernel[(-(-m // tile.rows) * -(-n // tile.columns),)](
            a,
            b,
            out,
            inner,
            rows,
            columns,
            m,
            n,
            k,
            *a.stride(),
            *b.stride(),
            out.stride(0),
            ADD=add,
            **product_constants(a.dtype, b.dtype, inner is not None),
            **options(launch.architecture_of(out.device), tile),
        )


def product_operand(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """What tiles are multiplied in: rows as they are; slopes and float16 rows in float32."""
    if a == b:
        return a
    return b if b == torch.bfloat16 else a


def tile_of(operand: torch.dtype) -> Tile:
    return Tile(32, 32, 64, 4, 1) if INTERPRETED else _TILES[operand]


def product_constants(a: torch.dtype, b: torch.dtype, scaled: bool) -> dict[str, Any]:
    """The constants of `matrix.product_kernel`."""
    operand = product_operand(a, b)
    halves = scaled and operand == torch.bfloat16
    outer = operand == torch.float64 and not INTERPRETED
    if INTERPRETED and operand.itemsize == 2:  # it multiplies bfloat16 wrongly
        operand, halves = torch.float32, False
    tile = tile_of(operand)
    return {
        "OUTER": outer,
        "HALVES": halves,
        "operand": launch.triton_type(operand),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
    }


def options(architecture: str, tile: Tile | None = None) -> dict[str, Any]:
    """As the compiler takes them: of a product in tiles, or of a kernel whose sums are not fused.

    NVIDIA's compiler, left to itself, spills to fit one more program.
    """
    capped = {} if architecture == "hip" else {"maxnreg": 255}
    if tile is None:
        warps = 1 if architecture == "hip" else 4  # with more, AMD's compiler spills
        return {"num_warps": warps, "enable_fp_fusion": False} | capped
    sizes = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return sizes | {"enable_fp_fusion": True} | capped


def units_of(rows: Tensor) -> Units:
    """As `Steps.units`."""
    from elva_kernels.backends.triton.kernels import rows as kernels

    units = launch.empty(rows.shape, rows.dtype, rows.device)
    norms = launch.empty((len(rows), 2), torch.float64, rows.device)
    if len(rows) > 0:
        with launch.on(rows.device):
            kernels.units_kernel[(len(rows),)](
                rows,
                units,
                norms,
                rows.shape[1],
                *rows.stride(),
                SCALED=rows.dtype != torch.float16,
                dtype=launch.triton_type(compute_dtype(rows.dtype)),
                BLOCK=BLOCK,
                **options(launch.architecture_of(rows.device)),
            )
    return Units(units, norms, None)


class TritonSteps(GpuSteps):
    """Rows stay in their dtype; slopes times bfloat16 rows are multiplied in halves."""

    def units(self, rows: Tensor) -> Units:
        return units_of(rows)

    def multiply_rows(self, query: Units, scores: Tensor) -> None:
        outer = (query.norm, self.candidates.norm)
        multiply(query.rows, self.candidates.rows.T, scores, outer=outer)

    def score_rows(self, scores: Tensor, rows: slice) -> None:
        from elva_kernels.backends.triton.kernels import in_batch as kernels

        target = self.batch.target[rows]
        candidate, first, last = self.skipped or (None, None, None)
        segments = 0 if first is None else first.shape[1]
        with launch.on(self.device):
            kernels.score_rows_kernel[(len(scores),)](
                scores,
                self.query.norm[rows],
                self.candidates.norm,
                target,
                candidate,
                None if first is None else first[rows],
                None if last is None else last[rows],
                math.inf if self.batch.max_score is None else self.batch.max_score,
                self.n_greater[rows],
                self.n_equal[rows],
                self.target_score[rows],
                self.hardest_score[rows],
                self.hardest_index[rows],
                self.total[rows],
                self.moment[rows],
                self.temperature,
                len(self.candidates.rows),
                self.width,
                target.shape[1],
                segments,
                ONE=target.shape[1] == 1 and candidate is None,
                AT_ONCE=AT_ONCE,
                BLOCK=BLOCK,
                **options(launch.architecture_of(self.device)),
            )
        self.keep_best(scores, rows)

    def column_sums(self, scores: Tensor, rows: slice) -> None:
        from elva_kernels.backends.triton.kernels import in_batch as kernels

        with launch.on(self.device):
            kernels.column_sums_kernel[(-(-self.width // _COLUMNS),)](
                scores,
                *self.columns,
                self.temperature,
                len(scores),
                self.width,
                BLOCK=_COLUMNS,
                **options(launch.architecture_of(self.device)),
            )

    def slope_rows(self, scores: Tensor, slopes: Slopes, rows: slice) -> Tensor:
        from elva_kernels.backends.triton.kernels import in_batch as kernels

        with launch.on(self.device):
            kernels.slope_rows_kernel[(len(scores) * -(-self.width // BLOCK),)](
                scores,
                *slopes,
                self.temperature,
                self.width,
                slopes.target.shape[1],
                ONE=slopes.target.shape[1] == 1,
                BLOCK=BLOCK,
                **options(launch.architecture_of(self.device)),
            )
        return scores

    def add_gradients(self, slopes: Tensor, rows: slice) -> None:
        query, candidates = part_of(self.query, rows), self.candidates
        if not self.grad_units:
            self.grad_units = [
                self.empty(x.rows.shape, self.dtype) if wanted else None
                for x, wanted in zip((self.query, candidates), self.wrt, strict=True)
            ]
        slopes = slopes[:, : len(candidates.rows)]
        of_query, of_candidates = self.grad_units
        if of_query is not None:
            multiply(slopes, candidates.rows, of_query[rows], inner=candidates.norm)
        if of_candidates is not None:
            multiply(slopes.T, query.rows, of_candidates, inner=query.norm, add=rows.start > 0)

    def gradient(self, units: Units, grad_unit: Tensor, dtype: torch.dtype) -> Tensor:
        from elva_kernels.backends.triton.kernels import rows as kernels

        gradient = self.empty(units.rows.shape, dtype)
        if len(gradient) > 0:
            with launch.on(self.device):
                kernels.unit_gradient_kernel[(len(gradient),)](
                    units.rows,
                    grad_unit,
                    units.norm,
                    gradient,
                    units.rows.shape[1],
                    dtype=launch.triton_type(self.dtype),
                    BLOCK=BLOCK,
                    **options(launch.architecture_of(self.device)),
                )
        return gradient

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return launch.empty(shape, dtype, self.device)
