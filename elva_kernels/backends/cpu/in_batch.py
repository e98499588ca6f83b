"""The in-batch ops' steps on the CPU."""

import math
from typing import Any

import torch
from torch import Tensor

from elva_kernels.backends.boundary import DTYPE_CODES, empty_kept, module, operand, pointer
from elva_kernels.backends.steps import Slopes, Steps, Sums, Terms, Units, part_of
from elva_kernels.reference import compute_dtype

# What slopes that are rounded to bfloat16 may add to a gradient on unit rows, of the 2e-6 that it
# may be off where a query weighs 1 or less; beyond it they are split in two halves.
_ALLOWED = 1.8e-6


class CpuSteps(Steps):
    """Where the CPU multiplies bfloat16, rows of it stay as they are, and slopes become halves."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.allowed: list[float] = []  # of the gradients on query and candidates: see `_allowed`

    def units(self, rows: Tensor) -> Units:
        raw = rows.dtype == torch.bfloat16 and module().multiplies_bf16()
        unit = empty_kept(rows.shape, rows.dtype if raw else compute_dtype(rows.dtype))
        norm = torch.empty(len(rows), 2, dtype=torch.float64)
        module().unit_rows(
            DTYPE_CODES[rows.dtype],
            DTYPE_CODES[unit.dtype],
            torch.get_num_threads(),
            *rows.shape,
            operand(rows),
            unit.data_ptr(),
            norm.data_ptr(),
        )
        return Units(unit, norm, norm[:, 0].nan_to_num(0.0).float() if raw else None)

    def multiply_rows(self, query: Units, scores: Tensor) -> None:
        _multiply(query.rows, self.candidates.rows.T, scores)

    def score_rows(self, scores: Tensor, rows: slice) -> None:
        max_score = math.inf if self.batch.max_score is None else self.batch.max_score
        module().score_rows(
            DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
            len(scores),
            len(self.candidates.rows),
            self.width,
            scores.data_ptr(),
            self.exclusion.data_ptr(),
            pointer(self.scale),
            self.query.norm[rows].data_ptr(),
            self.batch.target[rows].data_ptr(),
            self.batch.target.shape[1],
            *self._skipped(rows),
            max_score,
            self._inverse_temperature(),
            self.k,
            self.n_greater[rows].data_ptr(),
            self.n_equal[rows].data_ptr(),
            self.target_score[rows].data_ptr(),
            self.hardest_score[rows].data_ptr(),
            self.hardest_index[rows].data_ptr(),
            self.topk_scores[rows].data_ptr(),
            self.topk_index[rows].data_ptr(),
            self.total[rows].data_ptr(),
            self.moment[rows].data_ptr(),
        )

    def column_sums(self, scores: Tensor) -> None:
        module().column_sums(
            DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
            len(scores),
            self.width,
            scores.data_ptr(),
            self._inverse_temperature(),
            *(x.data_ptr() for x in self.columns),
        )

    def set_terms(self, terms: Terms, rows: slice, sums: Sums, at: Tensor | None = None) -> None:
        target_score = self.target_score[rows]
        module().info_nce_terms(
            DTYPE_CODES[self.dtype],
            target_score.numel(),
            target_score.data_ptr(),
            pointer(at),
            *(x.data_ptr() for x in sums),
            1 / self._inverse_temperature(),
            *(x[rows].data_ptr() for x in terms),
        )

    def slope_rows(self, scores: Tensor, slopes: Slopes) -> None:
        if self.scale is not None:
            # The largest slope of a row: rounded, it would decide the error; see `add_targets`.
            slopes = slopes._replace(target_slope=torch.zeros_like(slopes.target_slope))
        module().slope_rows(
            DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
            len(scores),
            self.width,
            scores.data_ptr(),
            *(pointer(x) for x in slopes[:4]),
            slopes.target.shape[1],
            *(pointer(x) for x in slopes[4:]),
            self._inverse_temperature(),
        )

    def add_gradients(self, slopes: Tensor, rows: slice) -> None:
        if not self.grad_units:
            both = (self.query, self.candidates)
            for x, other, wanted in zip(both, both[::-1], self.wrt, strict=True):
                self.grad_units.append(self.empty(x.rows.shape, self.dtype) if wanted else None)
                self.allowed.append(_allowed(other) if wanted else 0.0)
        slopes = slopes[:, : len(self.candidates.rows)]
        of_query, of_candidates = self.grad_units
        if of_query is not None:
            _multiply_units(slopes, self.candidates, of_query[rows], self.allowed[0])
        if of_candidates is not None:
            query = part_of(self.query, rows)
            allowed = self.allowed[1] * math.sqrt(len(query.rows) / len(self.query.rows))
            _multiply_units(slopes.T, query, of_candidates, allowed, add=rows.start > 0)

    def add_targets(self) -> None:
        query, candidates = self.query, self.candidates
        if query.scale is None or candidates.scale is None:
            return
        if len(query.rows) == 0 or len(candidates.rows) == 0:
            return
        target = self.batch.target.clamp(min=0)
        row = self.row_of_pairs(len(target))
        of_query, of_candidates = self.grad_units
        if of_query is not None:
            factor = self.target_slope * candidates.scale[target]
            self._add_rows(candidates, target, row, factor, of_query)
        if of_candidates is not None:
            factor = self.target_slope * query.scale.unsqueeze(1)
            self._add_rows(query, row, target, factor, of_candidates)

    def gradient(self, units: Units, grad_unit: Tensor, dtype: torch.dtype) -> Tensor:
        grad = self.empty(units.rows.shape, dtype)
        module().unit_gradient(
            DTYPE_CODES[dtype],
            DTYPE_CODES[units.rows.dtype],
            torch.get_num_threads(),
            *units.rows.shape,
            units.rows.data_ptr(),
            grad_unit.data_ptr(),
            units.norm.data_ptr(),
            grad.data_ptr(),
        )
        return grad

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return empty_kept(torch.Size(shape), dtype)

    def _skipped(self, rows: slice) -> tuple[int, int, int, int]:
        """As score_rows takes it: list, segments' ends, their number a query."""
        if self.skipped is None:
            return 0, 0, 0, 0
        candidate, first, last = self.skipped
        return (
            candidate.data_ptr(),
            first[rows].data_ptr(),
            last[rows].data_ptr(),
            first.shape[1],
        )

    def _inverse_temperature(self) -> float:
        """1 / T; NaN where there is none above 0."""
        return math.nan if self.temperature is None else 1 / float(self.temperature)

    def _add_rows(
        self,
        units: Units,
        source: Tensor | None,
        into: Tensor | None,
        factor: Tensor,
        out: Tensor,
    ) -> None:
        """out[into[i]] += factor[i] * row source[i]; None: i."""
        module().add_rows(
            torch.get_num_threads(),
            factor.numel(),
            units.rows.shape[1],
            pointer(source),
            pointer(into),
            factor.data_ptr(),
            units.rows.data_ptr(),
            out.data_ptr(),
            len(out),
        )


def _allowed(units: Units) -> float:
    """How long a row of errors of slopes may be, for an element of their product with `units`.

    By Cauchy and Schwarz: an element errs by no more than that times its column's norm.
    """
    if units.scale is None:
        return 0.0
    norm: float = module().column_norm(
        torch.get_num_threads(),
        *units.rows.shape,
        units.rows.data_ptr(),
        units.scale.data_ptr(),
    )
    return _ALLOWED / norm if norm > 0 else 0.0


def _multiply_units(
    a: Tensor, units: Units, out: Tensor, allowed: float, *, add: bool = False
) -> None:
    """out [m, D] = a [m, R] and the unit rows [R, D], or += it."""
    norm = None if units.scale is None else torch.where(units.scale > 0, 1 / units.scale, 0.0)
    _multiply(a, units.rows, out, add=add, scale=units.scale, norm=norm, allowed=allowed)


def _multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    add: bool = False,
    scale: Tensor | None = None,
    norm: Tensor | None = None,
    allowed: float = 0.0,
) -> None:
    """The first columns of out [m, n or more] = a [m, k] b [k, n], or += it.

    Where float32 meets bfloat16, out = a diag(scale) b, with norm = 1 / scale.
    """
    if a.shape[1] == 0:  # a sum of nothing
        if not add:
            out.zero_()
        return
    module().matrix_product(
        DTYPE_CODES[a.dtype],
        DTYPE_CODES[b.dtype],
        torch.get_num_threads(),
        a.shape[0],
        b.shape[1],
        a.shape[1],
        a.data_ptr(),
        *a.stride(),
        b.data_ptr(),
        *b.stride(),
        out.data_ptr(),
        out.stride(0),
        add,
        pointer(scale),
        pointer(norm),
        allowed,
    )
