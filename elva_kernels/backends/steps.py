"""The in-batch ops as steps that a backend computes: unit rows, products, rows of scores, slopes.

Scores are held a chunk of queries at a time, masked and counted in place, and turned into slopes
in place: three products for a loss and its gradients, four where both directions are wanted and the
scores do not all fit (a column's sum has to be known before the first slope is). Inputs arrive as
`launcher` says. Reference: eq. 8 to 14 of `elva_kernels.reference`.
"""

import abc
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from elva_kernels.backends.head import reward_of_head, slopes_of_head
from elva_kernels.backends.skipped import skipped_of
from elva_kernels.reference import (
    NO_POSITIVE,
    Batch,
    RankStatistics,
    compute_dtype,
    mean_of_positives,
)

# Scores held at once where the caller has no say. Ours: the products lose nothing to it.
_WORKSPACE_MB = 256
_LEAST_ROWS = 192  # of a chunk: fewer, and packing the candidates costs as much as the product
_ROW_PADDING = 16
_CACHE_PERIOD = 1024  # bytes; measured: 151 GFLOP/s instead of 187 at 1024 x 1024


class Units(NamedTuple):
    """Rows whose products are made cosines, and what gradients through them need."""

    rows: Tensor  # [R, D]; zeros where a row is not finite
    # float64 [R, 2]: 1 / |row 2^-e| (0 for a zero row, NaN if not finite), and e; see CudaScores.
    norm: Tensor
    # [R or more], what makes unit rows of them, 0 for bad ones; None: they are.
    scale: Tensor | None


class Sums(NamedTuple):
    """Over negatives: exp((s - peak) / T), and that times (s - peak), in float64."""

    peak: Tensor
    total: Tensor
    moment: Tensor


class Terms(NamedTuple):
    """What one direction of InfoNCE makes of each pair's sums, in float64. 0 for a bad pair."""

    loss: Tensor  # [B, P] NaN for a bad pair
    share: Tensor  # [B, P] a negative's probability over exp((s - peak) / T)
    others: Tensor  # [B, P] the negatives' probability
    grad_temperature: Tensor  # [B, P] d loss / d T


class Slopes(NamedTuple):
    """What turns masked scores into slopes; see `Steps.slope_rows`."""

    row_peak: Tensor  # [R] finite
    row_factor: Tensor  # [R]
    target_slope: Tensor  # [R, P]
    target: Tensor  # int64 [R, P]
    column_peak: Tensor | None  # [width] finite
    column_factor: Tensor | None  # [width]


class Steps(abc.ABC):
    """One call: its unit rows, the chunk of scores, and the results as they come together.

    Args:
        query, candidates, batch, k, temperature, workspace_mb: as a launcher's.
        wrt: whether the gradients on query and candidates are wanted.
        scored: whether anything is to be scored, and has statistics.
    """

    masked = -math.inf  # in the place of a score that is no negative's
    reward_of_head = staticmethod(reward_of_head)
    slopes_of_head = staticmethod(slopes_of_head)

    def __init__(
        self,
        query: Tensor,
        candidates: Tensor,
        batch: Batch,
        k: int = 0,
        temperature: Tensor | None = None,
        workspace_mb: int = _WORKSPACE_MB,
        wrt: tuple[bool, bool] = (True, True),
        *,
        scored: bool = True,
    ) -> None:
        self.dtype = compute_dtype(query.dtype)
        self.device = query.device
        self.batch = batch
        self.wrt = wrt
        self.skipped = skipped_of(batch)
        self.query, self.candidates = self.units_of_both(query, candidates)
        self.n_candidates = m = candidates.shape[0]
        self.width = self.width_of(m)
        self.temperature = None if temperature is None else self.exact(temperature.detach())
        self.chunks = _chunks(batch.target.shape[0], self.width * self.dtype.itemsize, workspace_mb)
        self.workspace: Tensor | None = None
        self.k = min(k, m)
        if scored:
            self.new_statistics()
        self.grad_units: list[Tensor | None] = []
        self.unpaired: Tensor | None = None  # bool [B, 1]: see `leave_out_unpaired`

    def new_statistics(self) -> None:
        """Memory for what `score` fills in."""
        b, p = self.batch.target.shape
        self.n_greater, self.n_equal = (self.empty((b, p), torch.int32) for _ in range(2))
        self.target_score = self.empty((b, p), self.dtype)
        self.hardest_score = self.empty((b,), self.dtype)
        self.hardest_index = self.empty((b,), torch.int64)
        self.topk_scores = self.empty((b, self.k), self.dtype)
        self.topk_index = self.empty((b, self.k), torch.int64)

    @functools.cached_property
    def total(self) -> Tensor:
        return self.empty((self.batch.target.shape[0],), torch.float64)

    @functools.cached_property
    def moment(self) -> Tensor:
        return torch.empty_like(self.total)

    @functools.cached_property
    def target_slope(self) -> Tensor:
        return self.empty((*self.batch.target.shape,), self.dtype)

    @functools.cached_property
    def row_terms(self) -> Terms:
        return self.empty_terms()

    @functools.cached_property
    def column_terms(self) -> Terms:
        return self.empty_terms()

    def empty_terms(self) -> Terms:
        shape = tuple(self.batch.target.shape)
        return Terms(*(self.empty(shape, torch.float64) for _ in Terms._fields))

    @functools.cached_property
    def columns(self) -> Sums:
        """Over the queries that `column_sums` has seen."""
        zeros = torch.zeros(2, self.width, dtype=torch.float64, device=self.device)
        return Sums(self.full(self.width, -math.inf), *zeros)

    def rank_statistics(self) -> RankStatistics:
        """As `reference.rank_statistics`."""
        for rows in self.chunks:
            self.score(rows)
        return self.statistics()

    def info_nce(self, *, symmetric: bool) -> tuple[Tensor, RankStatistics]:
        """As `reference.info_nce`."""
        if symmetric:
            self.leave_out_unpaired(self.batch.target)
        self.sums(symmetric)
        return self.loss(symmetric), self.statistics()

    def info_nce_and_gradients(
        self, weight: Tensor, *, symmetric: bool, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> tuple[Tensor, RankStatistics, Tensor | None, Tensor | None, Tensor]:
        """The loss, its statistics, and the gradients of sum(weight * loss).

        Args:
            weight: [B] in any float dtype.
            dtypes: of the gradients on queries and candidates; the temperature's is float64.
        """
        held = None
        if symmetric:
            self.leave_out_unpaired(self.batch.target)
            held = self.sums(symmetric)
        for rows in self.chunks:
            if held is None or len(self.chunks) > 1:
                held = self.score(rows)
            matrix = self.slope_rows(held, self.slopes(rows, weight, symmetric), rows)
            self.add_gradients(matrix, rows)
        self.add_targets()
        gradients = self.gradients(dtypes)
        grad_temperature = self.temperature_gradient(weight, symmetric)
        return self.loss(symmetric), self.statistics(), *gradients, grad_temperature

    def gradients_by_slopes(
        self,
        slopes: Slopes,
        wrt: tuple[bool, bool],
        dtypes: tuple[torch.dtype, torch.dtype],
        held: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients that are wanted, of slopes that are known for all queries.

        held: the scores of the last chunk.
        """
        self.wrt = wrt
        for rows in self.chunks:
            if held is None or len(self.chunks) > 1:
                held = self.score(rows)
            matrix = self.slope_rows(held, slopes_of(slopes, rows), rows)
            self.add_gradients(matrix, rows)
        self.add_targets()
        return self.gradients(dtypes)

    def gradients_of_slopes(
        self, index: Tensor, slopes: Tensor, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> tuple[Tensor | None, Tensor | None]:
        """As `reference.in_batch_gradients`."""
        self.judge_pairs()
        for rows in self.chunks:
            self.add_gradients(self.spread(index[rows], slopes[rows]), rows)
        return self.gradients(dtypes)

    def leave_out_unpaired(self, target: Tensor) -> None:
        """Before scoring: queries without a positive in `target` are in no column's sum."""
        if self.batch.padded:
            self.unpaired = (target < 0).all(1, keepdim=True)

    def width_of(self, m: int) -> int:
        """Scores in a row of m candidates."""
        return row_width(m, self.dtype)

    def units_of_both(self, query: Tensor, candidates: Tensor) -> tuple[Units, Units]:
        return self.units(query), self.units(candidates)

    def units(self, rows: Tensor) -> Units:
        """Of rows [R, D] of any strides; for a backend that takes one side at a time."""
        raise NotImplementedError

    @abc.abstractmethod
    def multiply_rows(self, query: Units, scores: Tensor) -> None:
        """Products of some queries and all candidates into the first columns of `scores`."""

    @abc.abstractmethod
    def score_rows(self, scores: Tensor, rows: slice) -> None:
        """Products become masked scores, in place; the statistics of `rows` are filled in."""

    @abc.abstractmethod
    def column_sums(self, scores: Tensor, rows: slice) -> None:
        """Adds masked scores of some queries to `columns`."""

    @abc.abstractmethod
    def set_terms(self, terms: Terms, rows: slice, sums: Sums, at: Tensor | None = None) -> None:
        """Eq. 11 and 13 of some queries' pairs from sums over negatives, and their derivatives.

        `at`: [R, P] where in `sums` a pair's are; None, where P is 1: in order.
        """

    @abc.abstractmethod
    def slope_rows(self, scores: Tensor, slopes: Slopes, rows: slice) -> Tensor:
        """Masked scores become row_factor exp((s - row_peak) / T), in place.

        And the same of the columns added, and every target_slope at its target. Returns what
        `add_gradients` takes.
        """

    @abc.abstractmethod
    def add_gradients(self, slopes: Tensor, rows: slice) -> None:
        """Slopes [rows, width or more] into the gradients on unit rows, `grad_units`.

        None in the place of a gradient that is not wanted.
        """

    def spread(self, index: Tensor, slopes: Tensor) -> Tensor:
        """Slopes [R, P + h] on the candidates `index` as slopes [R, width or more] on all."""
        # A slope of no candidate goes to a column of padding, or behind all.
        matrix = slopes.new_zeros(len(index), self.width + 1)
        nowhere = torch.where(index < 0, self.width, index)
        # Positives listed twice: in order, not as scatter_add_ does it on a GPU.
        positives = self.batch.target.shape[1]
        for column in range(positives):
            at = nowhere[:, column : column + 1]
            slope = slopes[:, column : column + 1]
            matrix.scatter_(1, at, matrix.gather(1, at) + slope)
        return matrix.scatter_(1, nowhere[:, positives:], slopes[:, positives:])

    def gradient(self, units: Units, grad_unit: Tensor, dtype: torch.dtype) -> Tensor:
        """On the rows, rounded once, NaN where the norm is; for a backend as that of `units`."""
        raise NotImplementedError

    @abc.abstractmethod
    def add_targets(self) -> None:
        """The slopes of targets into `grad_units`, where `slope_rows` left them out."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a result."""
        return torch.empty(*shape, dtype=dtype, device=self.device)  # a tuple is parsed slowly

    def full(self, size: int, value: float) -> Tensor:
        return torch.full((size,), value, dtype=self.dtype, device=self.device)

    def score(self, rows: slice) -> Tensor:
        """The masked scores of some queries, in the workspace; fills in their statistics."""
        query = part_of(self.query, rows)
        count = query.rows.shape[0]
        if self.workspace is None:
            self.workspace = self.new_workspace(count)
        scores = some(self.workspace, slice(count))
        self.multiply_rows(query, scores)
        self.score_rows(scores, rows)
        if self.unpaired is not None:
            scores.masked_fill_(some(self.unpaired, rows), self.masked)
        if self.temperature is not None:
            self.add_terms(rows)
        return scores

    def add_terms(self, rows: slice) -> None:
        """Of queries that were just scored, in their own direction."""
        sums = Sums(*(some(x, rows) for x in (self.hardest_score, self.total, self.moment)))
        self.set_terms(self.row_terms, rows, sums, self.row_of_pairs(len(sums.peak)))

    def new_workspace(self, rows: int) -> Tensor:
        """Memory for scores, no padding of which is NaN."""
        workspace = self.empty((rows, self.width), self.dtype)
        if self.width > len(self.candidates.rows):
            workspace[:, len(self.candidates.rows) :] = 0
        return workspace

    def row_of_pairs(self, rows: int) -> Tensor | None:
        """[R, P] the row of each pair; None where it is in order."""
        p = self.batch.target.shape[1]
        if p == 1:
            return None
        return torch.arange(rows, device=self.device).unsqueeze(1).expand(-1, p).contiguous()

    def sums(self, symmetric: bool) -> Tensor | None:
        """Scores every chunk for what it sums, and returns the last."""
        held = None
        for rows in self.chunks:
            held = self.score(rows)
            if symmetric:
                self.column_sums(held, rows)
        if symmetric:
            self.end_columns()
        return held

    def end_columns(self) -> None:
        """After all `column_sums`."""
        at = self.batch.target.clamp(min=0)
        self.set_terms(self.column_terms, slice(None), self.columns, at)

    def logsumexp(self) -> Tensor | None:
        """The statistic of eq. 11."""
        if self.temperature is None:
            return None
        hardest = self.hardest_score.double() / self.temperature + self.total.log()
        hardest = torch.where(self.total > 0, hardest, -math.inf)
        targets = self.target_score.double() / self.temperature
        return torch.cat([targets, hardest.unsqueeze(1)], dim=1).logsumexp(1).to(self.dtype)

    def statistics(self) -> RankStatistics:
        return RankStatistics(
            rank=self.ranks(),
            n_greater=self.n_greater,
            n_equal=self.n_equal,
            target_score=self.target_score,
            hardest_score=self.hardest_score,
            hardest_index=self.hardest_index,
            topk_scores=self.topk_scores,
            topk_index=self.topk_index,
            logsumexp=self.logsumexp(),
        )

    def exact(self, temperature: Tensor) -> Tensor:
        """In float64; NaN where it is not above 0. Not looked at: a GPU would be waited for."""
        exact = temperature.double()
        return torch.where(exact > 0, exact, math.nan)

    def loss(self, symmetric: bool) -> Tensor:
        loss = self.row_terms.loss
        if symmetric:
            loss = (loss + self.column_terms.loss) / 2
        if loss.shape[1] > 1:
            loss = mean_of_positives(loss, self.batch.target != NO_POSITIVE)
        return loss.reshape(-1).to(self.dtype)

    def ranks(self) -> Tensor:
        """int32 [B, P], 0 for no positive."""
        return (self.n_greater + self.n_equal).add_(self.batch.target != NO_POSITIVE)

    def upstream(self, weight: Tensor, rows: slice, symmetric: bool) -> Tensor:
        """[R, P] what multiplies each direction's slope: 0 for a bad pair, whatever its weight."""
        value = (weight[rows].double() * (0.5 if symmetric else 1.0)).unsqueeze(1)
        target = self.batch.target[rows]
        if target.shape[1] > 1:
            value = value / (target != NO_POSITIVE).sum(1, keepdim=True).clamp(min=1)
        return torch.where(self.target_score[rows].isfinite(), value, 0.0)

    def slopes(self, rows: slice, weight: Tensor, symmetric: bool) -> Slopes:
        """What makes d sum(weight * loss) / d score of some queries' masked scores."""
        assert self.temperature is not None
        upstream = self.upstream(weight, rows, symmetric) / self.temperature
        target_slope = -upstream * self.row_terms.others[rows]
        column_peak = column_factor = None
        if symmetric:
            target_slope -= upstream * self.column_terms.others[rows]
            column_peak, column_factor = self.column_slopes(weight)
        self.target_slope[rows] = target_slope.to(self.dtype)
        return Slopes(
            finite(self.hardest_score[rows]),
            (upstream * self.row_terms.share[rows]).sum(1).to(self.dtype),
            self.target_slope[rows],
            self.batch.target[rows],
            column_peak,
            column_factor,
        )

    def column_slopes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """[width] the peaks and factors of the other direction's slopes."""
        assert self.temperature is not None
        share = self.column_share(weight)
        return finite(self.columns.peak), self.column_factor(self.batch.target, share)

    def column_share(self, weight: Tensor) -> Tensor:
        """[B, P] what each pair adds to the factor of its column."""
        assert self.temperature is not None
        everyone = self.upstream(weight, slice(None), True) / self.temperature
        return everyone * self.column_terms.share

    def column_factor(self, target: Tensor, share: Tensor) -> Tensor:
        """[width] the sum of pairs' shares [B, P] over those whose positive a column is."""
        sums = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        target = target.reshape(-1)
        # Zeros for no positive anywhere, but not all in one place: a GPU adds those one by one.
        anywhere = torch.arange(len(target), device=self.device) % self.width
        at = torch.where(target < 0, anywhere, target)
        # Not index_add_, which on a GPU adds in any order.
        sums.index_put_((at,), share.reshape(-1), True)
        return sums.to(self.dtype)

    def gradients(
        self, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> tuple[Tensor | None, Tensor | None]:
        """On the rows themselves; NaN for a bad candidate and for a query of a bad pair."""
        both = (self.query, self.candidates)
        if not self.chunks:
            self.grad_units = [
                self.empty(x.rows.shape, self.dtype).zero_() if wanted else None
                for x, wanted in zip(both, self.wrt, strict=True)
            ]
        self.spoil_queries()
        grad_query, grad_candidates = (
            None if grad_unit is None else self.gradient(units, grad_unit, dtype)
            for units, grad_unit, dtype in zip(both, self.grad_units, dtypes, strict=True)
        )
        return grad_query, grad_candidates

    def temperature_gradient(self, weight: Tensor, symmetric: bool) -> Tensor:
        slope = self.row_terms.grad_temperature
        if symmetric:
            slope = slope + self.column_terms.grad_temperature
        return (self.upstream(weight, slice(None), symmetric) * slope).sum()

    def spoil_queries(self) -> None:
        """The norms of queries of bad pairs become NaN, and so their gradients."""
        self.query.norm[:, 0].masked_fill_(self.target_score.isnan().any(1), math.nan)

    def judge_pairs(self) -> None:
        """What `spoil_queries` looks at, where nothing was scored: NaN for a bad pair."""
        query, candidates = (x.norm[:, 0].isnan() for x in (self.query, self.candidates))
        bad = torch.nn.functional.pad(candidates, (0, 2), value=True)  # there may be none
        target = self.batch.target
        bad = bad[torch.where(target < 0, len(candidates), target)] | query.unsqueeze(1)
        self.target_score = torch.where(bad & (target != NO_POSITIVE), math.nan, 0.0)


def some(x: Tensor, rows: slice) -> Tensor:
    """x[rows]; x itself, without a view, where these are all of them."""
    if rows.start or (rows.stop is not None and rows.stop < x.size(0)):
        return x[rows]
    return x


def part_of(units: Units, rows: slice) -> Units:
    if some(units.rows, rows) is units.rows:
        return units
    scale = None if units.scale is None else units.scale[rows]
    return Units(units.rows[rows], units.norm[rows], scale)


def slopes_of(slopes: Slopes, rows: slice) -> Slopes:
    """Of some queries."""
    row_peak, row_factor, target_slope, target = (some(x, rows) for x in slopes[:4])
    return Slopes(row_peak, row_factor, target_slope, target, *slopes[4:])


def finite(peak: Tensor) -> Tensor:
    return torch.where(peak > -math.inf, peak, 0.0)


def row_width(m: int, dtype: torch.dtype) -> int:
    """Scores in a row: padded, and no multiple of what maps a column to a few lines of a cache."""
    width = -(-m // _ROW_PADDING) * _ROW_PADDING
    return width if width * dtype.itemsize % _CACHE_PERIOD else width + _ROW_PADDING


def _chunks(b: int, row_bytes: int, workspace_mb: int) -> list[slice]:
    """Queries in chunks of equal size whose scores fit the workspace."""
    if b == 0:
        return []
    most = max(_LEAST_ROWS, workspace_mb * 2**20 // row_bytes)
    size = -(-b // -(-b // most))
    return [slice(i, min(i + size, b)) for i in range(0, b, size)]
