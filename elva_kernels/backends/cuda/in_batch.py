"""The in-batch ops' steps by the CUDA kernels, with torch's matrix products."""

import functools
import math

import torch
from torch import Tensor

from elva_kernels.backends.boundary import DTYPE_CODES, operand, pointer
from elva_kernels.backends.cuda import launch
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
            pointer(self.batch.candidate_ids),
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
            pointer(slopes.column_peak),
            pointer(slopes.column_factor),
        )

    def add_gradients(self, slopes: Tensor, rows: slice) -> None:
        query, candidates = part_of(self.query, rows), self.candidates
        if not self.grad_units:
            both = (self.query, candidates)
            self.grad_units = [self.empty(x.rows.shape, self.dtype) for x in both]
        slopes = slopes[:, : len(candidates.rows)]
        multiply_units(slopes, candidates, self.grad_units[0][rows])
        multiply_units(slopes.T, query, self.grad_units[1], add=rows.start > 0)

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
    scaled = slopes * units.norm[:, 0].nan_to_num(0.0).float()
    if units.rows.dtype != torch.bfloat16:  # float16 has no room for small slopes
        multiply(scaled, units.rows.float(), out, add=add)
        return
    high = scaled.bfloat16()
    multiply(high, units.rows, out, add=add)
    multiply((scaled - high.float()).bfloat16(), units.rows, out, add=True)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a b in float32, or += it."""
    if a.shape[1] == 0:
        if not add:
            out.zero_()
    elif add:
        out += product(a, b)
    else:
        out.copy_(product(a, b))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, whatever autocast and torch's switches of precision say."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype != torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32)
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        try:
            return torch.mm(a, b)
        finally:
            matmul.fp32_precision = before
