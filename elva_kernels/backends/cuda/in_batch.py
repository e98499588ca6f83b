"""The in-batch ops' steps by the CUDA kernels; torch multiplies rows in half precision.

Slopes of half-precision rows are kept in float16, once for both gradients. Those of a query's
positives are not among them, and not rounded: they are added where a gradient is written.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from elva_kernels.backends.boundary import DTYPE_CODES, pointer
from elva_kernels.backends.cuda import launch
from elva_kernels.backends.cuda.products import multiply
from elva_kernels.backends.cuda.scores import OP, CudaScores, address
from elva_kernels.backends.launcher import Tensors
from elva_kernels.backends.segments import occurrences
from elva_kernels.backends.steps import Slopes, Units, part_of, slopes_of, some
from elva_kernels.reference import Weights

# Scores up to which slopes are held in two halves, since a launch takes as long as its product.
# Beyond, a slope errs by 2^-12 of itself. Ours.
_TWO_HALVES = 2**22


class CudaSteps(CudaScores):
    """The slopes of a call, and its gradients."""

    def __init__(self, query: Tensor, *arguments: Any, **named: Any) -> None:
        super().__init__(query, *arguments, **named)
        self.halves = 0
        if query.dtype != torch.float32:
            self.halves = 1 if len(query) * self.width > _TWO_HALVES else 2
        self.pair_weight: Tensor | None = None  # [B, P] `upstream`, once there are slopes
        self.both_slopes: Slopes | None = None  # of all queries, where columns count too
        self.power: Tensor | None = None  # int32 [1], of two that slopes are kept times

    def slopes(self, rows: slice, weight: Tensor, symmetric: bool) -> Slopes:
        if not symmetric:
            return self.factors(rows, weight, symmetric)
        if self.both_slopes is None:  # all terms are known
            self.both_slopes = self.factors(slice(None), weight, symmetric)
        return slopes_of(self.both_slopes, rows)

    def factors(self, rows: slice, weight: Tensor, symmetric: bool) -> Slopes:
        """As `slopes`, computed anew."""
        weight = weight.double().contiguous()
        if self.pair_weight is None:
            self.pair_weight = torch.empty_like(self.row_terms.loss)
        target, target_slope = some(self.batch.target, rows), some(self.target_slope, rows)
        row_factor = self.empty((len(target),), torch.float32)
        part = 0.5 if symmetric else 1.0
        self.call(
            "cuda_info_nce_factors",
            *target.shape,
            target.data_ptr(),
            address(self.target_score, rows),
            address(weight, rows),
            part,
            address(self.row_terms.share, rows),
            address(self.row_terms.others, rows),
            address(self.column_terms.others, rows) if symmetric else 0,
            pointer(self.temperature),
            address(self.pair_weight, rows),
            target_slope.data_ptr(),
            row_factor.data_ptr(),
        )
        column_peak = column_factor = None
        if symmetric:
            column_peak = self.columns.peak
            column_factor = self.factor_of_columns(
                self.column_terms.share, self.pairs, self.pair_weight, self.temperature
            )
        if self.power is None:
            self.power = self.power_of(weight, part, self.temperature, column_factor)
        peak = some(self.hardest_score, rows)
        return Slopes(peak, row_factor, target_slope, target, column_peak, column_factor)

    @functools.cached_property
    def pairs(self) -> tuple[Tensor, Tensor] | None:
        """Each candidate's, as `occurrences` gives them; None where pair i is candidate i's."""
        if self.batch.diagonal:
            return None
        return occurrences(self.batch.target, len(self.candidates.rows))

    def column_factor(self, target: Tensor, share: Tensor) -> Tensor:
        share = share.contiguous()
        return self.factor_of_columns(share, occurrences(target, len(self.candidates.rows)))

    def factor_of_columns(
        self,
        share: Tensor,
        pairs: tuple[Tensor, Tensor] | None,
        upstream: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """[width] the sum over each candidate's pairs of share [B, P] times upstream over T."""
        factor = self.empty((self.width,), torch.float32)
        self.call(
            "cuda_column_factor",
            self.width,
            len(self.candidates.rows),
            share.numel(),
            *_pairs_operands(pairs),
            share.data_ptr(),
            pointer(upstream),
            pointer(temperature),
            factor.data_ptr(),
        )
        return factor

    def power_of(
        self, bound: Tensor, part: float, temperature: Tensor | None, column_factor: Tensor | None
    ) -> Tensor:
        """The power for slopes of rows up to `bound`, float64, times part over T."""
        power = self.empty((1,), torch.int32)
        self.call(
            "cuda_slope_power",
            bound.numel(),
            bound.data_ptr(),
            part,
            pointer(temperature),
            self.width,
            pointer(column_factor),
            power.data_ptr(),
        )
        return power

    def slope_rows(self, scores: Tensor, slopes: Slopes, rows: slice) -> Tensor:
        matrix = scores
        if self.halves == 1:  # in the place of the products
            matrix = scores.view(torch.float16)
        elif self.halves == 2:
            matrix = self.empty((2, *scores.shape), torch.float16)
        self.call(
            "cuda_slope_rows",
            len(scores),
            self.width,
            scores.data_ptr(),
            address(self.query.scale, rows),
            pointer(self.candidates.scale),
            self.max_score,
            pointer(self.temperature),
            slopes.row_peak.data_ptr(),
            slopes.row_factor.data_ptr(),
            pointer(slopes.column_peak),
            pointer(slopes.column_factor),
            pointer(self.power),
            self.halves,
            matrix.data_ptr(),
            matrix.stride(-2),
        )
        return matrix

    def gradients_by_slopes(
        self,
        slopes: Slopes,
        wrt: tuple[bool, bool],
        dtypes: tuple[torch.dtype, torch.dtype],
        held: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        self.power = self.power_of(slopes.row_factor.double(), 1.0, None, slopes.column_factor)
        return super().gradients_by_slopes(slopes, wrt, dtypes, held)

    def gradients_of_slopes(
        self, index: Tensor, slopes: Tensor, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> tuple[Tensor | None, Tensor | None]:
        positives = self.batch.target.shape[1]
        index, slopes = index.contiguous(), slopes.contiguous()
        self.target_slope = slopes[:, :positives].contiguous()
        if slopes.numel() > 0:
            largest = torch.linalg.vector_norm(slopes, math.inf, dtype=torch.float64)
            self.power = self.power_of(largest, 1.0, None, None)
        for rows in self.chunks:
            self.add_gradients(self.spread_slopes(index, slopes, rows), rows)
        return self.gradients(dtypes)

    def spread_slopes(self, index: Tensor, slopes: Tensor, rows: slice) -> Tensor:
        """As `slope_rows`, of slopes [B, P + h] on the candidates `index`, but the positives'."""
        count = len(some(index, rows))
        dtype = torch.float16 if self.halves else torch.float32
        matrix = self.empty((max(1, self.halves), count, self.width), dtype)
        self.call(
            "cuda_spread_rows",
            count,
            len(self.candidates.rows),
            self.width,
            index.shape[1],
            self.batch.target.shape[1],
            address(index, rows),
            address(slopes, rows),
            address(self.query.scale, rows),
            pointer(self.candidates.scale),
            pointer(self.power),
            self.halves,
            matrix.data_ptr(),
            self.width,
        )
        return matrix

    def add_gradients(self, slopes: Tensor, rows: slice) -> None:
        query, candidates = part_of(self.query, rows), self.candidates
        if not self.grad_units:
            self.grad_units = [
                self.empty((*x.rows.shape,), torch.float32) if wanted else None
                for x, wanted in zip((self.query, candidates), self.wrt, strict=True)
            ]
        of_query, of_candidates = self.grad_units
        for half, part in enumerate(slopes if slopes.dim() == 3 else (slopes,)):
            factor = self.of_candidates(part)
            if of_query is not None:
                multiply(factor, candidates.rows, some(of_query, rows), add=half > 0)
            if of_candidates is not None:
                add = half > 0 or rows.start > 0
                multiply(factor.T, query.rows, of_candidates, add=add)

    def add_targets(self) -> None:
        """`gradients` does."""

    def gradients(
        self, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self.chunks:
            self.power = torch.zeros(1, dtype=torch.int32, device=self.device)
            self.grad_units = [
                torch.zeros(x.rows.shape, device=self.device) if wanted else None
                for x, wanted in zip((self.query, self.candidates), self.wrt, strict=True)
            ]
        of_query, of_candidates = self.grad_units
        grad_query = grad_candidates = None
        if of_query is not None:
            grad_query = self.gradient_of(
                self.query, self.candidates, self.batch.target, None, of_query, dtypes[0]
            )
        if of_candidates is not None:
            grad_candidates = self.gradient_of(
                self.candidates, self.query, None, self.pairs, of_candidates, dtypes[1]
            )
        return grad_query, grad_candidates

    def gradient_of(
        self,
        units: Units,
        others: Units,
        target: Tensor | None,
        pairs: tuple[Tensor, Tensor] | None,
        grad_unit: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """On the rows of one side, the slopes of pairs added: of queries with a `target`."""
        gradient = self.empty((*units.rows.shape,), dtype)
        launch.call(
            OP,
            launch.module().cuda_unit_gradient,
            DTYPE_CODES[dtype],
            *self.place,
            units.rows.dtype == torch.float16,
            *units.rows.shape,
            units.rows.data_ptr(),
            pointer(units.scale),
            units.norm.data_ptr(),
            grad_unit.data_ptr(),
            pointer(self.power),
            self.target_slope.numel(),
            self.target_slope.shape[1],
            self.target_slope.data_ptr(),
            pointer(target),
            *_pairs_operands(pairs),
            others.rows.data_ptr(),
            pointer(others.scale),
            len(others.rows),
            gradient.data_ptr(),
        )
        return gradient

    def gradient(self, units: Units, grad_unit: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError("`gradients` computes both")

    def temperature_gradient(self, weight: Tensor, symmetric: bool) -> Tensor:
        if self.pair_weight is None:
            return super().temperature_gradient(weight, symmetric)
        gradient = self.empty((), torch.float64)
        self.call(
            "cuda_temperature_gradient",
            self.pair_weight.numel(),
            self.pair_weight.data_ptr(),
            self.row_terms.grad_temperature.data_ptr(),
            pointer(self.column_terms.grad_temperature if symmetric else None),
            gradient.data_ptr(),
        )
        return gradient

    @staticmethod
    def reward_of_head(scores: Tensor, rank: Tensor, head: int, weights: Weights) -> Tensors:
        values = tuple(scores.new_empty(len(scores)) for _ in range(3))
        _head_reward(scores, rank, head, weights, *values, None, None)
        return values

    @staticmethod
    def slopes_of_head(
        scores: Tensor, rank: Tensor, head: int, grad_reward: Tensor, weights: Weights
    ) -> Tensor:
        slopes = torch.empty_like(scores, memory_format=torch.contiguous_format)
        upstream = grad_reward.to(scores.dtype).contiguous()
        _head_reward(scores, rank, head, weights, None, None, None, upstream, slopes)
        return slopes


def _pairs_operands(pairs: tuple[Tensor, Tensor] | None) -> tuple[int, int]:
    return (0, 0) if pairs is None else (pairs[0].data_ptr(), pairs[1].data_ptr())


def _head_reward(
    scores: Tensor, rank: Tensor, head: int, weights: Weights, *results: Tensor | None
) -> None:
    """Fills in the three values, or with an upstream gradient the slopes."""
    scores, rank = scores.contiguous(), rank.contiguous()
    rows, positives = rank.shape
    launch.call(
        OP,
        launch.module().cuda_head_reward,
        *launch.place(scores),
        rows,
        positives,
        scores.shape[1] - positives,
        head,
        tuple(weights),
        scores.data_ptr(),
        rank.data_ptr(),
        *(pointer(x) for x in results),
    )
