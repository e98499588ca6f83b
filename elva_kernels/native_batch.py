"""The in-batch ops out of the steps of `elva_kernels._C`: unit rows, products, rows of scores.

Scores are held a chunk of queries at a time, masked and counted in place, and turned into slopes
in place: three products for a loss and its gradients, four where both directions are wanted and the
scores do not all fit (a column's sum has to be known before the first slope is). Inputs arrive
checked by `library_batch`, with any strides. Reference: `elva_kernels.reference_batch`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from elva_kernels.native import _DTYPE_CODES, _empty_kept, _module, _value_dtype
from elva_kernels.reference_batch import Batch, RankStatistics

# Scores held at once where the caller has no say. Ours: the products lose nothing to it.
_WORKSPACE_MB = 256
_LEAST_ROWS = 192  # of a chunk: fewer, and packing the candidates costs as much as the product
_ROW_PADDING = 16
_CACHE_PERIOD = 1024  # bytes; measured: 151 GFLOP/s instead of 187 at 1024 x 1024
# What slopes that are rounded to bfloat16 may add to a gradient on unit rows, of the 2e-6 that it may
# be off where a query weighs 1 or less; beyond it they are split in two halves.
_ALLOWED = 1.8e-6


class _Units(NamedTuple):
    """Unit rows, zeros where a row is not finite, and what gradients through them need.

    Where the CPU multiplies bfloat16, rows of it stay as they are, and their products are scaled.
    """

    rows: Tensor  # value [R, D], or bfloat16
    norm: Tensor  # float64 [R, 2]; [:, 0] is NaN where the row is not finite
    scale: Tensor | None  # float32 [R] of bfloat16 rows, what makes them unit; 0 where they are 0


class _Sums(NamedTuple):
    """Over negatives, in float64: exp((s - peak) / T), and that times (s - peak)."""

    peak: Tensor
    total: Tensor
    moment: Tensor


class _Terms(NamedTuple):
    """What one direction of InfoNCE makes of each query's sums, in float64. 0 for a bad pair."""

    loss: Tensor  # [B] NaN for a bad pair
    share: Tensor  # [B] a negative's probability over exp((s - peak) / T)
    others: Tensor  # [B] the negatives' probability
    heat: Tensor  # [B] d loss / d T


def rank_statistics(
    query: Tensor, candidates: Tensor, batch: Batch, *, k: int, temperature: Tensor | None
) -> RankStatistics:
    """As `reference_batch.rank_statistics`."""
    run = _Run(query, candidates, batch, k, temperature, _WORKSPACE_MB)
    for rows in run.chunks:
        run.score(rows)
    return run.statistics()


def info_nce(
    query: Tensor,
    candidates: Tensor,
    batch: Batch,
    temperature: Tensor,
    *,
    symmetric: bool,
    workspace_mb: int,
) -> tuple[Tensor, RankStatistics]:
    """As `reference_batch.info_nce`."""
    run = _Run(query, candidates, batch, 0, temperature, workspace_mb)
    for rows in run.chunks:
        scores = run.score(rows)
        if symmetric:
            run.add_columns(scores)
    if symmetric:
        run.end_columns()
    return run.loss(symmetric), run.statistics()


def info_nce_and_gradients(
    query: Tensor,
    candidates: Tensor,
    batch: Batch,
    temperature: Tensor,
    weight: Tensor | None,
    *,
    symmetric: bool,
    workspace_mb: int,
    rounded: bool,
) -> tuple[Tensor, RankStatistics, Tensor, Tensor, Tensor]:
    """The loss, its statistics, and the gradients of sum(weight * loss).

    Args:
        weight: [B] in the dtype of the loss; None is 1.
        rounded: gradients in the dtypes of the inputs; else in the loss's, the temperature's in
            float64.
    """
    run = _Run(query, candidates, batch, 0, temperature, workspace_mb)
    held = None
    if symmetric:
        for rows in run.chunks:
            held = run.score(rows)
            run.add_columns(held)
        run.end_columns()
    for rows in run.chunks:
        if held is None or len(run.chunks) > 1:
            held = run.score(rows)
        run.slopes(held, rows, weight, symmetric)
        run.add_gradients(held, rows)
    if run.chunks:
        run.add_targets()
    dtypes = (query.dtype, candidates.dtype) if rounded else (run.dtype, run.dtype)
    grad_query, grad_candidates = run.gradients(*dtypes)
    heat = run.heat_gradient(weight, symmetric)
    return (
        run.loss(symmetric),
        run.statistics(),
        grad_query,
        grad_candidates,
        heat.to(temperature.dtype) if rounded else heat,
    )


def in_batch_gradients(
    query: Tensor, candidates: Tensor, index: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """As `reference_batch.in_batch_gradients`."""
    target = index[:, 0].contiguous()
    run = _Run(query, candidates, Batch(target, None, None), 0, None, _WORKSPACE_MB)
    run.target_score.copy_(torch.where(run.bad_pairs(), math.nan, 0.0))
    for rows in run.chunks:
        # A slope of no candidate goes to a column of padding, or of its own.
        matrix = slopes.new_zeros(len(index[rows]), run.width + 1)
        nowhere = torch.where(index[rows] < 0, run.width, index[rows])
        matrix.scatter_(1, nowhere, slopes[rows])
        run.add_gradients(matrix, rows)
    return run.gradients(query.dtype, candidates.dtype)


class _Run:
    """One call: its unit rows, the chunk of scores, and the results as they come together."""

    def __init__(
        self,
        query: Tensor,
        candidates: Tensor,
        batch: Batch,
        k: int,
        temperature: Tensor | None,
        workspace_mb: int,
    ) -> None:
        self.dtype = _value_dtype(query.dtype)
        self.batch = batch
        self.query, self.candidates = _units(query), _units(candidates)
        b, m = len(query), len(candidates)
        self.width = _width(m, self.dtype)
        self.with_sums = temperature is not None
        heat = math.nan if temperature is None else float(temperature)
        self.temperature = heat if heat > 0 else math.nan
        self.cold = 1 / self.temperature  # no sums where it is NaN
        self.chunks = _chunks(b, self.width * self.dtype.itemsize, workspace_mb)
        self.workspace: Tensor | None = None

        self.penalty = torch.full((self.width,), -math.inf, dtype=self.dtype)
        self.penalty[:m] = torch.where(self.candidates.norm[:, 0].isnan(), -math.inf, 0.0)
        self.scale: Tensor | None = None
        if self.candidates.scale is not None:
            self.scale = torch.zeros(self.width)
            self.scale[:m] = self.candidates.scale
        self.n_greater, self.n_equal = (torch.empty(b, dtype=torch.int32) for _ in range(2))
        self.target_score, self.hardest_score = (torch.empty(b, dtype=self.dtype) for _ in range(2))
        self.hardest_index = torch.empty(b, dtype=torch.int64)
        self.k = min(k, m)
        self.topk_scores = torch.empty(b, self.k, dtype=self.dtype)
        self.topk_index = torch.empty(b, self.k, dtype=torch.int64)
        self.total, self.moment = (torch.empty(b, dtype=torch.float64) for _ in range(2))
        self.row_terms = _Terms(*torch.empty(4, b, dtype=torch.float64))
        self.column_terms = _Terms(*torch.empty(4, b, dtype=torch.float64))
        self.columns = _Sums(
            torch.full((self.width,), -math.inf, dtype=self.dtype),
            *(torch.zeros(self.width, dtype=torch.float64) for _ in range(2)),
        )
        self.grad_units: list[Tensor] = []
        self.allowed: list[float] = []
        self.target_slope = torch.empty(b, dtype=self.dtype)

    def score(self, rows: slice) -> Tensor:
        """The masked scores of some queries, in the workspace; fills in their statistics."""
        query = self.query.rows[rows]
        if self.workspace is None:
            self.workspace = _empty_kept(torch.Size((len(query), self.width)), self.dtype)
            self.workspace[:, len(self.candidates.rows) :] = 0
        scores = self.workspace[: len(query)]
        _multiply(query, self.candidates.rows.T, scores)
        max_score = math.inf if self.batch.max_score is None else self.batch.max_score
        ids = self.batch.candidate_ids
        _module().score_rows(
            _DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
            len(query),
            len(self.candidates.rows),
            self.width,
            scores.data_ptr(),
            self.penalty.data_ptr(),
            _pointer(self.scale),
            self.query.norm[rows].data_ptr(),
            self.batch.target[rows].data_ptr(),
            _pointer(ids),
            max_score,
            self.cold,
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
        if self.with_sums:
            sums = _Sums(self.hardest_score[rows], self.total[rows], self.moment[rows])
            self.set_terms(self.row_terms, rows, sums)
        return scores

    def add_columns(self, scores: Tensor) -> None:
        """Masked scores of some queries into the sums over columns."""
        _module().column_sums(
            _DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
            len(scores),
            self.width,
            scores.data_ptr(),
            self.cold,
            *(x.data_ptr() for x in self.columns),
        )

    def statistics(self) -> RankStatistics:
        lse = None
        if self.with_sums:
            lse = (self.row_terms.loss + self.target_score.double() / self.temperature).to(self.dtype)
        return RankStatistics(
            rank=1 + self.n_greater + self.n_equal,
            n_greater=self.n_greater,
            n_equal=self.n_equal,
            target_score=self.target_score,
            hardest_score=self.hardest_score,
            hardest_index=self.hardest_index,
            topk_scores=self.topk_scores,
            topk_index=self.topk_index,
            logsumexp=lse,
        )

    def set_terms(self, terms: _Terms, rows: slice, sums: _Sums, at: Tensor | None = None) -> None:
        """Eq. 11 and 13 of some queries from the sums over negatives, and their derivatives."""
        target_score = self.target_score[rows]
        _module().info_nce_terms(
            _DTYPE_CODES[self.dtype],
            len(target_score),
            target_score.data_ptr(),
            _pointer(at),
            *(x.data_ptr() for x in sums),
            self.temperature,
            *(x[rows].data_ptr() for x in terms),
        )

    def end_columns(self) -> None:
        """After all `add_columns`."""
        self.set_terms(self.column_terms, slice(None), self.columns, self.batch.target)

    def loss(self, symmetric: bool) -> Tensor:
        loss = self.row_terms.loss
        if symmetric:
            loss = (loss + self.column_terms.loss) / 2
        return loss.to(self.dtype)

    def upstream(self, weight: Tensor | None, rows: slice, symmetric: bool) -> Tensor:
        """What multiplies each direction's slope: 0 for a bad pair, whatever its weight."""
        half = 0.5 if symmetric else 1.0
        sound = self.target_score[rows].isfinite()
        value = half if weight is None else weight[rows].double() * half
        return torch.where(sound, value, 0.0).double()

    def slopes(self, scores: Tensor, rows: slice, weight: Tensor | None, symmetric: bool) -> None:
        """Masked scores become d sum(weight * loss) / d score, in place."""
        upstream = self.upstream(weight, rows, symmetric) * self.cold
        target_slope = -upstream * self.row_terms.others[rows]
        column_peak = column_factor = None
        if symmetric:
            everyone = slice(None)
            columns = self.column_terms
            factors = self.upstream(weight, everyone, symmetric) * self.cold * columns.share
            target_slope = target_slope - upstream * columns.others[rows]
            sums = torch.zeros(self.width, dtype=torch.float64)
            column_factor = sums.index_add_(0, self.batch.target, factors).to(self.dtype)
            peak = self.columns.peak
            column_peak = torch.where(peak > -math.inf, peak, 0.0)
        hardest = self.hardest_score[rows]
        target_slope = target_slope.to(self.dtype)
        if self.scale is not None:  # the largest of a row: rounded, it would decide the error
            self.target_slope[rows] = target_slope
            target_slope = torch.zeros_like(target_slope)
        operands = [
            torch.where(hardest > -math.inf, hardest, 0.0),
            (upstream * self.row_terms.share[rows]).to(self.dtype),
            target_slope,
            self.batch.target[rows],
        ]
        _module().slope_rows(
            _DTYPE_CODES[self.dtype],
            torch.get_num_threads(),
            len(scores),
            self.width,
            scores.data_ptr(),
            *(x.data_ptr() for x in operands),
            _pointer(column_peak),
            _pointer(column_factor),
            self.cold,
        )

    def add_gradients(self, slopes: Tensor, rows: slice) -> None:
        """Slopes on the scores of some queries into the gradients on unit rows."""
        if not self.grad_units:
            both = (self.query, self.candidates)
            self.grad_units = [_empty_kept(x.rows.shape, self.dtype) for x in both]
            self.allowed = [_allowed(x) for x in both]
        slopes = slopes[:, : len(self.candidates.rows)]
        query = _Units(*(None if x is None else x[rows] for x in self.query))
        part = math.sqrt(len(query.rows) / len(self.query.rows))
        _multiply_units(slopes, self.candidates, self.grad_units[0][rows], self.allowed[1])
        _multiply_units(
            slopes.T, query, self.grad_units[1], self.allowed[0] * part, add=rows.start > 0
        )

    def add_targets(self) -> None:
        """The slopes on the targets' scores, where they were kept apart."""
        query, candidates, target = self.query, self.candidates, self.batch.target
        if query.scale is None or candidates.scale is None:
            return
        pairs = (
            (candidates, target, None, self.grad_units[0]),
            (query, None, target, self.grad_units[1]),
        )
        for units, source, into, out in pairs:
            scale = candidates.scale[target] if into is None else query.scale
            factor = self.target_slope * scale
            _module().add_rows(
                torch.get_num_threads(),
                len(target),
                units.rows.shape[1],
                _pointer(source),
                _pointer(into),
                factor.data_ptr(),
                units.rows.data_ptr(),
                out.data_ptr(),
                len(out),
            )

    def gradients(
        self, query_dtype: torch.dtype, candidate_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """On the rows themselves; NaN for a bad candidate and for a query of a bad pair."""
        if not self.chunks:
            self.grad_units = [
                torch.zeros(x.rows.shape, dtype=self.dtype) for x in (self.query, self.candidates)
            ]
        norm = self.query.norm
        norm[:, 0] = torch.where(self.target_score.isfinite(), norm[:, 0], math.nan)
        return (
            _gradient(self.query, self.grad_units[0], query_dtype),
            _gradient(self.candidates, self.grad_units[1], candidate_dtype),
        )

    def heat_gradient(self, weight: Tensor | None, symmetric: bool) -> Tensor:
        everyone = slice(None)
        heat = self.row_terms.heat
        if symmetric:
            heat = heat + self.column_terms.heat
        return (self.upstream(weight, everyone, symmetric) * heat).sum()

    def bad_pairs(self) -> Tensor:
        """Bool [B]: queries that are not finite, or whose target is not."""
        query, candidates = (x.norm[:, 0].isnan() for x in (self.query, self.candidates))
        return query | candidates[self.batch.target]


def _width(m: int, dtype: torch.dtype) -> int:
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


def _units(rows: Tensor) -> _Units:
    raw = rows.dtype == torch.bfloat16 and _module().multiplies_bf16()
    dtype = torch.bfloat16 if raw else _value_dtype(rows.dtype)
    unit = torch.empty(*rows.shape, dtype=dtype)
    norm = torch.empty(len(rows), 2, dtype=torch.float64)
    _module().unit_rows(
        _DTYPE_CODES[rows.dtype],
        _DTYPE_CODES[dtype],
        torch.get_num_threads(),
        *rows.shape,
        rows.data_ptr(),
        *rows.stride(),
        unit.data_ptr(),
        norm.data_ptr(),
    )
    return _Units(unit, norm, norm[:, 0].nan_to_num(0.0).float() if raw else None)


def _gradient(units: _Units, grad_unit: Tensor, dtype: torch.dtype) -> Tensor:
    grad = _empty_kept(units.rows.shape, dtype)
    _module().unit_gradient(
        _DTYPE_CODES[dtype],
        _DTYPE_CODES[units.rows.dtype],
        torch.get_num_threads(),
        *units.rows.shape,
        units.rows.data_ptr(),
        grad_unit.data_ptr(),
        units.norm.data_ptr(),
        grad.data_ptr(),
    )
    return grad


def _allowed(units: _Units) -> float:
    """How long a row of errors of slopes may be, for an element of their product with `units`.

    By Cauchy and Schwarz: an element errs by no more than that times its column's norm.
    """
    if units.scale is None:
        return 0.0
    norm: float = _module().column_norm(
        torch.get_num_threads(),
        *units.rows.shape,
        units.rows.data_ptr(),
        units.scale.data_ptr(),
    )
    return _ALLOWED / norm if norm > 0 else 0.0


def _multiply_units(
    a: Tensor, units: _Units, out: Tensor, allowed: float, *, add: bool = False
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
    _module().matrix_product(
        _DTYPE_CODES[a.dtype],
        _DTYPE_CODES[b.dtype],
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
        _pointer(scale),
        _pointer(norm),
        allowed,
    )


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
