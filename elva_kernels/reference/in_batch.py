"""The in-batch ops: eq. 8 to 14."""

from typing import NamedTuple

import torch
from torch import Tensor

from elva_kernels.reference.reward import RankingReward, Weights
from elva_kernels.reference.rows import leaf, unit

# Elements of a product that is held at once: 64 MB of float32. Ours.
_CHUNK = 2**24


class RankStatistics(NamedTuple):
    """Where each query's target stands among its negatives, and the hardest of them."""

    rank: Tensor  # [B] int32, 1 + n_greater + n_equal
    n_greater: Tensor  # [B] int32
    n_equal: Tensor  # [B] int32
    target_score: Tensor  # [B]
    hardest_score: Tensor  # [B] -inf where there is no finite negative
    hardest_index: Tensor  # [B] int64, -1 where there is none
    topk_scores: Tensor  # [B, min(k, M)] the hardest negatives in order, then -inf
    topk_index: Tensor  # [B, min(k, M)] int64, then -1
    logsumexp: Tensor | None  # [B] eq. 11; None without a temperature


class Batch(NamedTuple):
    """What says which candidates a query is compared with."""

    target: Tensor  # [B] int64
    candidate_ids: Tensor | None  # [M] int64
    max_score: float | None


def cosine_matrix(query: Tensor, candidates: Tensor) -> Tensor:
    """Eq. 8: [B, M], without a gradient.

    A product and a sum, as eq. 1 does it: an element's bits depend on its two rows alone, so
    a copy of the positive ties with it wherever it stands.
    """
    (q, q_sound), (c, c_sound) = (_sound_unit(x.detach()) for x in (query, candidates))
    scores = q.new_empty(len(q), len(c))
    columns = max(1, _CHUNK // q.shape[1])
    rows = max(1, columns // max(1, len(c)))
    for i in range(0, len(q), rows):
        for j in range(0, len(c), columns):
            product = q[i : i + rows, None] * c[None, j : j + columns]
            scores[i : i + rows, j : j + columns] = product.sum(-1)
    sound = q_sound.unsqueeze(1) & c_sound
    return torch.where(sound, scores.clamp_(-1, 1), torch.nan)


def rank_statistics(
    query: Tensor,  # [B, D]
    candidates: Tensor,  # [M, D]
    batch: Batch,
    *,
    k: int,
    temperature: Tensor | None,  # []
) -> RankStatistics:
    """Eq. 10 and 11, and the k first negatives: score descending, then index ascending."""
    rows = max(1, _CHUNK // max(1, len(candidates)))
    parts = [
        statistics_of_scores(
            cosine_matrix(query[i : i + rows], candidates),
            batch._replace(target=batch.target[i : i + rows]),
            k=k,
            temperature=temperature,
        )
        for i in range(0, max(1, len(query)), rows)
    ]
    *columns, logsumexp = zip(*parts, strict=True)
    whole = [torch.cat(x) for x in columns]
    return RankStatistics._make([*whole, None if temperature is None else torch.cat(logsumexp)])


def statistics_of_scores(
    scores: Tensor, batch: Batch, *, k: int, temperature: Tensor | None
) -> RankStatistics:
    """`rank_statistics` of the cosines [B, M]."""
    negative = _negatives(scores, batch)
    key = torch.where(scores.isfinite(), scores, -torch.inf)
    target_key = _at(key, batch.target)
    n_greater = (negative & (key > target_key)).sum(1)
    n_equal = (negative & (key == target_key)).sum(1)
    columns = min(max(k, 1), scores.shape[1])
    key = torch.where(negative, key, -torch.inf)
    order = key.argsort(dim=1, descending=True, stable=True)[:, :columns]
    first = key.gather(1, order)
    index = torch.where(first == -torch.inf, -1, order)
    hardest_score, hardest_index = _first_column(first, -torch.inf), _first_column(index, -1)
    logsumexp = None
    if temperature is not None:
        target_score = _at(scores, batch.target)
        lse = _logsumexp(target_score, scores, negative, temperature)
        logsumexp = lse.to(scores.dtype)
    return RankStatistics(
        rank=(1 + n_greater + n_equal).int(),
        n_greater=n_greater.int(),
        n_equal=n_equal.int(),
        target_score=_at(scores, batch.target).squeeze(1),
        hardest_score=hardest_score,
        hardest_index=hardest_index,
        topk_scores=first[:, :k].clone(),
        topk_index=index[:, :k].clone(),
        logsumexp=logsumexp,
    )


def reward_of_head(
    scores: Tensor,  # [B, 1 + h], the positive's, then the hardest negatives' in order, then -inf
    rank: Tensor,  # [B] the positive's
    head: int,
    weights: Weights,
) -> RankingReward:
    """Eq. 3, 5 and 12; differentiable in `scores`. A positive that is not finite makes NaN."""
    live = scores > -torch.inf
    counted = torch.where(scores.isfinite(), scores, 0.0)
    positive, negatives = counted[:, :1], counted[:, 1:]
    place = torch.arange(1, scores.shape[1], device=scores.device)
    ranks = place + (positive > negatives).detach()
    within = live[:, 1:] & (ranks <= head)
    hinge = torch.relu(positive - negatives[:, :1] - weights.margin)
    margin_reward = torch.where(live[:, 1:2], hinge, 0.0).sum(1)  # eq. 3
    contrast = positive.squeeze(1) / (1 + rank.to(scores.dtype).log())
    penalty = negatives * torch.where(within, ranks.to(scores.dtype).log() - 1, 0.0)
    rank_reward = contrast - weights.rank_penalty * penalty.sum(1)  # eq. 12
    sound = scores[:, 0].isfinite()
    margin_reward, rank_reward = (
        torch.where(sound, x, torch.nan) for x in (margin_reward, rank_reward)
    )
    return RankingReward(
        reward=weights.w_margin * margin_reward + weights.w_rank * rank_reward,  # eq. 5
        margin_reward=margin_reward.detach(),
        rank_reward=rank_reward.detach(),
        rank=rank,
        scores=scores.detach(),
    )


def head_slopes(
    scores: Tensor, rank: Tensor, head: int, grad_reward: Tensor, weights: Weights
) -> Tensor:
    """Autograd's gradient of sum(grad_reward * reward) on the scores of `reward_of_head`."""
    with torch.inference_mode(False), torch.enable_grad():
        begin = leaf(scores).requires_grad_()
        reward = reward_of_head(begin, leaf(rank), head, weights).reward
        (slopes,) = torch.autograd.grad(reward, begin, leaf(grad_reward).to(reward.dtype))
    return slopes


def in_batch_gradients(
    query: Tensor,
    candidates: Tensor,
    index: Tensor,  # [B, 1 + h] int64, -1 where a slope is of no candidate
    slopes: Tensor,  # [B, 1 + h]
) -> tuple[Tensor, Tensor]:
    """The gradients on query and candidates, of slopes on the scores of the candidates named."""
    m = len(candidates)
    slope_matrix = slopes.new_zeros(len(query), m + 1)  # column M takes the slopes of no candidate
    slope_matrix.scatter_(1, torch.where(index < 0, m, index), slopes)
    return gradients_of_slopes(query, candidates, index[:, 0], slope_matrix[:, :m])


def gradients_of_slopes(
    query: Tensor, candidates: Tensor, target: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients on query and candidates of slopes [B, M] on the cosines.

    In float64: torch multiplies no float64 matrices in TF32 or bfloat16, whatever it was set to.
    """
    with torch.inference_mode(False), torch.enable_grad():
        q, c = (leaf(x).requires_grad_() for x in (query, candidates))
        (q_unit, q_sound), (c_unit, c_sound) = (_sound_unit(x) for x in (q, c))
        slopes, q_rows, c_rows = (leaf(x).double() for x in (slopes, q_unit, c_unit))
        upstream = ((slopes @ c_rows).to(q_unit.dtype), (slopes.T @ q_rows).to(c_unit.dtype))
        grad_query, grad_candidates = torch.autograd.grad((q_unit, c_unit), (q, c), upstream)
        q_sound = q_sound & c_sound[target]
    return (
        torch.where(q_sound.unsqueeze(1), grad_query, torch.nan),
        torch.where(c_sound.unsqueeze(1), grad_candidates, torch.nan),
    )


def info_nce_of_scores(
    scores: Tensor,  # [B, M]
    batch: Batch,
    temperature: Tensor,  # []
    *,
    symmetric: bool,
) -> Tensor:
    """Eq. 13 or 14: [B] in float64; differentiable in scores and temperature."""
    target_score = _at(scores, batch.target)
    negative = _negatives(scores, batch)
    lse = _logsumexp(target_score, scores, negative, temperature)
    if symmetric:
        columns, negative = scores[:, batch.target].T, negative[:, batch.target].T
        lse = (lse + _logsumexp(target_score, columns, negative, temperature)) / 2
    counted = torch.where(target_score.isfinite(), target_score, 0.0).squeeze(1)
    return lse - counted.double() / _positive(temperature)  # lse is NaN where the pair is


def info_nce(
    query: Tensor,
    candidates: Tensor,
    batch: Batch,
    temperature: Tensor,
    *,
    symmetric: bool,
) -> tuple[Tensor, RankStatistics]:
    """The loss of each query, and its statistics."""
    scores, temperature = cosine_matrix(query, candidates), temperature.detach()
    loss = info_nce_of_scores(scores, batch, temperature, symmetric=symmetric)
    statistics = statistics_of_scores(scores, batch, k=0, temperature=temperature)
    return loss.to(scores.dtype), statistics


def info_nce_gradients(
    query: Tensor,
    candidates: Tensor,
    batch: Batch,
    temperature: Tensor,
    weight: Tensor,  # [B], the upstream gradient
    *,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Autograd's gradient of sum(weight * loss) on query, candidates and temperature."""
    with torch.inference_mode(False), torch.enable_grad():
        scores = leaf(cosine_matrix(query, candidates)).requires_grad_()
        t = leaf(temperature).double().requires_grad_()
        ids = None if batch.candidate_ids is None else leaf(batch.candidate_ids)
        leaves = batch._replace(target=leaf(batch.target), candidate_ids=ids)
        loss = info_nce_of_scores(scores, leaves, t, symmetric=symmetric)
        slopes, grad_temperature = torch.autograd.grad(loss, (scores, t), leaf(weight).double())
    grads = gradients_of_slopes(query, candidates, batch.target, slopes)
    return *grads, grad_temperature.to(temperature.dtype)


def _sound_unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows, and which of the rows are finite; those that are not are zero among the others."""
    sound = rows.isfinite().all(-1)
    return unit(torch.where(sound.unsqueeze(-1), rows, 0)), sound


def _at(scores: Tensor, target: Tensor) -> Tensor:
    return scores.gather(1, target.unsqueeze(1))


def _negatives(scores: Tensor, batch: Batch) -> Tensor:
    """Eq. 9: bool [B, M]."""
    index = torch.arange(scores.shape[1], device=scores.device)
    negative = index != batch.target.unsqueeze(1)
    if batch.candidate_ids is not None:
        negative &= batch.candidate_ids != batch.candidate_ids[batch.target].unsqueeze(1)
    if batch.max_score is not None:
        negative &= ~(scores.detach() > batch.max_score)
    return negative


def _logsumexp(
    target_score: Tensor,  # [B, 1]
    scores: Tensor,  # [B, X]
    negative: Tensor,  # bool [B, X]
    temperature: Tensor,
) -> Tensor:
    """Eq. 11: [B] in float64. Sums the target and the finite negatives; NaN without the target."""
    sound = target_score.isfinite()
    used = torch.cat([torch.ones_like(sound), negative & scores.isfinite()], dim=1)
    counted = torch.cat([torch.where(sound, target_score, 0.0), scores], dim=1)
    logits = torch.where(used, counted, 0.0).double() / _positive(temperature)
    lse = torch.where(used, logits, -torch.inf).logsumexp(1)
    return torch.where(sound.squeeze(1), lse, torch.nan)


def _positive(temperature: Tensor) -> Tensor:
    """The temperature in float64; NaN where it is not above 0."""
    temperature = temperature.double()
    return torch.where(temperature > 0, temperature, torch.nan)


def _first_column(values: Tensor, otherwise: float) -> Tensor:
    if values.shape[1] == 0:
        return values.new_full(values.shape[:1], otherwise)
    return values[:, 0].clone()
