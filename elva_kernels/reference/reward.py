"""The grouped reward and its relatives: eq. 1 to 7, 3g and 4g."""

from typing import NamedTuple

import torch
from torch import Tensor

from elva_kernels.reference.rows import compute_dtype, leaf, unit

# Rewards closer than this are the same reward: at fp32 their difference is rounding, and dividing
# it by its own standard deviation would make a signal of it. Ours.
SAME_REWARD = 1e-6
# Of a reward in float64, so that neither squares nor their sum overflow. Ours.
LARGEST_EXPONENT = 400

Wanted = tuple[bool, bool, bool]  # of the gradients on query, positive and negatives
ALL: Wanted = (True, True, True)


class Weights(NamedTuple):
    """The scalars of the reward, as they travel from a public function to the kernels."""

    margin: float  # delta of eq. 3
    rank_penalty: float  # gamma of eq. 4
    w_margin: float  # alpha of eq. 5
    w_rank: float  # epsilon of eq. 5
    rank_temperature: float = 0.0  # of eq. 6; 0 for the integer ranks of eq. 2


class RankingReward(NamedTuple):
    """The reward of each group, its two terms, the positive's rank, and the scores it rests on.

    All float32, or float64 for float64 inputs, but the rank.

    Attributes:
        reward: [*], higher is better; it alone carries the gradient.
        margin_reward: [*], eq. 3, before `w_margin`.
        rank_reward: [*], eq. 4, before `w_rank`.
        rank: [*] int32, of the positive among all N + 1 candidates, from 1; it loses ties.
        scores: [*, N + 1], cosines in [-1, 1], the positive's first; -inf of masked negatives.
    """

    reward: Tensor
    margin_reward: Tensor
    rank_reward: Tensor
    rank: Tensor
    scores: Tensor


def ranking_reward(
    query: Tensor,  # [*, D]
    positive: Tensor,  # [*, D]
    negatives: Tensor,  # [*, N, D]; with an index a bank [M, D]
    mask: Tensor | None,  # [*, N], True = live
    weights: Weights,
    negative_index: Tensor | None = None,  # int64 [*, N]
    relevance: Tensor | None = None,  # [*, N], in the scores' dtype
) -> RankingReward:
    """Eq. 1 to 6: the reward of ranking `positive` above `negatives` for `query`.

    With `negative_index` a group's negative i is row negative_index[..., i] of the bank: -1 hides
    it as the mask does, and -2 stands for a row that is not finite.
    """
    scores = cosine_scores(query, positive, negatives, mask, negative_index)
    if negative_index is not None:
        named = negative_index != -1
        mask = named if mask is None else mask & named
    return reward_from_scores(scores, mask, weights, relevance)


def cosine_scores(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    negative_index: Tensor | None = None,
) -> Tensor:
    """Eq. 1: scores [*, N + 1], the positive first. Rows behind the mask are never read."""
    if negative_index is not None:
        units = _units_of_bank(negatives, mask, negative_index)
    elif mask is not None:
        units = unit(torch.where(mask.unsqueeze(-1), negatives, 0))
    else:
        units = unit(negatives)
    query = unit(query).unsqueeze(-2)
    positive_score = _cosine(query, unit(positive).unsqueeze(-2))
    negative_scores = _cosine(query, units)
    leading = torch.broadcast_shapes(positive_score.shape[:-1], negative_scores.shape[:-1])
    return torch.cat(
        [positive_score.expand(*leading, 1), negative_scores.expand(*leading, -1)], dim=-1
    )


def _units_of_bank(bank: Tensor, mask: Tensor | None, index: Tensor) -> Tensor:
    """Unit rows [*, N, D] of a bank [M, D]: 0 for index -1 and behind the mask, NaN for -2.

    Rows become unit rows before they are gathered, so that a row's gradient is summed over its
    occurrences before it is divided by the row's norm. A row that nobody names is never read.
    """
    if mask is not None:
        index = torch.where(mask, index, -1)
    m, size = bank.shape
    place = torch.where(index < 0, m - 1 - index, index)  # -1 and -2: two rows behind the bank
    named = torch.zeros(m + 2, dtype=torch.bool, device=bank.device)
    named[place.flatten()] = True
    units = unit(torch.where(named[:m].unsqueeze(-1), bank, 0))
    hidden, bad = units.new_zeros(1, size), units.new_full((1, size), torch.nan)
    return torch.cat([units, hidden, bad])[place]


def reward_from_scores(
    scores: Tensor,  # [*, N + 1], the positive first
    mask: Tensor | None,  # [*, N], True = live
    weights: Weights,
    relevance: Tensor | None = None,  # [*, N], in the compute dtype
) -> RankingReward:
    """Eq. 2 to 6 on given scores, with a relevance 3g and 4g in place of 3 and 4.

    A group with a live score that is not finite, or a live relevance outside [0, 1], has a NaN
    reward.
    """
    scores = scores.to(compute_dtype(scores.dtype)).contiguous()  # sums in the same order
    if relevance is not None:  # over the groups that it tells apart
        leading = torch.broadcast_shapes(scores.shape[:-1], relevance.shape[:-1])
        scores = scores.expand(*leading, -1).contiguous()
    live = _live(scores, mask)
    counted = torch.where(live, scores, 0.0)
    sound = torch.isfinite(counted).all(-1)
    if relevance is not None:
        grade = torch.where(live[..., 1:], relevance.detach(), 0.0)
        graded = (grade >= 0) & (grade <= 1)
        sound = sound & graded.all(-1)
        grade = torch.where(graded, grade, 0.0)

    # Non-finite scores rank below every finite one; masked negatives come after all live ones.
    order_key = torch.where(live & torch.isfinite(counted), counted, -torch.inf).detach()
    positive_key, negative_keys = order_key[..., :1], order_key[..., 1:]
    rank = 1 + (live[..., 1:] & (negative_keys >= positive_key)).sum(-1)  # eq. 2
    order = negative_keys.argsort(dim=-1, descending=True, stable=True)
    negative_ranks = 1 + order.argsort(-1) + (positive_key > negative_keys)  # eq. 2
    ranks = torch.cat([rank.unsqueeze(-1), negative_ranks], dim=-1).to(scores.dtype)
    if weights.rank_temperature > 0:
        ranks = _soft_ranks(counted, live, weights.rank_temperature)

    log_rank = ranks.log()
    contrast = counted[..., 0] / (1 + log_rank[..., 0])
    negatives = rivals = counted[..., 1:]
    if relevance is not None:
        rivals = negatives - weights.margin * grade  # in eq. 3g
        order = torch.where(live[..., 1:], rivals, -torch.inf).detach()
        order = order.argsort(dim=-1, descending=True, stable=True)
        contrast = contrast + (negatives * grade / (1 + log_rank[..., 1:])).sum(-1)  # eq. 4g
        negatives = negatives * (1 - grade)
    margin_reward = _hinge(counted[..., 0], rivals, order, live, weights.margin)  # eq. 3
    penalty = (negatives * (log_rank[..., 1:] - 1)).sum(-1)
    rank_reward = contrast - weights.rank_penalty * penalty  # eq. 4

    # As a factor, NaN reaches the gradient of every live candidate of the group too.
    soundness = torch.where(sound, 1.0, torch.nan).to(scores.dtype)
    margin_reward = margin_reward * soundness
    rank_reward = rank_reward * soundness
    return RankingReward(
        reward=weights.w_margin * margin_reward + weights.w_rank * rank_reward,  # eq. 5
        margin_reward=margin_reward.detach(),
        rank_reward=rank_reward.detach(),
        rank=rank.to(torch.int32),
        scores=live_scores(scores, mask).detach(),
    )


def live_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """`scores` as results hold them: in the compute dtype, -inf behind the mask."""
    dtype = compute_dtype(scores.dtype)
    if mask is None:
        return scores.to(dtype, copy=True, memory_format=torch.contiguous_format)
    scores = scores.to(dtype)
    return torch.where(_live(scores, mask), scores, -torch.inf)


def ranking_reward_and_grad(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    upstream: Tensor | None,  # [*], the gradient on the reward; None is 1
    weights: Weights,
    negative_index: Tensor | None = None,
    wrt: Wanted = ALL,
    relevance: Tensor | None = None,
) -> tuple[RankingReward, Tensor | None, Tensor | None, Tensor | None]:
    """The reward, and autograd's gradient of sum(upstream * reward) on each input in `wrt`."""
    with torch.inference_mode(False), torch.enable_grad():
        q, p, n = inputs = [leaf(x) for x in (query, positive, negatives)]
        leaves = [x.requires_grad_() for x, wanted in zip(inputs, wrt, strict=True) if wanted]
        given = (mask, negative_index, relevance)
        mask, negative_index, relevance = (None if x is None else leaf(x) for x in given)
        result = ranking_reward(q, p, n, mask, weights, negative_index, relevance)
        found = iter(_gradients(result.reward, leaves, upstream))
    grad_query, grad_positive, grad_negatives = (next(found) if x else None for x in wrt)
    return result, grad_query, grad_positive, grad_negatives


def reward_from_scores_backward(
    scores: Tensor,
    mask: Tensor | None,
    grad_reward: Tensor,
    weights: Weights,
    relevance: Tensor | None = None,
) -> Tensor:
    """Autograd's gradient of sum(grad_reward * reward) on `scores`."""
    with torch.inference_mode(False), torch.enable_grad():
        begin = leaf(scores).requires_grad_()
        mask, relevance = (None if x is None else leaf(x) for x in (mask, relevance))
        reward = reward_from_scores(begin, mask, weights, relevance).reward
        (grad_scores,) = torch.autograd.grad(reward, begin, _upstream(grad_reward, reward))
    return grad_scores


def group_advantages(reward: Tensor, *, scale: str, std_eps: float) -> Tensor:
    """Eq. 7 over the last dimension; `scale` picks the divisor: "std", "batch" or "none".

    Computed in float64 and rounded once, so that no finite reward overflows its own variance;
    rewards that would in float64 are divided by a power of two.
    """
    exact = reward.detach().to(torch.float64)
    spread = exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)
    sound = torch.isfinite(exact).all(-1, keepdim=True)
    unit = _reward_unit(torch.where(sound, exact, 0.0), whole=scale == "batch")
    exact = exact / unit
    deviation = exact - exact.mean(-1, keepdim=True)
    if scale == "std":
        deviation = deviation / (_std(exact).unsqueeze(-1) + std_eps / unit)
    elif scale == "batch":
        counts = sound.expand_as(exact)
        deviation = deviation / (_std(exact.flatten(), counts.flatten()) + std_eps / unit)
    else:
        deviation = deviation * unit
    advantage = torch.where(spread < SAME_REWARD, 0.0, deviation)
    return torch.where(sound, advantage, torch.nan).to(compute_dtype(reward.dtype))


def _live(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Bool [*, N + 1]: the positive and the unmasked negatives."""
    live = torch.ones_like(scores, dtype=torch.bool)
    if mask is None:
        return live
    leading = torch.broadcast_shapes(scores.shape[:-1], mask.shape[:-1])
    return torch.cat([live[..., :1].expand(*leading, 1), mask.expand(*leading, -1)], dim=-1)


def _gradients(reward: Tensor, leaves: list[Tensor], upstream: Tensor | None) -> tuple[Tensor, ...]:
    return torch.autograd.grad(reward, leaves, _upstream(upstream, reward)) if leaves else ()


def _upstream(upstream: Tensor | None, reward: Tensor) -> Tensor:
    return torch.ones_like(reward) if upstream is None else leaf(upstream).to(reward.dtype)


def _cosine(query: Tensor, candidates: Tensor) -> Tensor:
    """Dot products of unit rows, clamped to [-1, 1]; the gradient is the unclamped product's.

    A product and a sum, not a matmul: no TF32, and a row's bits do not depend on its batch.
    """
    score = (query * candidates).sum(-1)
    return score + (score.clamp(-1, 1) - score).detach()


def _hinge(positive: Tensor, rivals: Tensor, order: Tensor, live: Tensor, margin: float) -> Tensor:
    """Eq. 3; 0 for a group without live negatives. `order` puts the hardest of the rivals first."""
    if order.shape[-1] == 0:
        return torch.zeros_like(positive)
    hardest = rivals.gather(-1, order[..., :1]).squeeze(-1)
    return torch.where(live[..., 1:].any(-1), torch.relu(positive - hardest - margin), 0.0)


def _soft_ranks(counted: Tensor, live: Tensor, rank_temperature: float) -> Tensor:
    """Eq. 6: [*, N + 1], differentiable.

    In float64: torch's sum of float32 terms depends on the threads that share them.
    """
    exact = counted.double()
    ahead = torch.sigmoid((exact.unsqueeze(-2) - exact.unsqueeze(-1)) / rank_temperature)
    itself = torch.eye(counted.shape[-1], dtype=torch.bool, device=counted.device)
    ranks = 1 + torch.where(live.unsqueeze(-2) & ~itself, ahead, 0.0).sum(-1)
    return ranks.to(counted.dtype)


def _reward_unit(rewards: Tensor, *, whole: bool) -> Tensor:
    """[*, 1] 1, or the power of two that brings a group's largest reward to LARGEST_EXPONENT.

    `whole`: [], one power for all groups.
    """
    largest = rewards.abs().amax(-1, keepdim=True)
    if whole and largest.numel() > 0:
        largest = largest.amax()
    excess = torch.frexp(largest).exponent - LARGEST_EXPONENT
    return torch.exp2(excess.clamp(min=0).double())


def _std(values: Tensor, counts: Tensor | None = None) -> Tensor:
    """Unbiased standard deviation over the last dimension, of the entries where `counts` holds."""
    if counts is None:
        counts = torch.ones_like(values, dtype=torch.bool)
    n = counts.sum(-1, keepdim=True)
    mean = torch.where(counts, values, 0.0).sum(-1, keepdim=True) / n
    square = torch.where(counts, values - mean, 0.0).square().sum(-1)
    return (square / (n.squeeze(-1) - 1).clamp(min=1)).sqrt()
