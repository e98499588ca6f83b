"""Exact search, in blocks: eq. 15."""

from typing import NamedTuple

import torch
from torch import Tensor

from elva_kernels.reference.rows import compute_dtype, scaled, unit

# Elements of a corpus block in `topk`, and of its products with some queries: a few tens of MB.
_BLOCK_ELEMENTS = 2**20
_PRODUCT_ELEMENTS = 2**22


class TopK(NamedTuple):
    """The best corpus rows of each query, best first; of equal scores the lower row.

    Attributes:
        scores: [Q, min(k, P)] float32, or float64 for float64 inputs.
        index: [Q, min(k, P)] int64, rows of the corpus.
    """

    scores: Tensor
    index: Tensor  # type: ignore[assignment]  # a method of tuples that nobody misses


def topk(query: Tensor, corpus: Tensor, k: int, *, metric: str) -> TopK:
    """Eq. 15 for query [Q, D] and corpus [P, D], read in blocks: float32 copies are small.

    A score is a product and a sum over its own two rows, and blocks have at least two rows (torch
    may sum a lone row in parts), so copies of a row score the same bits wherever they are.
    """
    kept = min(k, corpus.shape[0])
    dtype = compute_dtype(query.dtype)
    best = TopK(
        query.new_empty((query.shape[0], 0), dtype=dtype),
        torch.empty((query.shape[0], 0), dtype=torch.int64, device=query.device),
    )
    if kept == 0:
        return best
    height = max(2, _BLOCK_ELEMENTS // corpus.shape[1])
    start = 0
    for block in corpus.detach().tensor_split(-(-corpus.shape[0] // height)):
        scores = _flat_scores(query.detach(), block, metric)
        index = torch.arange(start, start + block.shape[0], device=query.device)
        scores = torch.cat([best.scores, scores], -1)
        index = torch.cat([best.index, index.expand(query.shape[0], -1)], -1)
        order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
        best = TopK(scores.gather(-1, order), index.gather(-1, order))
        start += block.shape[0]
    return best


def _flat_scores(query: Tensor, rows: Tensor, metric: str) -> Tensor:
    """Scores [Q, P] of eq. 15; -inf where the query or the row is not finite."""
    dtype = compute_dtype(rows.dtype)
    finite = torch.isfinite(query).all(-1, keepdim=True) & torch.isfinite(rows).all(-1)
    if metric == "cosine":
        scores = _dots(unit(query), unit(rows)).clamp(-1, 1)
    else:
        query, query_exponent = scaled(query)
        rows, exponent = scaled(rows)
        scores = _dots(query, rows).double()
        steps = 4  # so that each power lies inside the range of float64
        for step in range(steps):
            part = (query_exponent + exponent.mT + step) // steps  # they sum to the whole
            scores = scores * torch.exp2(part.double())
    return torch.where(finite, scores, -torch.inf).to(dtype) + 0.0  # -0 becomes 0


def _dots(query: Tensor, rows: Tensor) -> Tensor:
    """[Q, P], some queries at a time."""
    count = max(1, _PRODUCT_ELEMENTS // rows.numel())
    return torch.cat([(part.unsqueeze(1) * rows).sum(-1) for part in query.split(count)])
