"""A case of each op: drawn, computed by a backend, judged. Raises AssertionError where it is wrong,
and any other error where the op raises one: inputs are such as the contract takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import elva_kernels as ek
from benchmarks.reliability.adversarial import judge
from benchmarks.reliability.adversarial.draw import Draw
from elva_kernels import reference
from elva_kernels.reference import Batch, Weights, compute_dtype

LEADING = ((), (1,), (2,), (5,), (2, 3), (3, 1, 2))
NAMES = ("query", "positive", "negatives")


def grouped(draw: Draw, backend: str) -> None:
    """`ranking_reward` with autograd, or `ranking_reward_and_grad`; of own rows, or of a bank."""
    leading = leading_of(draw)
    n, size = draw.count(1, 2, draw.size()), draw.size()
    groups = max(1, math.prod(leading))
    n = min(n, max(1, draw.largest // (size * groups)))
    indexed, bad = draw.maybe(0.35), draw.maybe(0.3)

    def part(shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same, or broadcast in some dimensions."""
        if draw.maybe(0.75):
            return shape
        return tuple(1 if draw.maybe(0.5) else x for x in shape)

    query = draw.rows(*part(leading), size=size, bad=bad)
    positive = draw.rows(*part(leading), size=size, near=finite(query), bad=bad)
    index = None
    if indexed:
        m = draw.size()
        negatives = draw.rows(m, size=size, near=finite(query), bad=bad)
        index = draw.randint(-1, m, *leading, n)
    else:
        negatives = draw.rows(*part(leading), n, size=size, near=finite(query), bad=bad)
    shape = torch.broadcast_shapes(
        query.shape[:-1], positive.shape[:-1],
        index.shape[:-1] if index is not None else negatives.shape[:-2],
    )  # fmt: skip
    mask, relevance = draw.mask(*shape, n), None
    if draw.maybe(0.3):
        relevance = draw.rand(*shape, n)
        relevance = torch.where(relevance < 0.3, 0.0, relevance.clamp(max=0.8) / 0.8)
    given = tuple(draw.laid(x) for x in (query, positive, negatives))
    scalars = draw.weights(soft=True)
    options = {"mask": mask, "negative_index": index, "relevance": relevance}
    if index is None:
        del options["negative_index"]
    upstream = draw.randn(*part(shape)).to(compute_dtype(draw.dtype))
    wrt = [x for x in NAMES if draw.maybe(0.8)]
    if draw.maybe(0.5):
        with draw.mode():
            found, *gradients = ek.ranking_reward_and_grad(
                *given, weight=upstream, wrt=wrt, backend=backend, **options, **scalars
            )
    else:
        leaves = [
            x.detach().requires_grad_(name in wrt) for x, name in zip(given, NAMES, strict=True)
        ]
        with draw.mode():
            found = ek.ranking_reward(*leaves, backend=backend, **options, **scalars)
        if wrt:
            with draw.mode():
                found.reward.backward(upstream.expand(found.reward.shape))
        gradients = [x.grad for x in leaves]
    assert [x is not None for x in gradients] == [x in wrt for x in NAMES], "gradients wanted"
    judge.grouped(
        found, gradients, given, {"negative_index": None, **options}, Weights(**scalars), upstream
    )  # fmt: skip


def leading_of(draw: Draw) -> tuple[int, ...]:
    """Dimensions of groups; seldom of none."""
    found: tuple[int, ...] = (0,) if draw.maybe(0.02) else draw.one_of(LEADING)
    return found


def finite(rows: Tensor) -> Tensor:
    rows = rows.double()
    return torch.where(rows.isfinite().all(-1, keepdim=True), rows, 0.0)


def from_scores(draw: Draw, backend: str) -> None:
    """`reward_from_scores`: scores of any size, ties, NaN and inf."""
    shape = (*leading_of(draw), 1 + draw.count(1, draw.size()))
    scale = draw.one_of((1e-30, 1e-3, 1.0, 1.0, 30.0, 1e4))
    scores = (draw.randn(*shape) * scale).to(draw.dtype)
    if draw.maybe(0.4):
        scores = (scores / scale * 2).round() / 2  # ties
    if draw.maybe(0.3) and scores.numel():
        bad = draw.one_of((math.nan, math.inf, -math.inf, -0.0, torch.finfo(draw.dtype).tiny))
        scores.view(-1)[draw.random.randrange(scores.numel())] = bad
    mask = draw.mask(*shape[:-1], shape[-1] - 1)
    relevance = draw.rand(*shape[:-1], shape[-1] - 1) if draw.maybe(0.3) else None
    scalars = draw.weights(soft=True)
    weights, leaf = Weights(**scalars), draw.laid(scores).requires_grad_()
    with draw.mode():
        found = ek.reward_from_scores(
            leaf, mask=mask, relevance=relevance, backend=backend, **scalars
        )  # fmt: skip
    live = torch.cat([torch.ones(*shape[:-1], 1, dtype=torch.bool),
                      torch.ones(*shape[:-1], shape[-1] - 1, dtype=torch.bool)
                      if mask is None else mask], -1)  # fmt: skip
    shown = torch.where(live, scores.to(compute_dtype(draw.dtype)), -math.inf)
    judge.near(found.scores, shown, 0.0, "scores")
    judge.rewards(found, mask, relevance, weights)
    upstream = draw.randn(*shape[:-1]).to(found.reward.dtype)
    with draw.mode():
        found.reward.backward(upstream)
    exact = None if relevance is None else relevance.double()
    right = reference.reward_from_scores_backward(
        scores.double(), mask, upstream.double(), weights, exact
    )
    largest = max(1.0, scores.double()[scores.isfinite()].abs().amax().item()
                  if scores.isfinite().any() else 1.0)  # fmt: skip
    total = judge.slopes_of(weights, shape[-1], upstream, graded=relevance is not None)
    ulp = judge.tolerances.half_ulp(right, draw.dtype)
    allowed = judge.tolerances.GRADIENT[draw.dtype] * max(1.0, total * largest)
    judge.near(leaf.grad, right, ulp.nan_to_num() + allowed, "gradient of scores")


def batch_of(draw: Draw) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any], Batch]:
    """Arguments of the in-batch ops, as given and as a launcher has them."""
    b, m, size = draw.count(1, 2), draw.size(), draw.size()
    m = min(m, max(1, draw.largest // size))
    b = min(b, max(1, draw.largest // size))
    bad = draw.maybe(0.3)
    plain = draw.maybe(0.2)
    m = max(m, b) if plain else m
    query = draw.rows(b, size=size, bad=bad)
    candidates = draw.rows(m, size=size, near=finite(query), bad=bad)
    target: Tensor | None = None
    if not plain:
        target = draw.randint(0, m, b)
        if draw.maybe(0.5):
            target = draw.randint(-1, m, b, draw.random.randint(1, 6))
    places = torch.arange(b) if target is None else target
    columns = places.unsqueeze(1) if places.dim() == 1 else places
    options: dict[str, Any] = {"excluded": None, "candidate_ids": None, "max_score": None}
    if draw.maybe(0.4) and b:
        pairs = torch.stack([draw.randint(0, b, 2 * b), draw.randint(0, m, 2 * b)], 1)
        options["excluded"] = pairs[(columns[pairs[:, 0]] != pairs[:, 1:]).all(1)]
    if draw.maybe(0.3):
        options["candidate_ids"] = draw.randint(-3, m, m)
    if draw.maybe(0.3):
        options["max_score"] = draw.one_of((-0.5, 0.0, 0.3, 0.9, 1.0))
    exact = dict(options)
    if exact["excluded"] is not None:
        exact["excluded"] = exact["excluded"][exact["excluded"][:, 0].argsort(stable=True)]
    return draw.laid(query), draw.laid(candidates), target, options, Batch(columns, **exact)


def own_scores(draw: Draw, query: Tensor, candidates: Tensor, backend: str) -> Tensor:
    """[B, M] by the backend itself, put together from the orders of two targets."""
    b, m = len(query), len(candidates)
    with draw.mode():
        found = ek.rank_statistics(
            query, candidates, torch.zeros(b, dtype=torch.int64), k=m, backend=backend
        )
    scores = torch.full((b, m), math.nan, dtype=compute_dtype(query.dtype))
    if b and m:
        row = torch.arange(b).unsqueeze(1).expand_as(found.topk_index)
        there = found.topk_index >= 0
        scores[row[there], found.topk_index[there]] = found.topk_scores[there]
        scores[:, 0] = found.target_score
    return scores


def statistics(draw: Draw, backend: str) -> None:
    """`rank_statistics`."""
    query, candidates, target, options, batch = batch_of(draw)
    k, t = draw.count(1, 3, len(candidates) + 2), draw.one_of((1e-3, 0.05, 1.0, 30.0))
    with draw.mode():
        found = ek.rank_statistics(
            query, candidates, target, k=k, temperature=t, backend=backend, **options
        )
    scores = own_scores(draw, query, candidates, backend)
    judge.matrix(scores, query, candidates)
    one = target is None or target.dim() == 1
    if one:
        found = found._replace(
            **{x: getattr(found, x).unsqueeze(1) for x in reference.RankStatistics._fields[:4]}
        )
    judge.statistics(found, scores, batch, k, torch.tensor(t, dtype=torch.float64))


def in_batch(draw: Draw, backend: str) -> None:
    """`in_batch_ranking_reward` with autograd, or `in_batch_ranking_reward_and_grad`."""
    query, candidates, target, options, batch = batch_of(draw)
    head = draw.one_of((None, 1, 4, 100))
    scalars = draw.weights(soft=False)
    weights, last = Weights(**scalars), len(candidates) if head is None else head
    weight = draw.randn(len(query)).to(compute_dtype(draw.dtype))
    given = {"head": head, "backend": backend, **options, **scalars}
    gradients: list[Tensor | None]
    if draw.maybe(0.5):
        with draw.mode():
            found, *gradients = ek.in_batch_ranking_reward_and_grad(
                query, candidates, target, weight=weight, **given
            )
    else:
        leaves = [x.detach().requires_grad_() for x in (query, candidates)]
        with draw.mode():
            found = ek.in_batch_ranking_reward(*leaves, target, **given)
            found.reward.backward(weight)
        gradients = [x.grad for x in leaves]
    scores = own_scores(draw, query, candidates, backend)
    right = reference.statistics_of_scores(scores, batch, k=last, temperature=None)
    judge.exactly(found.rank, right.rank.reshape(found.rank.shape), "rank")
    pairs = torch.cat([right.target_score, right.topk_scores], dim=1).double()
    exact = reference.reward_of_head(pairs, right.rank, last, weights)
    total = judge.slopes_of(weights, pairs.shape[1], weight)
    slack = 3 + abs(weights.margin) + judge.terms(weights, pairs.shape[1])
    for name in ("margin_reward", "rank_reward", "reward"):
        allowed = judge.tolerances.REWARD[scores.dtype] * slack
        judge.near(getattr(found, name), getattr(exact, name), allowed, name)
    slopes = reference.head_slopes(pairs, right.rank, last, weight.double(), weights)
    index = torch.cat([batch.target, right.topk_index], dim=1)
    rows, exponents = judge.scaled((query, candidates))
    truths = reference.in_batch_gradients(*rows, index, slopes, batch.target.shape[1])
    truths = judge.at_rows(truths, exponents)
    for name, got, truth, given, sums in zip(
        ("query", "candidates"), gradients, truths, (query, candidates), (1, max(1, len(query))),
        strict=True,
    ):  # fmt: skip
        judge.gradient(got, truth, given, total * sums, f"gradient of {name}")


def nce(draw: Draw, backend: str) -> None:
    """`info_nce` with autograd, the sum or one loss a query, or `info_nce_and_grad`."""
    query, candidates, target, options, batch = batch_of(draw)
    symmetric, t = draw.maybe(0.5), draw.one_of((0.01, 0.05, 0.2, 1.0, 10.0))
    heat = torch.tensor(t, dtype=torch.float64)
    form = {"symmetric": symmetric, "workspace_mb": draw.one_of((1, 256)), "backend": backend}
    reduction = draw.one_of(("none", "none", "sum"))
    gradients: list[Tensor | None]
    if draw.maybe(0.5):
        with draw.mode():
            loss, *gradients = ek.info_nce_and_grad(
                query, candidates, target, temperature=heat, reduction=reduction, **form, **options
            )
    else:
        leaves = [x.detach().requires_grad_() for x in (query, candidates, heat)]
        with draw.mode():
            loss = ek.info_nce(
                *leaves[:2], target, temperature=leaves[2], reduction=reduction, **form, **options
            )
            loss.sum().backward()
        loss, gradients = loss.detach(), [x.grad for x in leaves]
    rows, exponents = judge.scaled((query, candidates))
    if options["max_score"] is not None:  # whose side a score is on, the backend's own say
        scores = own_scores(draw, query, candidates, backend)
        truth = reference.cosine_matrix(*rows)
        cut = options["max_score"]
        if ((scores > cut) != (truth > cut)).any():
            return
    exact, _ = reference.info_nce(*rows, batch, heat, symmetric=symmetric)
    allowed = judge.tolerances.BATCH[draw.dtype] * 0.1 if draw.dtype != torch.float64 else 1e-13
    slack = allowed * (1 / t + exact.abs().nan_to_num())
    if reduction == "sum":
        judge.near(loss, exact.sum(), slack.sum(), "sum of losses")
    else:
        judge.near(loss, exact, slack, "loss")
    ones = torch.ones(len(query), dtype=torch.float64)
    truths = reference.info_nce_gradients(*rows, batch, heat, ones, symmetric=symmetric)
    total = max(1, len(query)) / (t * min(t, 1.0))
    on_rows = judge.at_rows(truths[:2], exponents)
    for name, got, right, given in zip(
        ("query", "candidates"), gradients, on_rows, (query, candidates), strict=False
    ):
        judge.gradient(got, right, given, total, f"gradient of {name}")
    judge.near(gradients[2], truths[2], 10 * allowed * max(1, len(query)) / t**3, "of temperature")


def search(draw: Draw, backend: str) -> None:
    """`topk`, and `coded_topk` to the bit as it."""
    q, p, size = draw.count(1, 2), draw.count(300), draw.size()
    p, q = (min(x, draw.largest // size) for x in (p, q))
    bad = draw.maybe(0.3)
    query = draw.rows(q, size=size, bad=bad)
    corpus = draw.rows(p, size=size, near=finite(query), bad=bad)
    query, corpus = draw.laid(query), draw.laid(corpus)
    k, metric = draw.count(1, 5, p, p + 3), draw.one_of(("cosine", "dot"))
    with draw.mode():
        found = ek.topk(query, corpus, k, metric=metric, backend=backend)
    judge.searched(found, query, corpus, k, metric)
    if draw.maybe(0.5):
        with draw.mode():
            codes = ek.row_codes(corpus, backend=backend)
        live = draw.mask(p)
        with draw.mode():
            coded = ek.coded_topk(query, corpus, codes, k, mask=live, backend=backend)
        kept = torch.arange(p) if live is None else live.nonzero()[:, 0]
        with draw.mode():
            right = ek.topk(query, corpus[kept], k, backend=backend)
        judge.exactly(coded.scores, right.scores, "scores by codes")
        judge.exactly(coded.index, kept[right.index], "index by codes")


def advantages(draw: Draw, backend: str) -> None:
    """`group_advantages`, of the backend that takes them."""
    shape = (*leading_of(draw), draw.size())
    top = math.log10(torch.finfo(draw.dtype).max) - 1
    reward = draw.randn(*shape)
    if draw.maybe(0.3):
        reward = (reward * 2).round() / 2
    reward = (reward * 10.0 ** draw.one_of((-6.0, -3.0, 0.0, 0.0, 3.0, top))).to(draw.dtype)
    if draw.maybe(0.2) and reward.numel():
        reward.view(-1)[draw.random.randrange(reward.numel())] = draw.one_of((math.nan, math.inf))
    scale, eps = draw.one_of(("std", "batch", "none")), draw.one_of((0.0, 1e-4, 1.0))
    with draw.mode():
        found = ek.group_advantages(draw.laid(reward), scale=scale, std_eps=eps)
    exact = reference.group_advantages(reward.double(), scale=scale, std_eps=eps)
    stored = exact.to(found.dtype).double()
    relative = 1e-12 if draw.dtype == torch.float64 else 1e-6
    near_end = torch.where(stored.isfinite(), stored.abs(), 0.0)
    allowed = relative * (1 + near_end) + rounded(reward.double(), exact)
    judge.near(found, stored, allowed, "advantages")


def rounded(reward: Tensor, advantages: Tensor) -> Tensor:
    """[*, 1]: what float64 itself rounds in the mean of a group, whose terms may cancel."""
    if not reward.numel():
        return reward[..., :1]
    largest = reward.abs().amax(-1, keepdim=True)
    centred = (reward / 2 - reward.mean(-1, keepdim=True) / 2).abs().amax(-1, keepdim=True) * 2
    slope = advantages.abs().amax(-1, keepdim=True) / torch.where(centred > 0, centred, 1.0)
    slack = 8 * torch.finfo(torch.float64).eps * largest * slope
    return torch.where(slack.isfinite(), slack, 0.0)


OPS: dict[str, Callable[[Draw, str], None]] = {
    "grouped": grouped,
    "from_scores": from_scores,
    "statistics": statistics,
    "in_batch": in_batch,
    "info_nce": nce,
    "search": search,
    "advantages": advantages,
}
