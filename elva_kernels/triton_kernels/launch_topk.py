"""Launches the Triton kernels of flat search: the corpus block by block, the best so far kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elva_kernels.in_batch import Units
from elva_kernels.reference import compute_dtype
from elva_kernels.triton_kernels import launch
from elva_kernels.triton_kernels.launch_batch import (
    _BLOCK,
    best_of,
    multiply,
    options,
    units_of,
)

_WORKSPACE_BYTES = 256 << 20  # of scores, and of copies of the corpus's rows; ours


def topk(query: Tensor, corpus: Tensor, k: int, *, metric: str) -> tuple[Tensor, Tensor]:
    """Scores and indices [Q, min(k, P)], as `reference.topk`."""
    q, p = len(query), len(corpus)
    k, dtype = min(k, p), compute_dtype(query.dtype)
    best = torch.empty(q, 0, dtype=dtype, device=query.device)
    index = torch.empty(q, 0, dtype=torch.int64, device=query.device)
    if q == 0 or k == 0:
        return best.new_empty(q, k), index.new_empty(q, k)
    cosine = metric == "cosine"
    queries = _scaled(units_of(query), cosine)
    row_bytes = max(q * 8, corpus.shape[1] * corpus.element_size())
    step = max(_BLOCK, _WORKSPACE_BYTES // row_bytes)
    for first in range(0, p, step):
        scores = _scores(queries, _scaled(units_of(corpus[first : first + step]), cosine), cosine)
        found, place = best_of(scores, min(k, scores.shape[1]))
        # Earlier rows stand first, so that a place among both decides as an index does.
        both, indices = torch.cat([best, found], 1), torch.cat([index, place + first], 1)
        best, place = best_of(both, min(k, both.shape[1]))
        index = indices.gather(1, place)
    return best.contiguous(), index.contiguous()


def _scaled(units: Units, cosine: bool) -> Units:
    """With norms that make cosines of products, or the rows' own powers of two."""
    if cosine:
        return units
    inverse, exponent = units.norm.unbind(1)
    power = torch.where(inverse.isnan(), math.nan, exponent.exp2())
    return units._replace(norm=torch.stack([power, exponent], 1))


def _scores(queries: Units, rows: Units, cosine: bool) -> Tensor:
    from elva_kernels.triton_kernels import topk as kernels

    q, n = len(queries.rows), len(rows.rows)
    dtype, device = compute_dtype(queries.rows.dtype), queries.rows.device
    scores = launch._empty((q, n), dtype, device)
    multiply(queries.rows, rows.rows.T, scores, outer=(queries.norm, rows.norm))
    with launch._on(device):
        kernels.finish_scores_kernel[(q * -(-n // _BLOCK),)](
            scores,
            queries.norm,
            rows.norm,
            n,
            COSINE=cosine,
            BLOCK=_BLOCK,
            **options(launch._architecture(device)),
        )
    return scores
