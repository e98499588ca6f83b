"""Exact search over mapped rows of half precision, with scores of an fp32 query.

`elva_kernels.topk` wants query and rows in one dtype. Rounding the query moves every cosine by at
most the length of what was rounded away, so one pass over the map with the rounded query yields
candidates, their scores are computed again with the query as it is, and the answer is exact once
nothing outside the candidates can reach it. Where that cannot be shown (a collapsed model, whose
scores lie closer than the rounding), rows are widened block by block instead: slower, as exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import elva_kernels

KERNEL_ERROR = 1e-5
"""What `elva_kernels.topk` promises of a score."""

BLOCK_MB = 16
"""Rows copied at a time, to be widened or because a filter chose them; they stay in the cache."""

MAX_CANDIDATES = 1024
"""Ours: beyond it rescoring costs as much as the widened pass."""

MAX_DROPPED = 256
"""Ours: so many excluded rows are searched and dropped; beyond it the others are gathered."""


@dataclass(frozen=True)
class Found:
    """What a search gives: score descending, then row ascending."""

    scores: Tensor  # [Q, K] fp32
    rows: Tensor  # [Q, K] int64


def search(
    query: Tensor, parts: Sequence[Tensor], k: int, allowed: np.ndarray | None = None
) -> Found:
    """The k best rows of several stacked matrices.

    Args:
        query: [Q, D] fp32.
        parts: [n, D] each, in one dtype; row numbers run on from one to the next.
        allowed: [sum of n] bool, rows that may be found; all for None.
    """
    found, start = [], 0
    for rows in parts:
        end = start + len(rows)
        some = None if allowed is None else allowed[start:end]
        one = top(query, rows, k) if some is None or some.all() else _among(query, rows, k, some)
        found.append(Found(one.scores, one.rows + start))
        start = end
    return merge(found, len(query), k)


def merge(found: Iterable[Found], queries: int, k: int) -> Found:
    """The k best of several answers whose rows do not overlap and come in ascending order."""
    lists = list(found)
    scores = torch.cat([f.scores for f in lists] or [torch.empty(queries, 0)], 1)
    rows = torch.cat([f.rows for f in lists] or [torch.empty(queries, 0, dtype=torch.int64)], 1)
    if len(lists) > 1:
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        rows = rows.gather(1, order)
    return Found(scores[:, :k], rows[:, :k])


def top(query: Tensor, rows: Tensor, k: int) -> Found:
    """The k best rows of one matrix, whatever its dtype."""
    if rows.dtype == query.dtype:
        out = elva_kernels.topk(query, rows, k)
        return Found(out.scores, out.index)
    k = min(k, len(rows))
    if not k:
        return merge([], len(query), k)
    scores = torch.empty(len(query), k)
    index = torch.empty(len(query), k, dtype=torch.int64)
    unit = torch.nn.functional.normalize(query.double(), dim=1)
    rounded = unit.to(rows.dtype)
    length = rounded.double().norm(dim=1)
    moved = (unit - rounded.double()).norm(dim=1) + 2 * KERNEL_ERROR
    pending, depth = torch.arange(len(query)), min(2 * k + 16, len(rows))
    while len(pending) and depth <= max(MAX_CANDIDATES, k):
        candidates = elva_kernels.topk(rounded[pending], rows, depth)
        beyond = candidates.scores[:, -1].double() * length[pending] + moved[pending]
        whole = depth == len(rows)
        for place, i in enumerate(pending.tolist()):
            near = candidates.index[place].sort().values
            out = elva_kernels.topk(query[i : i + 1], rows[near].float(), k)
            scores[i], index[i] = out.scores[0], near[out.index[0]]
        settled = torch.tensor([whole] * len(pending)) | (scores[pending, -1] > beyond)
        pending, depth = pending[~settled], min(8 * depth, len(rows))
    if len(pending):
        found = _widened(query[pending], rows, k)
        scores[pending], index[pending] = found.scores, found.rows
    return Found(scores, index)


def _widened(query: Tensor, rows: Tensor, k: int) -> Found:
    found = merge([], len(query), k)
    step = _rows_a_block(rows)
    for start in range(0, len(rows), step):
        out = elva_kernels.topk(query, rows[start : start + step].float(), k)
        found = merge([found, Found(out.scores, out.index + start)], len(query), k)
    return found


def _among(query: Tensor, rows: Tensor, k: int, allowed: np.ndarray) -> Found:
    """The k best of the allowed rows."""
    live = int(allowed.sum())
    dropped = len(rows) - live
    if not live:
        return merge([], len(query), k)
    may = torch.from_numpy(np.ascontiguousarray(allowed))
    if dropped <= MAX_DROPPED:
        found = top(query, rows, k + dropped)
        keep = may[found.rows]
        # The kept ones first, in their order; every query keeps at least `wanted`.
        order = (~keep).to(torch.int8).sort(dim=1, stable=True).indices[:, : min(k, live)]
        return Found(found.scores.gather(1, order), found.rows.gather(1, order))
    chosen = may.nonzero()[:, 0]
    found = merge([], len(query), k)
    for some in chosen.split(_rows_a_block(rows)):
        one = top(query, rows[some], k)
        found = merge([found, Found(one.scores, some[one.rows])], len(query), k)
    return found


def _rows_a_block(rows: Tensor) -> int:
    return max(1, (BLOCK_MB << 20) // (rows.shape[1] * rows.element_size()))
