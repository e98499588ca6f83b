"""Exact search by the Triton kernels: the corpus block by block, the choice among them torch's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elva_kernels.backends.gpu.topk import search
from elva_kernels.backends.launcher import Tensors
from elva_kernels.backends.steps import Units
from elva_kernels.backends.triton import launch
from elva_kernels.backends.triton.in_batch import BLOCK, multiply, options, units_of
from elva_kernels.reference import compute_dtype

_WORKSPACE_BYTES = 256 << 20  # of scores, and of copies of the corpus's rows; ours


def topk(query: Tensor, corpus: Tensor, k: int, *, metric: str) -> Tensors:
    """Scores and indices [Q, min(k, P)], as `reference.topk`."""
    cosine = metric == "cosine"
    queries = _scaled(units_of(query), cosine)
    row_bytes = max(1, len(query) * 8, corpus.shape[1] * corpus.element_size())
    step = max(BLOCK, _WORKSPACE_BYTES // row_bytes)

    def scores_of(some: slice) -> Tensor:
        return _scores(queries, _scaled(units_of(corpus[some]), cosine), cosine)

    return search(query, len(corpus), k, step, scores_of)


def _scaled(units: Units, cosine: bool) -> Units:
    """With norms that make cosines of products, or the rows' own powers of two."""
    if cosine:
        return units
    inverse, exponent = units.norm.unbind(1)
    power = torch.where(inverse.isnan(), math.nan, exponent.exp2())
    return units._replace(norm=torch.stack([power, exponent], 1))


def _scores(queries: Units, rows: Units, cosine: bool) -> Tensor:
    from elva_kernels.backends.triton.kernels import topk as kernels

    q, n = len(queries.rows), len(rows.rows)
    dtype, device = compute_dtype(queries.rows.dtype), queries.rows.device
    scores = launch.empty((q, n), dtype, device)
    multiply(queries.rows, rows.rows.T, scores, outer=(queries.norm, rows.norm))
    with launch.on(device):
        kernels.finish_scores_kernel[(q * -(-n // BLOCK),)](
            scores,
            queries.norm,
            rows.norm,
            n,
            COSINE=cosine,
            BLOCK=BLOCK,
            **options(launch.architecture_of(device)),
        )
    return scores
