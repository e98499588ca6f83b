"""The definition of every op, in plain differentiable torch; every other backend must agree.

Source: Liu et al., ELVA, arXiv:2606.20280, sec. 3.4; the equation numbers are ours. `s_0` is the
positive's score, `s_i` (i = 1..N) a negative's, `r_i` the 1-based rank of candidate i.

    (1)  s_i      = q . c_i / (|q| |c_i|)
    (2)  r_i      = 1 + #{j : s_j > s_i} + #{j : s_j = s_i, j before i};
                    the positive comes after all its ties, the negatives in the order of indices
    (3)  R_margin = max(0, s_0 - max_i s_i - margin)
    (4)  R_rank   = s_0 / (1 + log r_0) - rank_penalty * sum_{i>0} s_i (log r_i - 1)
    (5)  R        = w_margin R_margin + w_rank R_rank
    (6)  r~_i     = 1 + sum_{j != i} sigmoid((s_j - s_i) / rank_temperature);
                    in place of r_i in (4) where a temperature is given; ours, not the paper's
    (7)  A_g      = (R_g - mean R) / (std R + std_eps)
                    GRPO: DeepSeekMath, arXiv:2402.03300, sec. 4.1
    (8)  topk(q)  = the k rows c with the largest s = q . c / (|q| |c|), or s = q . c;
                    equal scores in the order of indices

Ranks are constants to the gradient in (4), so autograd yields the closed form
    dR/ds_0 = w_margin [hinge open] + w_rank / (1 + log r_0)
    dR/ds_i = - w_margin [hinge open, i hardest] - w_rank rank_penalty (log r_i - 1)
    ds_i/dq = (c^_i - s_i q^) / |q|,  ds_i/dc_i = (q^ - s_i c^_i) / |c_i|,   x^ = x / |x|

Inputs are computed in float32 (float64 stays float64), so half inputs are rounded once, in the
gradient. Shapes broadcast over leading dimensions; arguments are taken as checked by `ops`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Rewards closer than this are the same reward: at fp32 their difference is rounding, and dividing
# it by its own standard deviation would make a signal of it. Ours.
SAME_REWARD = 1e-6

# Elements of a corpus block in `topk`, and of its products with some queries: a few tens of MB.
_BLOCK_ELEMENTS = 2**20
_PRODUCT_ELEMENTS = 2**22


class RankingReward(NamedTuple):
    """The reward of each group, its two terms, the positive's rank, and the scores it rests on."""

    reward: Tensor  # [*] carries the gradient
    margin_reward: Tensor  # [*] eq. 3, before w_margin
    rank_reward: Tensor  # [*] eq. 4, before w_rank
    rank: Tensor  # [*] int32, 1-based
    scores: Tensor  # [*, N + 1] the positive first; masked negatives are -inf


class TopK(NamedTuple):
    """The best corpus rows of each query, best first."""

    scores: Tensor  # [Q, min(k, P)]
    # int64 [Q, min(k, P)], rows of the corpus; in place of a method of tuples that nobody misses
    index: Tensor  # type: ignore[assignment]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and rewards for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ranking_reward(
    query: Tensor,  # [*, D]
    positive: Tensor,  # [*, D]
    negatives: Tensor,  # [*, N, D]
    mask: Tensor | None,  # [*, N], True = live
    *,
    margin: float,
    rank_penalty: float,
    w_margin: float,
    w_rank: float,
    rank_temperature: float = 0.0,
) -> RankingReward:
    """Eq. 1 to 6: the reward of ranking `positive` above `negatives` for `query`."""
    return reward_from_scores(
        cosine_scores(query, positive, negatives, mask),
        mask,
        margin=margin,
        rank_penalty=rank_penalty,
        w_margin=w_margin,
        w_rank=w_rank,
        rank_temperature=rank_temperature,
    )


def cosine_scores(
    query: Tensor, positive: Tensor, negatives: Tensor, mask: Tensor | None
) -> Tensor:
    """Eq. 1: scores [*, N + 1], the positive first. Rows behind the mask are never read."""
    if mask is not None:
        negatives = torch.where(mask.unsqueeze(-1), negatives, 0)
    query = _unit(query).unsqueeze(-2)
    positive_score = _cosine(query, _unit(positive).unsqueeze(-2))
    negative_scores = _cosine(query, _unit(negatives))
    leading = torch.broadcast_shapes(positive_score.shape[:-1], negative_scores.shape[:-1])
    return torch.cat(
        [positive_score.expand(*leading, 1), negative_scores.expand(*leading, -1)], dim=-1
    )


def reward_from_scores(
    scores: Tensor,  # [*, N + 1], the positive first
    mask: Tensor | None,  # [*, N], True = live
    *,
    margin: float,
    rank_penalty: float,
    w_margin: float,
    w_rank: float,
    rank_temperature: float = 0.0,
) -> RankingReward:
    """Eq. 2 to 6 on given scores. A group with a live non-finite score has a NaN reward."""
    scores = scores.to(compute_dtype(scores.dtype)).contiguous()  # sums in the same order
    live = _live(scores, mask)
    counted = torch.where(live, scores, 0.0)
    sound = torch.isfinite(counted).all(-1)

    # Non-finite scores rank below every finite one; masked negatives come after all live ones.
    order_key = torch.where(live & torch.isfinite(counted), counted, -torch.inf).detach()
    positive_key, negative_keys = order_key[..., :1], order_key[..., 1:]
    rank = 1 + (live[..., 1:] & (negative_keys >= positive_key)).sum(-1)  # eq. 2
    order = negative_keys.argsort(dim=-1, descending=True, stable=True)
    negative_ranks = 1 + order.argsort(-1) + (positive_key > negative_keys)  # eq. 2
    ranks = torch.cat([rank.unsqueeze(-1), negative_ranks], dim=-1).to(scores.dtype)
    if rank_temperature > 0:
        ranks = _soft_ranks(counted, live, rank_temperature)

    margin_reward = _hinge(counted, order, live, margin)  # eq. 3
    log_rank = ranks.log()
    contrast = counted[..., 0] / (1 + log_rank[..., 0])
    penalty = (counted[..., 1:] * (log_rank[..., 1:] - 1)).sum(-1)
    rank_reward = contrast - rank_penalty * penalty  # eq. 4

    # As a factor, NaN reaches the gradient of every live candidate of the group too.
    soundness = torch.where(sound, 1.0, torch.nan).to(scores.dtype)
    margin_reward = margin_reward * soundness
    rank_reward = rank_reward * soundness
    return RankingReward(
        reward=w_margin * margin_reward + w_rank * rank_reward,  # eq. 5
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
    weight: Tensor | None,  # [*], the upstream gradient; None is 1
    **weights: Any,
) -> tuple[RankingReward, Tensor, Tensor, Tensor]:
    """The reward, and autograd's gradient of sum(weight * reward) on each input."""
    with torch.inference_mode(False), torch.enable_grad():
        q, p, n = (_leaf(x).requires_grad_() for x in (query, positive, negatives))
        result = ranking_reward(q, p, n, None if mask is None else _leaf(mask), **weights)
        grads = torch.autograd.grad(result.reward, (q, p, n), _upstream(weight, result.reward))
    return result, grads[0], grads[1], grads[2]


def reward_from_scores_backward(
    scores: Tensor, mask: Tensor | None, grad_reward: Tensor, **weights: Any
) -> Tensor:
    """Autograd's gradient of sum(grad_reward * reward) on `scores`."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = _leaf(scores).requires_grad_()
        reward = reward_from_scores(leaf, None if mask is None else _leaf(mask), **weights).reward
        (grad_scores,) = torch.autograd.grad(reward, leaf, _upstream(grad_reward, reward))
    return grad_scores


def group_advantages(reward: Tensor, *, scale: str, std_eps: float) -> Tensor:
    """Eq. 7 over the last dimension; `scale` picks the divisor: "std", "batch" or "none".

    Computed in float64 and rounded once, so that no finite reward overflows its own variance.
    """
    exact = reward.detach().to(torch.float64)
    deviation = exact - exact.mean(-1, keepdim=True)
    spread = exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)
    sound = torch.isfinite(exact).all(-1, keepdim=True)
    if scale == "std":
        deviation = deviation / (_std(exact).unsqueeze(-1) + std_eps)
    elif scale == "batch":
        counts = sound.expand_as(exact)
        deviation = deviation / (_std(exact.flatten(), counts.flatten()) + std_eps)
    advantage = torch.where(spread < SAME_REWARD, 0.0, deviation)
    return torch.where(sound, advantage, torch.nan).to(compute_dtype(reward.dtype))


def topk(query: Tensor, corpus: Tensor, k: int, *, metric: str) -> TopK:
    """Eq. 8 for query [Q, D] and corpus [P, D], read in blocks: float32 copies are small.

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
    """Scores [Q, P] of eq. 8; -inf where the query or the row is not finite."""
    dtype = compute_dtype(rows.dtype)
    finite = torch.isfinite(query).all(-1, keepdim=True) & torch.isfinite(rows).all(-1)
    if metric == "cosine":
        scores = _dots(_unit(query), _unit(rows)).clamp(-1, 1)
    else:
        query, query_exponent = _scaled(query)
        rows, exponent = _scaled(rows)
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


def _live(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Bool [*, N + 1]: the positive and the unmasked negatives."""
    live = torch.ones_like(scores, dtype=torch.bool)
    if mask is None:
        return live
    leading = torch.broadcast_shapes(scores.shape[:-1], mask.shape[:-1])
    return torch.cat([live[..., :1].expand(*leading, 1), mask.expand(*leading, -1)], dim=-1)


def _leaf(tensor: Tensor) -> Tensor:
    """A tensor that autograd can start from; one made in inference mode has to be copied."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _upstream(weight: Tensor | None, reward: Tensor) -> Tensor:
    return torch.ones_like(reward) if weight is None else _leaf(weight).to(reward.dtype)


def _unit(rows: Tensor) -> Tensor:
    """`rows` over their norms; a zero row stays zero and gets gradient 0."""
    rows, _ = _scaled(rows)
    square = (rows * rows).sum(-1, keepdim=True)
    zero = square == 0
    return torch.where(zero, 0.0, rows / torch.where(zero, 1.0, square).sqrt())


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`rows` times 2^-exponent, so that squares neither overflow nor vanish, and the exponents.

    In two steps, since the power itself may lie outside the dtype's range (subnormal rows).
    """
    rows = rows.to(compute_dtype(rows.dtype)).contiguous()
    exponent = torch.frexp(rows.detach().abs().amax(-1, keepdim=True)).exponent
    first = exponent // 2
    for step in (first, exponent - first):
        rows = rows * torch.exp2(-step.to(rows.dtype))
    return rows, exponent


def _cosine(query: Tensor, candidates: Tensor) -> Tensor:
    """Dot products of unit rows, clamped to [-1, 1]; the gradient is the unclamped product's.

    A product and a sum, not a matmul: no TF32, and a row's bits do not depend on its batch.
    """
    score = (query * candidates).sum(-1)
    return score + (score.clamp(-1, 1) - score).detach()


def _hinge(counted: Tensor, order: Tensor, live: Tensor, margin: float) -> Tensor:
    """Eq. 3; 0 for a group without live negatives. `order` puts the hardest negative first."""
    if order.shape[-1] == 0:
        return torch.zeros_like(counted[..., 0])
    hardest = counted[..., 1:].gather(-1, order[..., :1]).squeeze(-1)
    return torch.where(live[..., 1:].any(-1), torch.relu(counted[..., 0] - hardest - margin), 0.0)


def _soft_ranks(counted: Tensor, live: Tensor, rank_temperature: float) -> Tensor:
    """Eq. 6: [*, N + 1], differentiable."""
    ahead = torch.sigmoid((counted.unsqueeze(-2) - counted.unsqueeze(-1)) / rank_temperature)
    itself = torch.eye(counted.shape[-1], dtype=torch.bool, device=counted.device)
    return 1 + torch.where(live.unsqueeze(-2) & ~itself, ahead, 0.0).sum(-1)


def _std(values: Tensor, counts: Tensor | None = None) -> Tensor:
    """Unbiased standard deviation over the last dimension, of the entries where `counts` holds."""
    if counts is None:
        counts = torch.ones_like(values, dtype=torch.bool)
    n = counts.sum(-1, keepdim=True)
    mean = torch.where(counts, values, 0.0).sum(-1, keepdim=True) / n
    square = torch.where(counts, values - mean, 0.0).square().sum(-1)
    return (square / (n.squeeze(-1) - 1).clamp(min=1)).sqrt()
