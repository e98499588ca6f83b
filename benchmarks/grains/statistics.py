"""Paired differences of arms: a bootstrap over starts, seeds, queries; a correction for many.

Two arms share a start, an order of data and the queries, so that a difference is of pairs. What is
drawn anew are starts, seeds within a start, and queries, those of one picture together: an interval
says what another laboratory with other starts, seeds and emoji would find.
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
        p: two-sided, of no difference; at least 1 / RESAMPLES.
        pairs: of start and seed.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def hits(figures: Mapping[str, Any], what: str) -> np.ndarray:
    """[Q] in [0, 1], a value a picture: `recall` is the mean of both directions' R@1, `t2i` and
    `i2t` one's, `recall_5` the mean R@5, `pairs` R@1 among the entity's own, NaN without rivals."""
    if what == "pairs":
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
    """Over the pairs that both have; a start counts as much as another, however many its seeds."""
    shared = sorted(ours.keys() & theirs.keys())
    apart = np.stack([hits(ours[pair], what) - hits(theirs[pair], what) for pair in shared])
    kept = ~np.isnan(apart).any(0)
    apart = apart[:, kept]
    starts = [start for start, _ in shared]
    of = [np.flatnonzero([s == start for s in starts]) for start in dict.fromkeys(starts)]
    queries = apart.shape[1]
    drawn = multinomial((*seed, "queries"), queries, np.full(queries, 1 / queries), RESAMPLES)
    by_pair = drawn @ apart.T / queries  # [RESAMPLES, pairs]
    by_start = np.stack([
        (multinomial((*seed, "seeds", i), len(some), np.full(len(some), 1 / len(some)), RESAMPLES)
         * by_pair[:, some]).sum(1) / len(some)
        for i, some in enumerate(of)
    ], 1)  # fmt: skip
    counts = multinomial((*seed, "starts"), len(of), np.full(len(of), 1 / len(of)), RESAMPLES)
    means = (counts * by_start).sum(1) / len(of)
    low, high = np.quantile(means, (0.025, 0.975))
    tail = min(float((means <= 0).mean()), float((means >= 0).mean()))
    found = float(np.mean([apart[some].mean() for some in of]))
    p = min(max(2 * tail, 1 / RESAMPLES), 1.0)
    return Difference(found, float(low), float(high), p, len(shared))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction: the chance to call any of several differences real that is not."""
    order = np.argsort(p, kind="stable")
    raised = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    out = np.empty(len(p))
    out[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return [float(x) for x in out]
