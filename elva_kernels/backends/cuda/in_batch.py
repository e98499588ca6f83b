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
from elva_kernels.backends.steps import Slopes, part_of, slopes_of, some
from elva_kernels.reference import Weights

# Scores up to which InfoNCE's slopes are held in two halves, since a launch takes as long as its
# product. Beyond, a negative's errs by 2^-12 of itself. Ours.
_TWO_HALVES = 2**22


class CudaSteps(CudaScores):
    """The slopes of a call, and its gradients."""

    def __init__(self, query: Tensor, *arguments: Any, **named: Any) -> None:
        super().__init__(query, *arguments, **named)
        self.halves = 0
        if query.dtype != torch.float32:
            self.halves = 1 if query.shape[0] * self.width > _TWO_HALVES else 2
        # [B, P] what each pair adds to the temperature's gradient, and that; once there are slopes.
        self.temperature_slope: Tensor | None = None
        self.grad_temperature: Tensor | None = None
        self.both_slopes: Slopes | None = None  # of all queries, where columns count too
        self.power: Tensor | None = None  # int32 [1], of two that slopes are kept times

    def slopes(self, rows: slice, weight: Tensor, symmetric: bool) -> Slopes:
        if not symmetric:
            return self.factors(rows, weight, symmetric)
        if self.both_slopes is None:  # all sums are known
            self.both_slopes = self.factors(slice(None), weight, symmetric)
        return slopes_of(self.both_slopes, rows)

    def factors(self, rows: slice, weight: Tensor, symmetric: bool) -> Slopes:
        """As `slopes`, computed anew; the losses too."""
        weight = weight.double().contiguous()
        if self.losses is None:
            self.losses = torch.empty_like(self.hardest_score)
            self.temperature_slope = self.empty(self.batch.target.shape, torch.float64)
        target, target_slope = some(self.batch.target, rows), some(self.target_slope, rows)
        row_factor = self.empty((target.shape[0],), torch.float32)
        columns: tuple[Tensor | None, Tensor | None] = (None, None)
        self.finish(
            rows,
            symmetric,
            address(weight, rows),
            target_slope.data_ptr(),
            row_factor.data_ptr(),
            self.share.data_ptr() if symmetric else 0,
            address(self.temperature_slope, rows),
        )
        if symmetric:
            columns = (self.columns.peak, self.factor_of_columns(self.share, self.pairs))
        if self.power is None:
            whole = target is self.batch.target
            self.add_up(weight, self.temperature, columns[1], whole)
        return Slopes(some(self.hardest_score, rows), row_factor, target_slope, target, *columns)

    @functools.cached_property
    def share(self) -> Tensor:
        """What each pair adds to its column's factor, once there are `slopes` of columns."""
        return self.empty(self.batch.target.shape, torch.float64)

    def column_share(self, weight: Tensor) -> Tensor:
        return self.share

    @functools.cached_property
    def pairs(self) -> tuple[Tensor, Tensor] | None:
        """Each candidate's, as `occurrences` gives them; None where pair i is candidate i's."""
        if self.batch.diagonal:
            return None
        return occurrences(self.batch.target, self.n_candidates)

    def column_factor(self, target: Tensor, share: Tensor) -> Tensor:
        share = share.contiguous()
        return self.factor_of_columns(share, occurrences(target, self.n_candidates))

    def factor_of_columns(self, share: Tensor, pairs: tuple[Tensor, Tensor] | None) -> Tensor:
        """[width] the sum of each candidate's pairs' shares [B, P]."""
        factor = self.empty((self.width,), torch.float32)
        self.call(
            "cuda_column_factor",
            self.width,
            self.n_candidates,
            share.numel(),
            *_pairs_operands(pairs),
            share.data_ptr(),
            factor.data_ptr(),
        )
        return factor

    def add_up(
        self,
        bound: Tensor | None,
        temperature: Tensor | None = None,
        column_factor: Tensor | None = None,
        whole: bool = False,
    ) -> None:
        """What comes of all pairs: `power`, and `grad_temperature` where the `whole` is known.

        Args:
            bound: float64 [.], what no slope of a row is above, times T. None: no power.
        """
        if bound is not None:
            self.power = self.empty((1,), torch.int32)
        if whole:
            self.grad_temperature = torch.empty((), dtype=torch.float64, device=self.device)
        self.call(
            "cuda_info_nce_total",
            0 if bound is None else bound.numel(),
            pointer(bound),
            pointer(temperature),
            self.width,
            pointer(column_factor),
            0 if bound is None else pointer(self.power),
            self.batch.target.numel(),
            pointer(self.temperature_slope),
            pointer(self.grad_temperature) if whole else 0,
        )

    def slope_rows(self, scores: Tensor, slopes: Slopes, rows: slice) -> Tensor:
        matrix = scores
        if self.halves == 1:  # in the place of the products
            matrix = scores.view(torch.float16)
        elif self.halves == 2:
            matrix = self.empty((2, *scores.shape), torch.float16)
        self.call(
            "cuda_slope_rows",
            scores.shape[0],
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
        self.add_up(slopes.row_factor.double(), None, slopes.column_factor)
        return super().gradients_by_slopes(slopes, wrt, dtypes, held)

    def gradients_of_slopes(
        self, index: Tensor, slopes: Tensor, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.halves:  # a query's hardest negative has a slope as large as its positive
            self.halves = 2
        positives = self.batch.target.shape[1]
        index, slopes = index.contiguous(), slopes.contiguous()
        self.target_slope = slopes[:, :positives].contiguous()
        if slopes.numel() > 0:
            largest = torch.linalg.vector_norm(slopes, math.inf, dtype=torch.float64)
            self.add_up(largest)
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
            self.n_candidates,
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
                self.empty(x.rows.shape, torch.float32) if wanted else None
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
        gradients = tuple(
            None if x is None else self.empty(x.shape, dtype)
            for x, dtype in zip(self.grad_units, dtypes, strict=True)
        )
        sides: list[int] = []
        both = (self.query, self.candidates)
        for units, grad_unit, out in zip(both, self.grad_units, gradients, strict=True):
            sides += (units.rows.shape[0], units.rows.data_ptr(), pointer(units.scale))
            sides += (units.norm.data_ptr(), pointer(grad_unit), pointer(out))
        launch.call(
            OP,
            launch.module().cuda_unit_gradient,
            DTYPE_CODES[dtypes[0]],
            *self.place,
            self.halves > 0,
            self.query.rows.shape[1],
            pointer(self.power),
            self.batch.target.shape[1],
            self.target_slope.data_ptr(),
            self.batch.target.data_ptr(),
            *_pairs_operands(None if gradients[1] is None else self.pairs),
            *sides,
        )
        return gradients[0], gradients[1]

    def temperature_gradient(self, weight: Tensor, symmetric: bool) -> Tensor:
        if self.temperature_slope is None:  # no gradient on rows was wanted
            self.factors(slice(None), weight, symmetric)
        if self.grad_temperature is None:  # queries came in chunks, or there were none
            self.add_up(None, whole=True)
        assert self.grad_temperature is not None
        return self.grad_temperature

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
