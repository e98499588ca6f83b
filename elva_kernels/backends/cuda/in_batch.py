"""The in-batch ops' steps by the CUDA kernels; torch multiplies rows in half precision."""

import functools
import math

import torch
from torch import Tensor

from elva_kernels.backends.boundary import DTYPE_CODES, operand, pointer
from elva_kernels.backends.cuda import launch, select
from elva_kernels.backends.gpu.in_batch import GpuSteps
from elva_kernels.backends.steps import Slopes, Units, part_of

_OP = "in-batch op"  # for messages


class CudaSteps(GpuSteps):
    """Rows stay in their dtype; slopes times bfloat16 rows are multiplied in two halves."""

    @functools.cached_property
    def inverse(self) -> Tensor:
        """The candidates' inverse norms, one beside the other."""
        return self.candidates.norm[:, 0].contiguous()

    def units(self, rows: Tensor) -> Units:
        unit = rows.new_empty(rows.shape)
        norm = rows.new_empty((len(rows), 2), dtype=torch.float64)
        launch.call(
            _OP,
            launch.module().cuda_unit_rows,
            DTYPE_CODES[rows.dtype],
            *launch.place(rows),
            *rows.shape,
            operand(rows),
            unit.data_ptr(),
            norm.data_ptr(),
        )
        return Units(unit, norm, None)

    def multiply_rows(self, query: Units, scores: Tensor) -> None:
        multiply(query.rows, self.candidates.rows.T, scores[:, : len(self.candidates.rows)])

    def score_rows(self, scores: Tensor, rows: slice) -> None:
        launch.call(
            _OP,
            launch.module().cuda_score_rows,
            *launch.place(scores),
            len(scores),
            len(self.candidates.rows),
            self.width,
            scores.data_ptr(),
            self.query.norm[rows].data_ptr(),
            self.inverse.data_ptr(),
            self.batch.target[rows].data_ptr(),
            self.batch.target.shape[1],
            *self.skipped_operands(rows),
            math.inf if self.batch.max_score is None else self.batch.max_score,
            pointer(self.temperature),
            self.n_greater[rows].data_ptr(),
            self.n_equal[rows].data_ptr(),
            self.target_score[rows].data_ptr(),
            self.hardest_score[rows].data_ptr(),
            self.hardest_index[rows].data_ptr(),
            self.total[rows].data_ptr(),
            self.moment[rows].data_ptr(),
        )
        self.keep_best(scores, rows)

    def keep_best(self, scores: Tensor, rows: slice) -> None:
        if not select.takes(self.k):
            super().keep_best(scores, rows)
            return
        best = select.Best(_OP, self.topk_scores[rows], self.topk_index[rows], finite=True)
        best.add(scores[:, : len(self.candidates.norm)])

    def skipped_operands(self, rows: slice) -> tuple[int, int, int, int]:
        """What `cuda_score_rows` takes for the candidates that some queries skip."""
        if self.skipped is None:
            return 0, 0, 0, 0
        index, first, last = self.skipped
        segments = (first[rows].data_ptr(), last[rows].data_ptr(), first.shape[1])
        return index.data_ptr(), *segments

    def column_sums(self, scores: Tensor) -> None:
        size = launch.module().cuda_column_scratch_bytes(*scores.shape)
        scratch = self.empty((size,), torch.uint8)
        launch.call(
            _OP,
            launch.module().cuda_column_sums,
            *launch.place(scores),
            len(scores),
            self.width,
            scores.data_ptr(),
            pointer(self.temperature),
            *(x.data_ptr() for x in self.columns),
            scratch.data_ptr(),
        )

    def slope_rows(self, scores: Tensor, slopes: Slopes) -> None:
        launch.call(
            _OP,
            launch.module().cuda_slope_rows,
            *launch.place(scores),
            len(scores),
            self.width,
            scores.data_ptr(),
            pointer(self.temperature),
            slopes.row_peak.data_ptr(),
            slopes.row_factor.data_ptr(),
            slopes.target_slope.data_ptr(),
            slopes.target.data_ptr(),
            slopes.target.shape[1],
            pointer(slopes.column_peak),
            pointer(slopes.column_factor),
        )

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
            multiply_units(slopes, candidates, of_query[rows])
        if of_candidates is not None:
            multiply_units(slopes.T, query, of_candidates, add=rows.start > 0)

    def gradient(self, units: Units, grad_unit: Tensor, dtype: torch.dtype) -> Tensor:
        rows = units.rows if units.rows.dtype == dtype else units.rows.to(dtype)
        gradient = self.empty(rows.shape, dtype)
        launch.call(
            _OP,
            launch.module().cuda_unit_gradient,
            DTYPE_CODES[dtype],
            *launch.place(rows),
            *rows.shape,
            rows.data_ptr(),
            grad_unit.data_ptr(),
            units.norm.data_ptr(),
            gradient.data_ptr(),
        )
        return gradient


def multiply_units(slopes: Tensor, units: Units, out: Tensor, *, add: bool = False) -> None:
    """out [m, D] = slopes [m, R] and the unit rows [R, D], or += it."""
    inverse = units.norm[:, 0].nan_to_num(0.0).float()
    if units.rows.dtype != torch.bfloat16:  # float16 has no room for small slopes
        multiply(slopes, units.rows, out, scale=inverse, add=add)
        return
    scaled = slopes * inverse
    high = scaled.bfloat16()
    multiply(high, units.rows, out, add=add)
    multiply((scaled - high.float()).bfloat16(), units.rows, out, add=True)


def multiply(
    a: Tensor, b: Tensor, out: Tensor, *, scale: Tensor | None = None, add: bool = False
) -> None:
    """out = a b in float32, or += it.

    Args:
        a: [m, k]; in float32 where b is in float32 or float16, else in half precision as b is.
        b: [k, n].
        out: float32 [m, n], dense rows.
        scale: float32 [k], what the columns of a float32 `a` are first multiplied by.
    """
    if a.dtype == torch.float32:
        launch.call(
            _OP,
            launch.module().cuda_matrix_product,
            DTYPE_CODES[b.dtype],
            *launch.place(out),
            len(a),
            b.shape[1],
            len(b),
            operand(a),
            pointer(scale),
            operand(b),
            out.data_ptr(),
            out.stride(0),
            add,
        )
    elif add:
        out += half_product(a, b)
    else:
        out.copy_(half_product(a, b))


def half_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, of elements in half precision, whatever autocast says."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b, out_dtype=torch.float32)
