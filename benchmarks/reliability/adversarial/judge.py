"""What is right, in float64: the reference's, by the contract's bounds; an AssertionError if not.

Ranks are judged by the returned scores, exactly; rewards and gradients with the ranks that those
scores have, since nearly equal scores may change places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from elva_kernels import RankingReward, RankStatistics, TopK, reference
from elva_kernels.reference import Batch, Weights, compute_dtype
from tests import tolerances


def same_nan(found: Tensor, right: Tensor, what: str) -> None:
    assert torch.equal(found.isnan(), right.isnan()), f"{what}: NaN lies elsewhere"


def near(found: Tensor, right: Tensor, allowed: Tensor | float, what: str) -> None:
    """|found - right| <= allowed; NaN and inf where the truth has them."""
    found, right = found.detach().double(), right.detach().double()
    assert found.shape == right.shape, f"{what}: shape {found.shape}, not {right.shape}"
    same_nan(found, right, what)
    equal = (found == right) | right.isnan()
    excess = torch.where(equal, 0.0, (found - right).abs() - allowed)
    worst = excess.max().item() if excess.numel() else 0.0
    assert worst <= 0, f"{what}: {worst:.3g} over its bound"


def exactly(found: Tensor, right: Tensor, what: str) -> None:
    assert torch.equal(found, right), f"{what}: {found.flatten()[:8]} is not {right.flatten()[:8]}"


def norms(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[*, 1] in float64, as two factors, since |row| may lie beyond its range: the largest element
    and the norm over it. 0 for a row that is not finite."""
    rows = rows.detach().double()
    rows = torch.where(rows.isfinite().all(-1, keepdim=True), rows, 0.0)
    size = rows.abs().amax(-1, keepdim=True)
    return size, torch.where(size > 0, rows / torch.where(size > 0, size, 1.0), 0.0).norm(
        dim=-1, keepdim=True
    )


def scaled(rows: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves in float64 of about 1, each row by its power of two, and the exponents."""
    pairs = [reference.scaled(x.detach().double()) for x in rows]
    return [x.requires_grad_() for x, _ in pairs], [e for _, e in pairs]


def at_rows(gradients: Sequence[Tensor], exponents: Sequence[Tensor]) -> list[Tensor]:
    """Gradients on the rows, of those on `scaled` rows: inf where they are beyond float64."""
    pairs = zip(gradients, exponents, strict=True)
    return [reference.times_power(g, -e) for g, e in pairs]


def gradient(found: Tensor, right: Tensor, rows: Tensor, slopes: float, what: str) -> None:
    """The contract's bound over the row's norm, for slopes on the scores that add up to `slopes`,
    and half an ulp; what is beyond the dtype's range is inf. A zero row has gradient 0."""
    dtype, end = rows.dtype, torch.finfo(rows.dtype).max
    assert found.dtype == dtype and found.shape == rows.shape, f"{what}: dtype or shape"
    same_nan(found, right, what)
    right = right.detach().double()
    size, relative = norms(rows)
    known = size > 0
    slack = tolerances.GRADIENT[dtype] * max(1.0, slopes) / torch.where(known, relative, 1.0)
    slack = torch.where(known, slack / torch.where(known, size, 1.0), 0.0)
    slack = slack + tolerances.half_ulp(right, dtype)
    low, high = ((right + side * slack).clamp(-end, end) for side in (-1, 1))
    got = found.detach().double().clamp(-end, end)
    wrong = ((got < low) | (got > high)) & ~right.isnan()
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what} at {at}: {got[at].item():.6g}, not in [{low[at].item():.6g}, "
            f"{high[at].item():.6g}]"
        )


def slopes_of(
    weights: Weights, candidates: int, upstream: Tensor, *, graded: bool = False
) -> float:
    """The largest sum of |dR / ds| that a group may have, times the upstream gradient."""
    soft = 1 + (1 / weights.rank_temperature if weights.rank_temperature else 0)
    largest = upstream.abs().max().item() if upstream.numel() else 0.0
    sizes = terms(weights, candidates, graded=graded)
    return largest * (2 * abs(weights.w_margin) + abs(weights.w_rank) * sizes * soft)


def terms(weights: Weights, candidates: int, *, graded: bool = False) -> float:
    """The sum of the absolute weights of the scores in the rank reward."""
    gains = sum(1 / (1 + math.log(k)) for k in range(1, candidates + 1)) if graded else 1.0
    return gains + weights.rank_penalty * (math.lgamma(candidates + 1) + candidates)


def rewards(
    found: RankingReward, mask: Tensor | None, relevance: Tensor | None, weights: Weights
) -> None:
    """Rank and rewards are those of the returned scores."""
    scores = found.scores.detach()
    right = reference.reward_from_scores(
        scores.double(), mask, weights, None if relevance is None else relevance.double()
    )
    exactly(found.rank, right.rank, "rank")
    finite = scores.double()[scores.isfinite()].abs()
    largest = max(1.0, finite.max().item() if finite.numel() else 0.0)
    count = scores.shape[-1]
    slack = terms(weights, count, graded=relevance is not None)
    allowed = tolerances.REWARD[scores.dtype] * (3 + abs(weights.margin) + slack) * largest
    allowed *= max(1.0, 1 / weights.rank_temperature if weights.rank_temperature else 1.0)
    for name in ("margin_reward", "rank_reward", "reward"):
        near(getattr(found, name), getattr(right, name), allowed, name)


def grouped(
    found: RankingReward,
    gradients: Sequence[Tensor | None],
    given: tuple[Tensor, Tensor, Tensor],
    options: dict,
    weights: Weights,
    upstream: Tensor,
) -> None:
    """`ranking_reward` and its gradients.

    Args:
        options: mask, negative_index, relevance, each a tensor or None.
    """
    mask, index, relevance = (options[x] for x in ("mask", "negative_index", "relevance"))
    leaves, exponents = scaled(given)
    truth = reference.cosine_scores(*leaves, mask, index)
    live = torch.ones(truth.shape, dtype=torch.bool)
    for hidden in (mask, None if index is None else index != -1):
        if hidden is not None:
            live[..., 1:] &= hidden
    shown = torch.where(live, truth.detach(), -math.inf)
    near(found.scores, shown, tolerances.SCORE[given[0].dtype], "scores")
    sound = found.scores[live & found.scores.isfinite()]
    assert (sound.abs() <= 1).all(), "a cosine beyond 1"
    graded = None if relevance is None else relevance.expand(live[..., 1:].shape)
    rewards(found, live[..., 1:], graded, weights)
    scores = torch.where(found.scores == -math.inf, 0.0, found.scores.double())
    slopes = reference.reward_from_scores_backward(
        scores, live[..., 1:], upstream.double().expand(found.reward.shape), weights,
        None if graded is None else graded.double(),
    )  # fmt: skip
    wanted = at_rows(torch.autograd.grad(truth, leaves, slopes), exponents)
    if found.reward.numel() == 0:  # nobody's gradient is 0, whatever the rows are
        wanted = [torch.zeros_like(x) for x in wanted]
    total = slopes_of(weights, live.shape[-1], upstream, graded=graded is not None)
    shared = max(1, live[..., 0].numel()) if index is not None or found.reward.dim() else 1
    names = ("query", "positive", "negatives")
    for name, got, right, rows in zip(names, gradients, wanted, given, strict=True):
        if got is not None:
            gradient(got, right, rows, total * shared, f"gradient of {name}")


def statistics(found: RankStatistics, scores: Tensor, batch: Batch, k: int, t: Tensor) -> None:
    """Counts and orders are exactly those of the backend's own scores [B, M]."""
    right = reference.statistics_of_scores(scores, batch, k=k, temperature=t.double())
    for name in RankStatistics._fields[:-1]:
        a, b = getattr(found, name), getattr(right, name)
        assert torch.equal(a, b) or (
            a.shape == b.shape and torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
        ), name
    size = 1 / t.item() + math.log(2 + scores.shape[1])
    slack = 4 * torch.finfo(scores.dtype).eps * size
    near(found.logsumexp, right.logsumexp, slack, "logsumexp")


def matrix(scores: Tensor, query: Tensor, candidates: Tensor) -> None:
    """A backend's cosines [B, M]."""
    truth = reference.cosine_matrix(query.double(), candidates.double())
    near(scores, truth, tolerances.BATCH[query.dtype], "scores")


def searched(found: TopK, query: Tensor, corpus: Tensor, k: int, metric: str) -> None:
    """In a total order, near the truth, and nothing left out that is better."""
    kept = min(k, len(corpus))
    assert found.scores.shape == found.index.shape == (len(query), kept), "shape"
    assert found.scores.dtype == compute_dtype(query.dtype) and found.index.dtype == torch.int64
    assert not found.scores.isnan().any(), "NaN was returned"
    q, c = query.double(), corpus.double()
    bad = ~q.isfinite().all(1, keepdim=True) | ~c.isfinite().all(1)
    if metric == "cosine":
        truth, norm = reference.cosine_matrix(q, c), torch.ones(len(q), len(c)).double()
    else:
        cosines = torch.where(bad, 0.0, reference.cosine_matrix(q, c))
        (q_size, q_rest), (c_size, c_rest) = norms(q), norms(c)
        (q_size, q_power), (c_size, c_power) = q_size.frexp(), c_size.frexp()
        rest, power = (q_rest * q_size) * (c_rest * c_size).T, q_power + c_power.T
        norm = reference.times_power(rest, power)  # inf where it is beyond float64's range
        truth = reference.times_power(cosines * rest, power)
        rounded = truth.to(found.scores.dtype).double()
        truth = torch.where(rounded.isinf(), rounded, truth)
    truth = torch.where(bad, -math.inf, truth)
    bound = tolerances.BATCH[query.dtype] * norm
    bound = bound + torch.finfo(found.scores.dtype).tiny
    got, slack = truth.gather(1, found.index), bound.gather(1, found.index)
    end = torch.finfo(found.scores.dtype).max
    off = torch.where(found.scores.double() == got, 0.0, (found.scores.double() - got).abs())
    at_end = (found.scores.double().abs() >= end * 0.999) & (got.abs() >= end * 0.999)
    at_end &= found.scores.sign() == got.sign()
    assert ((off <= slack) | at_end).all(), f"scores: {off.max().item():.3g} off"
    above, below = found.scores[:, :-1], found.scores[:, 1:]
    later = found.index[:, :-1] < found.index[:, 1:]
    assert ((above > below) | ((above == below) & later)).all(), "order"
    assert all(len(set(row)) == kept for row in found.index.tolist()), "a row twice"
    best = truth.sort(dim=1, descending=True).values[:, :kept]
    lost = torch.where(best == got, 0.0, best - got)
    widest = bound.amax(1, keepdim=True) if bound.numel() else bound.new_zeros(len(q), 1)
    assert ((lost <= 2 * widest) | at_end).all(), "a better row was left out"
