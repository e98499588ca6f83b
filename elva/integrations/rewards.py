"""Rewards of rollouts by their embeddings: ELVA's, UME-R1's and Embed-RL's, all by elva_kernels.

A reward is a function of the rollouts' embeddings and of what they are ranked against; it returns
its own value, `reward`, and its parts, each [R], NaN for a rollout that has no positive or no
negative. `RECIPES` names them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

import elva_kernels


class Candidates(NamedTuple):
    """What R rollouts are ranked against.

    Args:
        rows: [M, D] embeddings of candidates, in the rollouts' dtype and on their device.
        target: integers [R, P] in [0, M), each rollout's positives, filled up with -1. None of them
            is its negative.
        negative_index: integers [R, N] in [0, M), each rollout's negatives, filled up with -1.
            None: every row that is not one of its positives, the in-batch negatives of contrastive
            training.
        group: a process group, without `negative_index` only: `rows` are this process's, `target`
            counts those of all processes in the order of their ranks, and all are ranked; every
            process has to make the call. None: this process alone.
    """

    rows: Tensor
    target: Tensor
    negative_index: Tensor | None = None
    group: ProcessGroup | None = None


class Ranked(NamedTuple):
    """Where each rollout's positives stand among its negatives.

    Args:
        rank: integers [R, P], 1 + how many negatives score as high as the positive or higher; 0
            where `target` is -1.
        positive_scores: [R, P] cosine similarities, -inf where `target` is -1.
        negative_scores: [R, N] cosine similarities in any order, -inf where there is no negative.
    """

    rank: Tensor
    positive_scores: Tensor
    negative_scores: Tensor


def rank(query: Tensor, candidates: Candidates) -> Ranked:
    """The ranks and similarities of rollouts' positives and negatives, in one call of a kernel.

    Args:
        query: [R, D] embeddings of rollouts, floating.
        candidates: what they are ranked against.

    Example::

        >>> rank(torch.eye(2), Candidates(torch.eye(2), torch.tensor([[0], [1]]))).rank
        tensor([[1],
                [1]], dtype=torch.int32)
    """
    rows, target, index, group = candidates
    if index is None:
        found = elva_kernels.rank_statistics(
            query, rows, target, k=2**31, group=group, global_target=group is not None
        )
        return Ranked(found.rank, found.target_score, found.topk_scores)
    each = elva_kernels.ranking_reward(
        query[:, None], rows[target.clamp(min=0)], rows, negative_index=_negatives(candidates)
    )
    there = target >= 0
    scores = each.scores
    return Ranked(
        each.rank * there, scores[..., 0].where(there, -torch.inf), scores[:, :1, 1:].flatten(1)
    )


def positives_among_top(ranked: Ranked) -> Tensor:
    """The share of a rollout's P positives among its P best candidates, [R] in [0, 1].

    A positive loses every tie with a negative. NaN without a positive.

    Example::

        >>> query, rows = torch.eye(2)[:1], torch.tensor([[1.0, 0], [0, 1], [1, 1]])
        >>> positives_among_top(rank(query, Candidates(rows, torch.tensor([[0, 1]]))))
        tensor([0.5000])
    """
    there = ranked.rank > 0
    count = there.sum(1)
    among_negatives = ranked.rank.long().where(there, 2**32).sort(1).values
    place = among_negatives + torch.arange(there.shape[1], device=there.device)  # with positives
    return (place <= count[:, None]).sum(1).to(ranked.positive_scores) / count


def similarity_gap(ranked: Ranked, *, temperature: float | None = None) -> Tensor:
    """Mean similarity of a rollout's positives less that of its negatives, [R] in [-2, 2].

    Args:
        ranked: of `rank`.
        temperature: > 0: negatives are weighted by the softmax of their similarities divided by it,
            so that the hardest count most. None: all count alike.

    NaN without a positive or a negative.
    """
    scores = ranked.negative_scores
    live = scores != -torch.inf
    logits = torch.zeros_like(scores) if temperature is None else scores / temperature
    weights = logits.masked_fill(~live, -torch.inf).softmax(1)
    negative = (weights * scores.where(live, 0)).sum(1)
    return _mean(ranked.positive_scores, ranked.rank > 0) - negative


def ranking(query: Tensor, candidates: Candidates, **weights: Any) -> dict[str, Tensor]:
    """ELVA's reward (Liu et al., arXiv:2606.20280, sec. 3.4), the mean over a rollout's positives.

    Args:
        query: [R, D] embeddings of rollouts, floating.
        candidates: what they are ranked against. Without `negative_index` the rank penalty ends at
            rank 100, as `elva_kernels.in_batch_ranking_reward` has it.
        weights: `margin`, `rank_penalty`, `w_margin`, `w_rank` of `elva_kernels.ranking_reward`.

    Returns:
        `reward`, `margin_reward`, `rank_reward` and `rank`, the best of the positives', each [R].
    """
    rows, target, index, group = candidates
    there = target >= 0
    if index is None:
        whole = elva_kernels.in_batch_ranking_reward(
            query, rows, target, group=group, global_target=group is not None, **weights
        )
        parts = {name: getattr(whole, name) for name in ("reward", "margin_reward", "rank_reward")}
        ranks, negatives = whole.rank, whole.scores[:, target.shape[1] :]
    else:
        each = elva_kernels.ranking_reward(
            query[:, None], rows[target.clamp(min=0)], rows,
            negative_index=_negatives(candidates), **weights,
        )  # fmt: skip
        parts = {
            name: _mean(getattr(each, name), there)
            for name in ("reward", "margin_reward", "rank_reward")
        }
        ranks, negatives = each.rank, each.scores[:, 0, 1:]
    parts["rank"] = ranks.where(there, 2**31 - 1).amin(1).to(parts["reward"])
    sound = there.any(1) & (negatives != -torch.inf).any(1)
    return {name: part.where(sound, torch.nan) for name, part in parts.items()}


def ume_r1(query: Tensor, candidates: Candidates) -> dict[str, Tensor]:
    """UME-R1's reward (Lan et al., arXiv:2511.00405): positives among the top, times the gap.

    Differs from the paper: its candidates are rollouts too, here they are whatever `candidates`
    holds; and of a tie between a positive and a negative it says nothing, here the positive loses.

    Args:
        query: [R, D] embeddings of rollouts, floating.
        candidates: what they are ranked against.

    Returns:
        `reward`, `positives_among_top` and `similarity_gap`, each [R].
    """
    return _share_times_gap(rank(query, candidates), None)


def embed_rl(
    query: Tensor, candidates: Candidates, *, temperature: float = 0.5
) -> dict[str, Tensor]:
    """Embed-RL's outcome reward (Jiang et al., arXiv:2602.13823, eq. 3): UME-R1's, the gap taken to
    negatives weighted by a softmax.

    Differs from the paper as `ume_r1` does. Its process reward asks a language model, and is not
    here.

    Args:
        query: [R, D] embeddings of rollouts, floating.
        candidates: what they are ranked against.
        temperature: > 0, of the softmax over negatives; 0.5 is the paper's.

    Returns:
        `reward`, `positives_among_top` and `similarity_gap`, each [R].

    Raises:
        ValueError: the temperature is no positive number.
    """
    if not 0 < temperature < torch.inf:
        raise ValueError(f"embed_rl: temperature must be positive and finite, got {temperature}")
    return _share_times_gap(rank(query, candidates), temperature)


Recipe = Callable[..., dict[str, Tensor]]
"""A reward: (query [R, D], candidates, settings by name) -> `reward` and its parts, each [R]."""

RECIPES: dict[str, Recipe] = {"ranking": ranking, "ume_r1": ume_r1, "embed_rl": embed_rl}


def _share_times_gap(ranked: Ranked, temperature: float | None) -> dict[str, Tensor]:
    gap = similarity_gap(ranked, temperature=temperature)
    share = positives_among_top(ranked)
    return {"reward": share * gap, "positives_among_top": share, "similarity_gap": gap}


def _negatives(candidates: Candidates) -> Tensor:
    """[R, 1, N] for every positive of a rollout: none of them is a negative."""
    index, target = candidates.negative_index, candidates.target
    own = (index[:, :, None] == target[:, None]).any(-1)
    return index.masked_fill(own, -1)[:, None]


def _mean(values: Tensor, there: Tensor) -> Tensor:
    """[R] mean of those of [R, P] that are there; NaN of none."""
    return values.where(there, 0).sum(1) / there.sum(1)
