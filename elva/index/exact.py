"""Exact search over mapped rows of half precision, with scores of an fp32 query.

Where the rows have codes beside them, `elva_kernels.coded_topk` reads these. Elsewhere:

`elva_kernels.topk` wants query and rows in one dtype. Rounding the query moves every cosine by at
most the length of what was rounded away, so one pass over the map with the rounded query yields
candidates, their scores are computed again with the query as it is, and the answer is exact once
nothing outside the candidates can reach it. Where that cannot be shown (a collapsed model, whose
scores lie closer than the rounding), rows are widened block by block instead: slower, as exact.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import elva_kernels

_KERNEL_ERROR = 1e-5
"""What `elva_kernels.topk` promises of a score."""

BLOCK_MB = 16
"""Rows copied at a time, to be widened or because a filter chose them; they stay in the cache."""

MAX_CANDIDATES = 1024
"""Ours: beyond it rescoring costs as much as the widened pass."""

_MAX_DROPPED = 256
"""Ours: so many excluded rows are searched and dropped; beyond it the others are gathered."""

CODED_BYTES = 64 << 20
"""Ours: fewer bytes of rows stay in a cache, where codes gain less than their proof costs."""

FEW, DEEP = 8, 512
"""Ours: codes gain nothing where a filter leaves an eighth of the rows, or where more than one in
512 is asked for."""


@dataclass(frozen=True)
class Found:
    """What a search gives: score descending, then row ascending.

    Args:
        scores: [Q, K] fp32.
        rows: [Q, K] int64.
        by_codes: [Q] bool, whether the codes proved a query's answer without all rows; None where
            there are none, or a filter leaves few rows.
        rows_read: embeddings that were read, of a row for several queries once a batch of them.
    """

    scores: Tensor
    rows: Tensor
    by_codes: Tensor | None = field(default=None, kw_only=True)
    rows_read: int | None = field(default=None, kw_only=True)


def search(
    query: Tensor,
    parts: Sequence[Tensor],
    k: int,
    allowed: np.ndarray | None = None,
    progress: Callable[[int], None] | None = None,
    codes: Sequence[elva_kernels.RowCodes] | None = None,
) -> Found:
    """The k best rows of several stacked matrices.

    Args:
        query: [Q, D] fp32.
        parts: [n, D] each, in one dtype; row numbers run on from one to the next.
        allowed: [sum of n] bool, rows that may be found; all for None.
        progress: called after each part with the rows read so far; with codes at the end.
        codes: of each part's rows; the answer is the same with them, to the bit.
    """
    stack = Stack(parts)
    live = len(stack) if allowed is None else int(allowed.sum())
    if codes is not None and _by_codes(stack, live, k):
        mask = None if live == len(stack) else torch.from_numpy(np.ascontiguousarray(allowed))
        out = elva_kernels.coded_topk(query, parts, codes, k, mask=mask)
        if progress is not None:
            progress(len(stack))
        return Found(out.scores, out.index, by_codes=out.proven, rows_read=out.rows_read)
    if allowed is None or allowed.all():
        return _proven(query, stack, min(k, len(stack)), progress)
    dropped = len(stack) - live
    may = torch.from_numpy(np.ascontiguousarray(allowed))
    if live and dropped <= _MAX_DROPPED:
        found = _proven(query, stack, min(k + dropped, len(stack)), progress)
        # The allowed ones first, in their order; every query has at least min(k, live) of them.
        order = (~may[found.rows]).to(torch.int8).sort(dim=1, stable=True).indices
        order = order[:, : min(k, live)]
        return Found(found.scores.gather(1, order), found.rows.gather(1, order))
    found = merge([], len(query), k)
    chosen = may.nonzero()[:, 0]
    for some in chosen.split(stack.rows_a_block) if live else ():
        one = top(query, stack.take(some), k)
        found = merge([found, Found(one.scores, some[one.rows])], len(query), k)
    return found


def _by_codes(stack: "Stack", live: int, k: int) -> bool:
    """Whether codes are worth reading in place of rows."""
    return stack.bytes >= CODED_BYTES and live > max(k * DEEP, len(stack) // FEW)


def top(query: Tensor, rows: Tensor, k: int) -> Found:
    """The k best rows of one matrix."""
    return search(query, [rows], k)


def merge(found: Iterable[Found], queries: int, k: int) -> Found:
    """The k best of several answers whose rows do not overlap and come in ascending order."""
    lists = list(found)
    scores = torch.cat([f.scores for f in lists] or [torch.empty(queries, 0)], 1)
    rows = torch.cat([f.rows for f in lists] or [torch.empty(queries, 0, dtype=torch.int64)], 1)
    if len(lists) > 1:
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        rows = rows.gather(1, order)
    return Found(scores[:, :k], rows[:, :k])


class Stack:
    """Matrices under each other, read where they lie."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = [p for p in parts if len(p)]
        self.starts = np.cumsum([0, *(len(p) for p in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype if self.parts else torch.float32

    @property
    def rows_a_block(self) -> int:
        return max(1, (BLOCK_MB << 20) // self.parts[0][0].nbytes)

    def nearest(
        self, query: Tensor, k: int, progress: Callable[[int], None] | None = None
    ) -> Found:
        """`elva_kernels.topk` of a query in the parts' own dtype."""
        found = merge([], len(query), k)
        for part, start in zip(self.parts, self.starts.tolist(), strict=False):
            out = elva_kernels.topk(query, part, k)
            found = merge([found, Found(out.scores, out.index + start)], len(query), k)
            if progress is not None:
                progress(start + len(part))
        return found

    def widened(self, query: Tensor, k: int) -> Found:
        """The same of an fp32 query, block by block."""
        found = merge([], len(query), k)
        for part, start in zip(self.parts, self.starts.tolist(), strict=False):
            for first in range(0, len(part), self.rows_a_block):
                block = part[first : first + self.rows_a_block].float()
                out = elva_kernels.topk(query, block, k)
                one = Found(out.scores, out.index + (start + first))
                found = merge([found, one], len(query), k)
        return found

    def take(self, rows: Tensor) -> Tensor:
        """[n, D] of some rows, in the parts' dtype."""
        ascending, order = rows.sort()
        edges = np.searchsorted(ascending.numpy(), self.starts)
        taken = [
            part[ascending[first:last] - start]
            for part, start, first, last in zip(
                self.parts, self.starts.tolist(), edges[:-1], edges[1:], strict=False
            )
        ]
        return torch.cat(taken)[order.argsort()]


def rescored(query: Tensor, stack: Stack, candidates: Sequence[Tensor], k: int) -> Found:
    """The k best of each query's own candidates, with exact scores.

    Args:
        candidates: For each query distinct rows, in any order; with fewer than k the rest of its
            answers is row -1 with score -inf.
    """
    scores = torch.full((len(query), k), -torch.inf)
    index = torch.full((len(query), k), -1, dtype=torch.int64)
    for i, rows in enumerate(candidates):
        if len(rows):
            near = rows.sort().values
            out = elva_kernels.topk(query[i : i + 1], stack.take(near).float(), k)
            scores[i, : out.scores.shape[1]] = out.scores[0]
            index[i, : out.scores.shape[1]] = near[out.index[0]]
    return Found(scores, index)


def _proven(query: Tensor, stack: Stack, k: int, progress: Callable[[int], None] | None) -> Found:
    if not k or stack.dtype == query.dtype:
        return stack.nearest(query, k, progress)
    scores = torch.empty(len(query), k)
    index = torch.empty(len(query), k, dtype=torch.int64)
    unit = torch.nn.functional.normalize(query.double(), dim=1)
    rounded = unit.to(stack.dtype)
    nearby = torch.nn.functional.normalize(rounded.double(), dim=1)
    moved = (unit - nearby).norm(dim=1) + 2 * _KERNEL_ERROR
    pending, depth = torch.arange(len(query)), min(2 * k + 16, len(stack))
    while len(pending) and depth <= max(MAX_CANDIDATES, k):
        candidates = stack.nearest(rounded[pending], depth, progress)
        beyond = candidates.scores[:, -1].double() + moved[pending]
        near = rescored(query[pending], stack, list(candidates.rows), k)
        scores[pending], index[pending] = near.scores, near.rows
        settled = (scores[pending, -1] > beyond) | (depth == len(stack))
        pending, depth = pending[~settled], min(8 * depth, len(stack))
    if len(pending):
        found = stack.widened(query[pending], k)
        scores[pending], index[pending] = found.scores, found.rows
    return Found(scores, index)
