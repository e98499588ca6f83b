"""Ranks of queries against their pool, exact and pessimistic, as elva_kernels gives them.

A positive loses every tie, positives of one query do not compete with each other, and of several
the best placed counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

import elva_kernels

_TOP = 5
"""Answers that a ranking keeps of each query."""


@dataclass(frozen=True)
class Ranking:
    """One task's queries against its pool."""

    rank: Tensor  # [Q] int32, 1-based, of the best-placed positive; P + 1 without one in the pool
    top: Tensor  # [Q, 5] pool rows, best first; -1 where there are fewer
    reward: Tensor  # [Q] fp32, against the hardest 100; 0 without a positive in the pool
    margin_reward: Tensor  # [Q] fp32, the part of it that pays the margin, unweighted
    rank_reward: Tensor  # [Q] fp32, the part that pays the rank


def recall_at_k(rank: Tensor, k: int) -> float:
    """Share of queries whose best positive is among the first k: M-BEIR's hit@k."""
    return (rank <= k).double().mean().item()


def chance_at_k(positives: Sequence[Sequence[int]], pool: int, k: int) -> float:
    """The recall_at_k of an order drawn at random."""
    missed = (comb(pool - len(set(rows)), k) / comb(pool, k) for rows in positives)
    return 1.0 if k >= pool else 1 - fmean(missed)


def rank_all(
    query: Tensor,
    pool: Tensor,
    positives: Sequence[Sequence[int]],
    identities: np.ndarray | None = None,
) -> Ranking:
    """Rank every query's best positive among the pool.

    Args:
        query: [Q, D] fp32; pool: [P, D] fp32.
        positives: pool rows of each query's right answers, possibly none.
        identities: [P] int64, the content of each row; copies of a query's positives do not
            compete with them. None: all differ.
    """
    target = _padded(positives)
    ids = None if identities is None else torch.from_numpy(identities)
    found = elva_kernels.rank_statistics(query, pool, target, k=_TOP, candidate_ids=ids)
    # The paper's reward (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4) with its 100 negatives.
    paid = elva_kernels.in_batch_ranking_reward(query, pool, target, head=100, candidate_ids=ids)
    rank = found.rank.where(target >= 0, len(pool) + 1).amin(1)
    rows, order = torch.cat([target, found.topk_index], 1).sort(dim=1)
    scores = torch.cat([found.target_score, found.topk_scores], 1).gather(1, order)
    scores = scores.where(rows >= 0, -torch.inf)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :_TOP]
    return Ranking(rank, rows.gather(1, best), paid.reward, paid.margin_reward, paid.rank_reward)


def rank_among(
    query: Tensor,
    bank: Tensor,
    positives: Sequence[Sequence[int]],
    rivals: Sequence[Sequence[int]],
) -> Tensor:
    """[Q] int32, the rank of each query's best positive among its own candidates.

    Args:
        query: [Q, D] fp32; bank: [M, D] fp32.
        positives: rows of the bank, right answers; without one a query ranks behind all rivals.
        rivals: rows of the bank that compete; positives among them do not.
    """
    wrong = _padded([[r for r in some if r not in right]
                     for some, right in zip(rivals, positives, strict=True)])  # fmt: skip
    asked = torch.tensor([i for i, rows in enumerate(positives) for _ in rows], dtype=torch.int64)
    right = torch.tensor([row for rows in positives for row in rows], dtype=torch.int64)
    found = elva_kernels.ranking_reward(
        query[asked], bank[right], bank, negative_index=wrong[asked]
    )
    last = (wrong >= 0).sum(1).to(torch.int32) + 1
    return last.scatter_reduce(0, asked, found.rank, "amin")


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """[Q, n] int64, filled up with -1; n is at least 1."""
    width = max([1, *map(len, rows)])
    filled = [[*some, *[-1] * (width - len(some))] for some in rows]
    return torch.tensor(filled, dtype=torch.int64).reshape(len(rows), width)
