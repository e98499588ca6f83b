"""Paired differences of arms: a bootstrap over starts, seeds and queries; a correction for several.

Two arms share starts, seeds (orders of the data) and queries, so that a difference is of pairs. The
order of a seed is the same for every start: the three are crossed, and each is drawn anew by
itself, queries of one picture together (Owen, "The pigeonhole bootstrap", Annals of Applied
Statistics, 2007). An interval says what another laboratory with other starts, orders and emoji
would find. Of one seed it knows nothing of what another would change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from elva.draws import Seed, multinomial

RESAMPLES = 10_000

Results = Mapping[tuple[int, int], Mapping[str, Any]]
"""(start, seed) -> a split's figures, as `measure.figures` gives them."""


class Difference(NamedTuple):
    """A mean difference of two arms.

    Attributes:
        mean: ours minus theirs.
        low, high: the 95 % interval.
        p: two-sided, of no difference; at least 2 / (RESAMPLES + 1).
        pairs: of start and seed.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def hits(figures: Mapping[str, Any], what: str) -> np.ndarray:
    """[Q] in [0, 1], a value a picture: `recall` is the mean of both directions' R@1, `t2i` and
    `i2t` one's, `recall_5` the mean R@5, `own` R@1 among the entity's own, NaN without rivals."""
    if what == "own":
        ranks = np.asarray(figures["pairs"], float)
        return np.where(ranks > 0, ranks == 1, np.nan)
    within = 5 if what == "recall_5" else 1
    of = {d: np.asarray(ranks) <= within for d, ranks in figures["ranks"].items()}
    if what in of:
        return of[what].astype(float)
    return np.mean([*of.values()], axis=0)


def mean(results: Results, what: str) -> float:
    """A figure's mean over pairs and queries."""
    return float(np.nanmean([hits(figures, what) for figures in results.values()]))


def difference(ours: Results, theirs: Results, what: str, seed: Seed = ()) -> Difference:
    """Over the pairs that both have, each as much as another."""
    shared = sorted(ours.keys() & theirs.keys())
    apart = np.stack([hits(ours[pair], what) - hits(theirs[pair], what) for pair in shared])
    apart = apart[:, ~np.isnan(apart).any(0)]
    by_pair = _drawn(apart.shape[1], (*seed, "queries")) @ apart.T / apart.shape[1]
    starts, seeds = (np.unique(side, return_inverse=True) for side in zip(*shared, strict=True))
    weights = (
        _drawn(len(starts[0]), (*seed, "starts"))[:, starts[1]]
        * _drawn(len(seeds[0]), (*seed, "seeds"))[:, seeds[1]]
    )  # [RESAMPLES, pairs]
    drawn = weights.sum(1) > 0  # none, where no start has the seeds that were drawn
    means = (weights * by_pair).sum(1)[drawn] / weights.sum(1)[drawn]
    low, high = np.quantile(means, (0.025, 0.975))
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(2 * (tail + 1) / (len(means) + 1), 1.0)
    return Difference(float(apart.mean()), float(low), float(high), p, len(shared))


def _drawn(count: int, seed: Seed) -> np.ndarray:
    """[RESAMPLES, count]: how often each of so many is drawn, of as many draws."""
    return multinomial(seed, count, np.full(count, 1 / count), RESAMPLES)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction: the chance to call any of several differences real that is not."""
    order = np.argsort(p, kind="stable")
    raised = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    out = np.empty(len(p))
    out[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return [float(x) for x in out]
