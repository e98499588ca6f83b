"""InfoNCE of a batch that lies on several processes: what one of them computes.

A process holds its own queries and candidates, and reads the rows of all. It scores its queries
against all candidates, which gives its losses and its queries' gradients, and all queries against
its candidates, which gives the sums over its columns and its candidates' gradients: two products of
its share each way, where one process needs one of the whole. Rows travel once, and beside them a
few numbers a query and a candidate; neither scores nor gradients do, and every sum is taken whole
in one place, so that its bits depend on the shares alone.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from elva_kernels.backends.in_batch import all_statistics
from elva_kernels.backends.launcher import Contrast, Gradients
from elva_kernels.backends.skipped import Skipped, skipped_of
from elva_kernels.backends.steps import Slopes, Steps, finite
from elva_kernels.reference import NO_POSITIVE, Batch


class Exchange(abc.ABC):
    """What a process learns from the others, in the order of their ranks."""

    rows: slice  # of all queries: its own
    columns: slice  # of all candidates: its own

    @abc.abstractmethod
    def queries(self) -> Tensor:
        """[B, D] of all processes."""

    @abc.abstractmethod
    def of_rows(self, own: Tensor) -> Tensor:
        """[B, ...] of a tensor that has a row for each of its own queries."""

    @abc.abstractmethod
    def of_columns(self, own: Tensor) -> Tensor:
        """[M, ...] of a tensor that has a row for each of its own candidates."""


class _Share:
    """One call of the launcher: `own` queries by all candidates, all queries by `mine`."""

    def __init__(
        self,
        steps: type[Steps],
        contrast: Contrast,
        weight: Tensor,
        exchange: Exchange,
    ) -> None:
        query, candidates, batch, temperature, symmetric, workspace_mb = contrast
        self.steps, self.batch, self.weight, self.exchange = steps, batch, weight, exchange
        self.candidates, self.rest = candidates, (0, temperature, workspace_mb)
        self.skipped, self.symmetric = skipped_of(batch), symmetric
        target = batch.target[exchange.rows].contiguous()
        self.own = self._call(query, candidates, target, 0, exchange.rows)

    def _call(
        self, query: Tensor, candidates: Tensor, target: Tensor, column: int, rows: slice
    ) -> Steps:
        """The steps of some queries and of the candidates from `column` on."""
        batch = Batch(target, max_score=self.batch.max_score, padded=self.batch.padded)
        call = self.steps(query, candidates, batch, *self.rest)
        if self.symmetric:
            call.leave_out_unpaired(self.batch.target[rows])
        if self.skipped is not None:
            candidate, first, last = self.skipped
            call.skipped = Skipped(
                candidate - column, first[rows].contiguous(), last[rows].contiguous()
            )
        return call

    def all_queries(self) -> Steps:
        """By its own candidates; positives among the others' count as none."""
        columns, target = self.exchange.columns, self.batch.target
        inside = (target >= columns.start) & (target < columns.stop)
        target = torch.where(inside, target - columns.start, NO_POSITIVE)
        query = self.exchange.queries()
        return self._call(query, self.candidates[columns], target, columns.start, slice(None))

    def sums_of_columns(self, mine: Steps) -> Tensor | None:
        """Every column's, from the process that holds it; returns the last chunk's scores."""
        held = None
        for rows in mine.chunks:
            held = mine.score(rows)
            mine.column_sums(held, rows)
        own = self.own
        for whole, part in zip(own.columns, mine.columns, strict=True):
            found = self.exchange.of_columns(part[: len(mine.candidates.rows)])
            whole[: len(found)] = found
        own.end_columns()
        return held

    def slopes(self) -> Slopes:
        """Of its own queries, with the columns' factors from the pairs of all."""
        own, weight = self.own, self.weight[self.exchange.rows]
        slopes = own.slopes(slice(None), weight, self.symmetric)
        if not self.symmetric:
            return slopes
        share = self.exchange.of_rows(own.column_share(weight))
        return slopes._replace(column_factor=own.column_factor(self.batch.target, share))

    def slopes_of_all(self, mine: Steps, own: Slopes) -> Slopes:
        """Of all queries, from the process that holds each, on its own candidates."""
        row_peak, row_factor, target_slope = (self.exchange.of_rows(x) for x in own[:3])
        target = mine.batch.target
        target_slope = torch.where(target == NO_POSITIVE, 0, target_slope)
        mine.target_slope.copy_(target_slope)
        column_peak = column_factor = None
        if own.column_factor is not None:
            columns = self.exchange.columns
            column_factor = mine.full(mine.width, 0.0)
            column_factor[: columns.stop - columns.start] = own.column_factor[columns]
            column_peak = finite(mine.columns.peak)
        return Slopes(row_peak, row_factor, target_slope, target, column_peak, column_factor)


def info_nce_share(
    steps: type[Steps],
    contrast: Contrast,
    weight: Tensor,
    wrt: tuple[bool, bool],
    rounded: bool,
    exchange: Exchange,
) -> Gradients:
    query, candidates, _, temperature, symmetric, _ = contrast
    share = _Share(steps, contrast, weight, exchange)
    own = share.own
    held = own.sums(symmetric=False)
    mine, held_of_all = share.all_queries() if symmetric or wrt[1] else None, None
    if symmetric:
        assert mine is not None
        held_of_all = share.sums_of_columns(mine)
    dtypes = (query.dtype, candidates.dtype) if rounded else (own.dtype, own.dtype)
    gradients: list[Tensor | None] = [None, None]
    if any(wrt):
        slopes = share.slopes()
        if wrt[0]:
            gradients[0] = own.gradients_by_slopes(slopes, (True, False), dtypes, held)[0]
        if wrt[1]:
            assert mine is not None
            slopes = share.slopes_of_all(mine, slopes)
            found = mine.gradients_by_slopes(slopes, (False, True), dtypes, held_of_all)
            gradients[1] = found[1]
    grad_temperature = own.temperature_gradient(weight[exchange.rows], symmetric)
    if rounded:
        grad_temperature = grad_temperature.to(temperature.dtype)
    return own.loss(symmetric), *all_statistics(own.statistics()), *gradients, grad_temperature
