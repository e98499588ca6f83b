"""Flat search by blocks: scores of some corpus rows at a time, the best so far kept."""

from collections.abc import Callable

import torch
from torch import Tensor

from elva_kernels.reference import compute_dtype


def search(
    query: Tensor, rows: int, k: int, step: int, scores_of: Callable[[slice], Tensor]
) -> tuple[Tensor, Tensor]:
    """Scores and indices [Q, min(k, rows)], as `reference.topk`.

    Args:
        query: [Q, ...], on the device and of the dtype that scores follow.
        rows: of the corpus.
        step: as many at a time.
        scores_of: of those of a slice, n, the scores [Q, n] in `compute_dtype`, without NaN.
    """
    q, k, dtype = len(query), min(k, rows), compute_dtype(query.dtype)
    best = torch.empty(q, 0, dtype=dtype, device=query.device)
    index = torch.empty(q, 0, dtype=torch.int64, device=query.device)
    if q == 0 or k == 0:
        return best.new_empty(q, k), index.new_empty(q, k)
    for first in range(0, rows, step):
        scores = scores_of(slice(first, first + step))
        found, place = best_of(scores, min(k, scores.shape[1]))
        # Earlier rows stand first, so that a place among both decides as an index does.
        both, indices = torch.cat([best, found], 1), torch.cat([index, place + first], 1)
        best, place = best_of(both, min(k, both.shape[1]))
        index = indices.gather(1, place)
    return best.contiguous(), index.contiguous()


def best_of(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k first of each row: score descending, then index ascending; no NaN among the scores.

    By unique integers, of which any top-k gives the same; float64 by a stable sort.
    """
    if scores.dtype == torch.float64:
        best, index = scores.sort(dim=1, descending=True, stable=True)
        return best[:, :k], index[:, :k]
    bits = (scores + 0.0).view(torch.int32).long()  # -0 becomes 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    behind = torch.arange(scores.shape[1], device=scores.device).bitwise_not() & 0xFFFFFFFF
    best = (ordered << 32 | behind).topk(k, dim=1).values
    index = best.bitwise_not() & 0xFFFFFFFF
    return scores.gather(1, index) + 0.0, index
