"""Ranks of a task's queries against its pool, exact and pessimistic.

They come from `elva_kernels.ranking_reward` itself, with every other candidate of the pool as a
negative, so a tie counts against the positive.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import elva_kernels
from elva.evaluation.metrics import is_first
from elva.index import exact


@dataclass(frozen=True)
class Ranking:
    """One task's queries against its pool."""

    rank: Tensor  # [Q] int32, 1-based, pessimistic; of the best-placed positive
    top: Tensor  # [Q, 5] pool rows, best first


def recall_at_k(rank: Tensor, k: int) -> float:
    """Share of queries whose best positive is among the first k: M-BEIR's hit@k."""
    return (rank <= k).float().mean().item()


def rank_all(
    query: Tensor, pool: Tensor, positives: Sequence[Sequence[int]], allowed: Tensor | None = None
) -> Ranking:
    """Rank every query's best positive among the pool.

    Args:
        query: [Q, D] fp32; pool: [P, D] fp32.
        positives: pool rows of each query's right answers.
        allowed: [Q, P] bool, the candidates that compete (the positive always does); None for all.
    """
    best = torch.tensor([_best(query[i], pool, rows) for i, rows in enumerate(positives)])
    competes = torch.ones(len(query), len(pool), dtype=torch.bool) if allowed is None else allowed
    mask = competes.clone()
    for i, rows in enumerate(positives):
        mask[i, list(rows)] = False
    out = elva_kernels.ranking_reward(query, pool[best], pool.expand(len(query), -1, -1), mask=mask)
    scores = out.scores[:, 1:].scatter(1, best[:, None], out.scores[:, :1])
    top = scores.sort(dim=1, descending=True, stable=True).indices[:, :5]
    return Ranking(out.rank, top)


def _best(query: Tensor, pool: Tensor, rows: Sequence[int]) -> int:
    if len(rows) == 1:
        return rows[0]
    return list(rows)[int(torch.cosine_similarity(query[None], pool[list(rows)]).argmax())]


def leads_its_own(
    query: Tensor, ids: Sequence[str], rows: Tensor, positives: Collection[str]
) -> bool:
    """Whether a positive leads all others of a query's own candidates; a tie counts against it.

    Args:
        query: [1, D]; rows: [n, D] embeddings of the candidates `ids`.
    """
    found = exact.top(query, rows, len(ids))
    answers = zip(found.rows[0].tolist(), found.scores[0].tolist(), strict=True)
    return is_first({ids[r]: score for r, score in answers}, positives)
