"""The in-batch ops' steps on the CPU."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from elva_kernels.backends.boundary import DTYPE_CODES, empty_kept, module, operand, pointer
from elva_kernels.backends.launcher import Tensors
from elva_kernels.backends.steps import (
    Slopes,
    Steps,
    Sums,
    Terms,
    Units,
    part_of,
    row_width,
    some,
)
from elva_kernels.reference import Weights, compute_dtype

_SMALL = 2**17  # elements: of 8 bytes a MB, from where memory is worth keeping
# What slopes that are rounded to bfloat16 may add to a gradient on unit rows, of the 2e-6 that it
# may be off where a query weighs 1 or less; beyond it they are split in two halves.
_ALLOWED = 1.8e-6


class CpuSteps(Steps):
    """Where the CPU multiplies bfloat16, rows of it stay as they are, and slopes become halves."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.allowed: list[float] = []  # of the gradients on query and candidates: see `_allowed`
        self.pair_weight: Tensor | None = None  # [B, P] `upstream`, once there are slopes

    def new_statistics(self) -> None:
        super().new_statistics()
        self.rank = torch.empty_like(self.n_greater)

    def units(self, rows: Tensor) -> Units:
        raw = rows.dtype == torch.bfloat16 and module().multiplies_bf16()
        unit = empty_kept(rows.shape, rows.dtype if raw else compute_dtype(rows.dtype))
        norm = torch.empty(len(rows), 2, dtype=torch.float64)
        width = row_width(len(rows), torch.float32)
        scale = torch.empty(width, dtype=torch.float32) if raw else None
        module().unit_rows(
            DTYPE_CODES[rows.dtype],
            DTYPE_CODES[unit.dtype],
            torch.get_num_threads(),
            *rows.shape,
            operand(rows),
            unit.data_ptr(),
            norm.data_ptr(),
            width,
            pointer(scale),
        )
        return Units(unit, norm, scale)

    def leave_out_unpaired(self, target: Tensor) -> None:
        super().leave_out_unpaired(target)
        if self.unpaired is not None and not self.unpaired.any():
            self.unpaired = None

    def multiply_rows(self, query: Units, scores: Tensor) -> None:
        _multiply(query.rows, self.candidates.rows.T, scores)

    @functools.cached_property
    def exclusion(self) -> Tensor:
        """[width] 0; -inf of candidates that are not finite, and of padding."""
        exclusion = self.empty((self.width,), self.dtype)
        module().exclusion(
            DTYPE_CODES[self.dtype],
            len(self.candidates.rows),
            self.width,
            self.candidates.norm.data_ptr(),
            exclusion.data_ptr(),
        )
        return exclusion

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
            pointer(self.candidates.scale),
            _at(self.query.norm, rows),
            _at(self.batch.target, rows),
            self.batch.target.shape[1],
            *self._skipped(rows),
            max_score,
            self.inverse_temperature,
            self.k,
            _at(self.rank, rows),
            _at(self.n_greater, rows),
            _at(self.n_equal, rows),
            _at(self.target_score, rows),
            _at(self.hardest_score, rows),
            _at(self.hardest_index, rows),
            _at(self.topk_scores, rows),
            _at(self.topk_index, rows),
            _at(self.total, rows),
            _at(self.moment, rows),
        )

    def column_sums(self, scores: Tensor, rows: slice) -> None:
        module().column_sums(
            DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
            len(scores),
            self.width,
            scores.data_ptr(),
            self.inverse_temperature,
            *(x.data_ptr() for x in self.columns),
        )

    def set_terms(self, terms: Terms, rows: slice, sums: Sums, at: Tensor | None = None) -> None:
        target_score = some(self.target_score, rows)
        module().info_nce_terms(
            DTYPE_CODES[self.dtype],
            target_score.numel(),
            target_score.data_ptr(),
            pointer(at),
            *(x.data_ptr() for x in sums),
            self.positive_temperature,
            *(_at(x, rows) for x in terms),
        )

    def exact(self, temperature: Tensor) -> Tensor:
        return temperature.double()  # see `inverse_temperature`

    def ranks(self) -> Tensor:
        return self.rank

    def logsumexp(self) -> Tensor | None:
        if self.temperature is None:
            return None
        found = torch.empty_like(self.hardest_score)
        module().logsumexp(
            DTYPE_CODES[self.dtype],
            *self.target_score.shape,
            self.target_score.data_ptr(),
            self.hardest_score.data_ptr(),
            self.total.data_ptr(),
            self.positive_temperature,
            found.data_ptr(),
        )
        return found

    def slopes(self, rows: slice, weight: Tensor, symmetric: bool) -> Slopes:
        if self.pair_weight is None:
            self.pair_weight = torch.empty_like(self.row_terms.loss)
        target, target_slope = some(self.batch.target, rows), some(self.target_slope, rows)
        row_factor, row_peak = (self.empty((len(target),), self.dtype) for _ in range(2))
        exact = some(weight, rows).double().contiguous()
        module().info_nce_factors(
            DTYPE_CODES[self.dtype],
            *target.shape,
            target.data_ptr(),
            _at(self.target_score, rows),
            exact.data_ptr(),
            0.5 if symmetric else 1.0,
            _at(self.row_terms.share, rows),
            _at(self.row_terms.others, rows),
            _at(self.column_terms.others, rows) if symmetric else 0,
            _at(self.hardest_score, rows),
            self.positive_temperature,
            _at(self.pair_weight, rows),
            target_slope.data_ptr(),
            row_factor.data_ptr(),
            row_peak.data_ptr(),
        )
        columns: tuple[Tensor | None, Tensor | None] = (None, None)
        if symmetric:
            columns = self.column_slopes(weight)
        return Slopes(row_peak, row_factor, target_slope, target, *columns)

    def temperature_gradient(self, weight: Tensor, symmetric: bool) -> Tensor:
        if symmetric or self.pair_weight is None:
            return super().temperature_gradient(weight, symmetric)
        return torch.dot(self.pair_weight.view(-1), self.row_terms.grad_temperature.view(-1))

    def slope_rows(self, scores: Tensor, slopes: Slopes, rows: slice) -> Tensor:
        # The largest slope of a row: rounded, it would decide the error; see `add_targets`.
        rounded = self.candidates.scale is not None
        module().slope_rows(
            DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
            len(scores),
            self.width,
            scores.data_ptr(),
            slopes.row_peak.data_ptr(),
            slopes.row_factor.data_ptr(),
            0 if rounded else slopes.target_slope.data_ptr(),
            slopes.target.data_ptr(),
            slopes.target.shape[1],
            pointer(slopes.column_peak),
            pointer(slopes.column_factor),
            self.inverse_temperature,
        )
        return scores

    def add_gradients(self, slopes: Tensor, rows: slice) -> None:
        if not self.grad_units:
            both = (self.query, self.candidates)
            for x, other, wanted in zip(both, both[::-1], self.wrt, strict=True):
                self.grad_units.append(self.empty(x.rows.shape, self.dtype) if wanted else None)
                self.allowed.append(_allowed(other) if wanted else 0.0)
        slopes = slopes[:, : len(self.candidates.rows)]
        of_query, of_candidates = self.grad_units
        if of_query is not None:
            _multiply_units(slopes, self.candidates, some(of_query, rows), self.allowed[0])
        if of_candidates is not None:
            query = part_of(self.query, rows)
            allowed = self.allowed[1] * math.sqrt(len(query.rows) / len(self.query.rows))
            _multiply_units(slopes.T, query, of_candidates, allowed, add=rows.start > 0)

    @staticmethod
    def reward_of_head(scores: Tensor, rank: Tensor, head: int, weights: Weights) -> Tensors:
        values = tuple(scores.new_empty(len(scores)) for _ in range(3))
        _head_reward(scores, rank, head, weights, values=values)
        return values

    @staticmethod
    def slopes_of_head(
        scores: Tensor, rank: Tensor, head: int, grad_reward: Tensor, weights: Weights
    ) -> Tensor:
        slopes = torch.empty_like(scores, memory_format=torch.contiguous_format)
        upstream = grad_reward.to(scores.dtype).contiguous()
        _head_reward(scores, rank, head, weights, upstream=upstream, slopes=slopes)
        return slopes

    def add_targets(self) -> None:
        if self.query.scale is None or not self.grad_units:
            return
        of_query, of_candidates = self.grad_units
        if of_query is not None:
            self._add_targets(self.candidates, False, of_query)
        if of_candidates is not None:
            self._add_targets(self.query, True, of_candidates)

    def _add_targets(self, units: Units, into_targets: bool, out: Tensor) -> None:
        module().add_rows(
            torch.get_num_threads(),
            self.target_slope.numel(),
            units.rows.shape[1],
            self.target_slope.shape[1],
            self.batch.target.data_ptr(),
            into_targets,
            self.target_slope.data_ptr(),
            pointer(units.scale),
            units.rows.data_ptr(),
            out.data_ptr(),
            len(out),
        )

    def spread(self, index: Tensor, slopes: Tensor) -> Tensor:
        rows, columns = index.shape
        matrix = self.empty((rows, self.width), slopes.dtype)
        index, slopes = index.contiguous(), slopes.contiguous()
        module().spread_rows(
            DTYPE_CODES[slopes.dtype],
            torch.get_num_threads(),
            rows,
            columns,
            self.width,
            index.data_ptr(),
            slopes.data_ptr(),
            matrix.data_ptr(),
        )
        return matrix

    def judge_pairs(self) -> None:
        """`spoil_queries` does."""

    def spoil_queries(self) -> None:
        module().spoil(
            *self.batch.target.shape,
            len(self.candidates.rows),
            self.batch.target.data_ptr(),
            self.candidates.norm.data_ptr(),
            self.query.norm.data_ptr(),
        )

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
        if math.prod(shape) < _SMALL:
            return torch.empty(shape, dtype=dtype)
        return empty_kept(torch.Size(shape), dtype)

    def _skipped(self, rows: slice) -> tuple[int, int, int, int]:
        """As score_rows takes it: list, segments' ends, their number a query."""
        if self.skipped is None:
            return 0, 0, 0, 0
        candidate, first, last = self.skipped
        return (
            candidate.data_ptr(),
            _at(first, rows),
            _at(last, rows),
            first.shape[1],
        )

    @functools.cached_property
    def positive_temperature(self) -> float:
        """NaN where there is none above 0."""
        temperature = math.nan if self.temperature is None else float(self.temperature)
        return temperature if temperature > 0 else math.nan

    @property
    def inverse_temperature(self) -> float:
        return 1 / self.positive_temperature


def _at(x: Tensor, rows: slice) -> int:
    """The address of x[rows], dense."""
    first = rows.start or 0
    return x.data_ptr() + first * x.stride(0) * x.element_size() if first else x.data_ptr()


def _head_reward(
    scores: Tensor,
    rank: Tensor,
    head: int,
    weights: Weights,
    *,
    values: Tensors | None = None,
    upstream: Tensor | None = None,
    slopes: Tensor | None = None,
) -> None:
    """Fills in the three values, or the slopes."""
    scores, rank = scores.contiguous(), rank.contiguous()
    rows, positives = rank.shape
    module().head_reward(
        DTYPE_CODES[scores.dtype],
        torch.get_num_threads(),
        rows,
        positives,
        scores.shape[1] - positives,
        head,
        tuple(weights),
        scores.data_ptr(),
        rank.data_ptr(),
        *((0, 0, 0) if values is None else (x.data_ptr() for x in values)),
        pointer(upstream),
        pointer(slopes),
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
    _multiply(a, units.rows, out, add=add, scale=units.scale, allowed=allowed)


def _multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    add: bool = False,
    scale: Tensor | None = None,
    allowed: float = 0.0,
) -> None:
    """The first columns of out [m, n or more] = a [m, k] b [k, n], or += it.

    Where float32 meets bfloat16, out = a diag(scale) b.
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
        allowed,
    )
