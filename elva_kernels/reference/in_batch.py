"""The in-batch ops: eq. 8 to 14."""

from typing import NamedTuple

import torch
from torch import Tensor

from elva_kernels.reference.reward import RankingReward, Weights
from elva_kernels.reference.rows import leaf, unit

# Elements of a product that is held at once: 64 MB of float32. Ours.
_CHUNK = 2**24


class RankStatistics(NamedTuple):
    """Where each query's positives stand among its negatives, and the hardest of these.

    Scores are cosines, float32, or float64 for float64 inputs; nothing carries a gradient.

    Attributes:
        rank: [B] or [B, P] int32, as `target`: 1 + n_greater + n_equal; 0 for no positive.
        n_greater: int32, as `rank`: negatives that score higher.
        n_equal: int32, as `rank`: negatives that score the same.
        target_score: as `rank`: the positive's score; -inf for no positive.
        hardest_score: [B], of the negative that scores highest; -inf without a finite one.
        hardest_index: [B] int64, its row of the candidates; -1 where there is none.
        topk_scores: [B, min(k, M)], of the hardest negatives in order, then -inf.
        topk_index: [B, min(k, M)] int64, their rows, then -1.
        logsumexp: [B], eq. 11, over scores / temperature; None without a temperature.
    """

    rank: Tensor
    n_greater: Tensor
    n_equal: Tensor
    target_score: Tensor
    hardest_score: Tensor
    hardest_index: Tensor
    topk_scores: Tensor
    topk_index: Tensor
    logsumexp: Tensor | None


NO_POSITIVE = -1  # in `Batch.target`
NO_CANDIDATE = -2  # a positive that is no row of the candidates: a pair that is not finite


class Batch(NamedTuple):
    """What says which candidates a query is compared with."""

    target: Tensor  # [B, P] int64, rows of the candidates; `NO_POSITIVE`, `NO_CANDIDATE`
    excluded: Tensor | None = None  # [E, 2] int64, (query, candidate), ascending in the query
    candidate_ids: Tensor | None = None  # [M] int64
    max_score: float | None = None
    padded: bool = True  # whether `NO_POSITIVE` may be in `target`: a GPU's is not looked at
    diagonal: bool = False  # whether query i is known to have candidate i for its one positive


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
            _rows_of(batch, i, rows),
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
    """`rank_statistics` of the cosines [B, M]: per positive [B, P]."""
    negative = _negatives(scores, batch)
    key = torch.where(scores.isfinite(), scores, -torch.inf)
    target_score = target_scores(scores, batch.target)
    there = batch.target != NO_POSITIVE
    counts = []
    for own, is_there in zip(target_score.unbind(1), there.unbind(1), strict=True):
        own_key = torch.where(own.isfinite(), own, -torch.inf).unsqueeze(1)
        among = negative & is_there.unsqueeze(1)
        counts.append(((among & (key > own_key)).sum(1), (among & (key == own_key)).sum(1)))
    n_greater, n_equal = (torch.stack(x, dim=1) for x in zip(*counts, strict=True))
    columns = min(max(k, 1), scores.shape[1])
    key = torch.where(negative, key, -torch.inf)
    order = key.argsort(dim=1, descending=True, stable=True)[:, :columns]
    first = key.gather(1, order)
    index = torch.where(first == -torch.inf, -1, order)
    hardest_score, hardest_index = _first_column(first, -torch.inf), _first_column(index, -1)
    logsumexp = None
    if temperature is not None:
        lse = _logsumexp(target_score, scores, negative, temperature)
        logsumexp = lse.to(scores.dtype)
    return RankStatistics(
        rank=torch.where(there, 1 + n_greater + n_equal, 0).int(),
        n_greater=n_greater.int(),
        n_equal=n_equal.int(),
        target_score=target_score,
        hardest_score=hardest_score,
        hardest_index=hardest_index,
        topk_scores=first[:, :k].clone(),
        topk_index=index[:, :k].clone(),
        logsumexp=logsumexp,
    )


def reward_of_head(
    scores: Tensor,  # [B, P + h], the positives', then the hardest negatives' in order, then -inf
    rank: Tensor,  # [B, P] the positives', 0 for none
    head: int,
    weights: Weights,
) -> RankingReward:
    """Eq. 3, 5 and 12; differentiable in `scores`. A positive that is not finite makes NaN."""
    p = rank.shape[1]
    there = rank > 0
    live = scores[:, None, p:] > -torch.inf  # [B, 1, h]
    counted = torch.where(scores.isfinite(), scores, 0.0)
    positive, negatives = counted[:, :p], counted[:, None, p:]
    place = torch.arange(1, scores.shape[1] - p + 1, device=scores.device)
    ranks = place + (positive.unsqueeze(2) > negatives).detach()  # [B, P, h]
    within = live & (ranks <= head)
    hinge = torch.relu(positive.unsqueeze(2) - negatives[..., :1] - weights.margin)
    margin_reward = torch.where(live[..., :1], hinge, 0.0).sum(2)  # eq. 3
    contrast = positive / (1 + rank.clamp(min=1).to(scores.dtype).log())
    penalty = negatives * torch.where(within, ranks.to(scores.dtype).log() - 1, 0.0)
    rank_reward = contrast - weights.rank_penalty * penalty.sum(2)  # eq. 12
    sound = scores[:, :p].isfinite()
    margin_reward, rank_reward = (
        mean_of_positives(torch.where(sound, x, torch.nan), there)
        for x in (margin_reward, rank_reward)
    )
    return RankingReward(
        reward=weights.w_margin * margin_reward + weights.w_rank * rank_reward,  # eq. 5
        margin_reward=margin_reward.detach(),
        rank_reward=rank_reward.detach(),
        rank=rank,
        scores=scores.detach(),
    )


def mean_of_positives(
    values: Tensor,  # [B, P]
    there: Tensor,  # bool [B, P]
) -> Tensor:
    """[B] 0 for a query without a positive."""
    return torch.where(there, values, 0.0).sum(1) / there.sum(1).clamp(min=1)


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
    index: Tensor,  # [B, P + h] int64, below 0 where a slope is of no candidate
    slopes: Tensor,  # [B, P + h]
    positives: int,  # P
) -> tuple[Tensor, Tensor]:
    """The gradients on query and candidates, of slopes on the scores of the candidates named."""
    m = len(candidates)
    slope_matrix = slopes.new_zeros(len(query), m + 1)  # column M takes the slopes of no candidate
    slope_matrix.scatter_add_(1, torch.where(index < 0, m, index), slopes)
    return gradients_of_slopes(query, candidates, index[:, :positives], slope_matrix[:, :m])


def gradients_of_slopes(
    query: Tensor,
    candidates: Tensor,
    target: Tensor,  # [B, P]
    slopes: Tensor,  # [B, M]
) -> tuple[Tensor, Tensor]:
    """The gradients on query and candidates of slopes on the cosines.

    In float64: torch multiplies no float64 matrices in TF32 or bfloat16, whatever it was set to.
    """
    with torch.inference_mode(False), torch.enable_grad():
        q, c = (leaf(x).requires_grad_() for x in (query, candidates))
        (q_unit, q_sound), (c_unit, c_sound) = (_sound_unit(x) for x in (q, c))
        slopes, q_rows, c_rows = (leaf(x).double() for x in (slopes, q_unit, c_unit))
        upstream = ((slopes @ c_rows).to(q_unit.dtype), (slopes.T @ q_rows).to(c_unit.dtype))
        grad_query, grad_candidates = torch.autograd.grad((q_unit, c_unit), (q, c), upstream)
        sound = target_scores(c_sound.double().expand(len(target), -1), target)
        q_sound = q_sound & ((sound == 1) | (target == NO_POSITIVE)).all(1)
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
    there = batch.target != NO_POSITIVE
    target_score = target_scores(scores, batch.target)
    negative = _negatives(scores, batch)
    paired = (batch.target >= 0).any(1, keepdim=True)
    rival = negative & paired  # of a candidate that looks for its query
    losses = []
    for target, own in zip(batch.target.unbind(1), target_score.split(1, dim=1), strict=True):
        lse = _logsumexp(own, scores, negative, temperature)
        if symmetric and scores.numel() > 0:
            at = target.clamp(min=0)
            columns = _logsumexp(own, scores[:, at].T, rival[:, at].T, temperature)
            lse = (lse + columns) / 2
        counted = torch.where(own.isfinite(), own, 0.0).squeeze(1)
        # lse is NaN where the pair is
        losses.append(lse - counted.double() / _positive(temperature))
    return mean_of_positives(torch.stack(losses, dim=1), there)


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
        leaves = Batch._make(leaf(x) if isinstance(x, Tensor) else x for x in batch)
        loss = info_nce_of_scores(scores, leaves, t, symmetric=symmetric)
        slopes, grad_temperature = torch.autograd.grad(loss, (scores, t), leaf(weight).double())
    grads = gradients_of_slopes(query, candidates, batch.target, slopes)
    return *grads, grad_temperature.to(temperature.dtype)


def _sound_unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows, and which of the rows are finite; those that are not are zero among the others."""
    sound = rows.isfinite().all(-1)
    return unit(torch.where(sound.unsqueeze(-1), rows, 0)), sound


def target_scores(scores: Tensor, target: Tensor) -> Tensor:
    """[B, P] of scores [B, M]: -inf for `NO_POSITIVE`, NaN for `NO_CANDIDATE`."""
    padded = torch.nn.functional.pad(scores, (0, 1), value=torch.nan)  # M may be 0
    there = padded.gather(1, torch.where(target < 0, scores.shape[1], target))
    return torch.where(target == NO_POSITIVE, -torch.inf, there)


def _negatives(scores: Tensor, batch: Batch) -> Tensor:
    """Eq. 9: bool [B, M]."""
    b, m = scores.shape
    negative = scores.new_ones((b + 1, m + 1), dtype=torch.bool)  # the last for what is not there
    if batch.excluded is not None:
        row, column = batch.excluded.unbind(1)
        row = torch.where((row < 0) | (row >= b), b, row)
        column = torch.where((column < 0) | (column >= m), m, column)
        negative[row, column] = False
    negative = negative[:b, :m]
    index = torch.arange(m, device=scores.device)
    for target in batch.target.split(1, dim=1):
        negative &= index != target
        if batch.candidate_ids is not None and m > 0:
            own = batch.candidate_ids[target.clamp(min=0)]
            negative &= (batch.candidate_ids != own) | (target < 0)
    if batch.max_score is not None:
        negative &= ~(scores.detach() > batch.max_score)
    return negative


def _rows_of(batch: Batch, first: int, count: int) -> Batch:
    """What the queries from `first` are compared with."""
    excluded = batch.excluded
    if excluded is not None:
        excluded = torch.stack([excluded[:, 0] - first, excluded[:, 1]], dim=1)
    target = batch.target[first : first + count]
    return batch._replace(target=target, excluded=excluded, diagonal=False)


def _logsumexp(
    target_score: Tensor,  # [B, X]
    scores: Tensor,  # [B, Y]
    negative: Tensor,  # bool [B, Y]
    temperature: Tensor,
) -> Tensor:
    """Eq. 11: [B] in float64. Sums the targets that are there and the finite negatives.

    NaN where a target is.
    """
    used = torch.cat([target_score.isfinite(), negative & scores.isfinite()], dim=1)
    counted = torch.cat([target_score, scores], dim=1)
    logits = torch.where(used, counted, 0.0).double() / _positive(temperature)
    some = used.any(1, keepdim=True)  # the gradient of a sum of nothing is NaN
    lse = torch.where(some, torch.where(used, logits, -torch.inf), 0.0).logsumexp(1)
    lse = torch.where(some.squeeze(1), lse, -torch.inf)
    return torch.where(target_score.isnan().any(1), torch.nan, lse)


def _positive(temperature: Tensor) -> Tensor:
    """The temperature in float64; NaN where it is not above 0, and so is its gradient."""
    temperature = temperature.double()
    return temperature * torch.where(temperature > 0, 1.0, torch.nan).double()


def _first_column(values: Tensor, otherwise: float) -> Tensor:
    if values.shape[1] == 0:
        return values.new_full(values.shape[:1], otherwise)
    return values[:, 0].clone()
