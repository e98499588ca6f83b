"""What a report draws of a pool's embeddings, computed while they are at hand, and kept small: the
plane in which they differ most, and which negatives each objective pushes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

import elva_kernels
from elva.data import Query
from elva.recipe import StageConfig

POINTS = 600
"""Ours: candidates in the plane; more are a blot at a page's width."""

_PUSHED, NEGATIVES = 256, 100
"""Ours: queries over which a push is averaged. The paper's: negatives of a reward's group."""


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """At most so many of some rows, at equal distances."""
    if len(rows) <= count:
        return rows
    return rows[np.arange(count) * len(rows) // count]


def plane(embeddings: Tensor) -> tuple[Tensor, list[float]]:
    """The first two principal components of some embeddings' directions.

    Args:
        embeddings: [n, D], n >= 3.

    Returns:
        [n, 2] float64 coordinates, each axis turned so that its largest loading is positive, and
        the shares in [0, 1] of the variance that the two explain.
    """
    rows = embeddings.double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    left, size, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    axes = right[:2]
    turned = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()[:, 0]
    variance = size.square()
    explained = variance[:2] / variance.sum().clamp(min=1e-30)
    return left[:, :2] * size[:2] * turned, explained.tolist()


def grains_of(queries: Sequence[Query]) -> dict[str, dict[str, str]]:
    """Candidate id -> grain type -> text, of the first query with grains that it answers."""
    found: dict[str, dict[str, str]] = {}
    for query in queries:
        if query.grains:
            grains = {grain.type: grain.text for grain in query.grains}
            for id in query.positives:
                found.setdefault(id, grains)
    return found


def pushes(
    query: Tensor,
    pool: Tensor,
    positives: Sequence[Sequence[int]],
    identities: np.ndarray,
    stage: StageConfig,
) -> dict[str, Any] | None:
    """The gradient of InfoNCE and of the reward on the scores of a query's hardest negatives, by
    the negative's rank among them.

    A query's first right answer is its positive; its other ones are no negatives. A push is the
    derivative of the loss, InfoNCE or the reward's negative, by a negative's score, as a share of
    what the same loss has on all of the query's negatives: InfoNCE on the whole pool, the reward on
    its group. Below 0 the loss pulls the negative nearer.

    Args:
        query: [Q, D]; pool: [P, D].
        positives: pool rows of each query's right answers, possibly none.
        identities: [P] int64, the content of each row.
        stage: its reward, and its InfoNCE's temperature.

    Returns:
        `queries`, the number averaged over; `temperature`; `infonce` and `reward`, each the mean
        share at ranks 1, 2, ...; None where no query has a positive and a negative.
    """
    asks = spread(np.array([i for i, some in enumerate(positives) if some], np.int64), _PUSHED)
    if not len(asks) or len(pool) < 2:
        return None
    target = torch.tensor([positives[i][0] for i in asks])
    pairs = [(b, r) for b, i in enumerate(asks) for r in dict.fromkeys(positives[i][1:])]
    others = [(b, r) for b, r in pairs if r != int(target[b])]
    excluded = torch.tensor(others, dtype=torch.int64).reshape(-1, 2)
    ids = torch.from_numpy(identities)
    temperature = stage.infonce_temperature
    found = elva_kernels.rank_statistics(
        query[asks], pool, target, k=NEGATIVES, temperature=temperature, excluded=excluded,
        candidate_ids=ids,
    )  # fmt: skip
    live = found.topk_scores.isfinite()
    masses = (found.topk_scores / temperature - found.logsumexp[:, None]).exp()
    of_all = -torch.expm1(found.target_score.reshape(-1) / temperature - found.logsumexp)
    # A positive with nearly all of the mass leaves a difference that is rounding alone.
    infonce = masses / of_all.maximum(masses.sum(1)).clamp(min=1e-30)[:, None]
    scores = torch.cat([found.target_score.reshape(-1, 1), found.topk_scores], 1)
    scores = scores.masked_fill(~scores.isfinite(), 0.0).requires_grad_()
    paid = elva_kernels.reward_from_scores(scores, mask=live, **asdict(stage.reward))
    (pull,) = torch.autograd.grad(paid.reward.sum(), scores)
    reward = -pull[:, 1:] / pull[:, 1:].abs().sum(1, keepdim=True).clamp(min=1e-30)
    counted = live.any(1)
    if not bool(counted.any()):
        return None
    return {
        "queries": int(counted.sum()),
        "temperature": temperature,
        "infonce": _mean(infonce, live),
        "reward": _mean(reward, live),
    }


def _mean(shares: Tensor, live: Tensor) -> list[float]:
    """The mean at each rank over the queries that have a negative there."""
    total = shares.masked_fill(~live, 0.0).double().sum(0)
    count = live.sum(0)
    return [round(x, 7) for x in (total / count.clamp(min=1))[count > 0].tolist()]
