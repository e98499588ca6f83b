"""Paired differences of arms: a mixed model of starts, seeds, entities; a correction for several.

Two arms share starts, seeds (orders of the data) and queries, so that a difference is of pairs. The
order of a seed is the same for every start, and queries of one entity share their words and rivals:
starts, seeds and entities are crossed, each a random effect, and so is what they have in common.
Their variances are those of the balanced analysis of variance, none below 0, and an interval is
Student's by Satterthwaite's degrees of freedom. It says what another laboratory with other starts,
orders and entities would find. Of one seed it knows nothing of what another would change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

Results = Mapping[tuple[int, int], Mapping[str, Any]]
"""(start, seed) -> a split's figures, as `measure.figures` gives them."""


class Difference(NamedTuple):
    """A mean difference of two arms.

    Attributes:
        mean: ours minus theirs.
        low, high: the 95 % interval.
        p: two-sided, of no difference.
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


def difference(ours: Results, theirs: Results, what: str, entities: Sequence[int]) -> Difference:
    """Over the seeds that both have of every start that both have.

    Args:
        entities: [Q], which of them each query asks for.
    """
    shared = ours.keys() & theirs.keys()
    starts = sorted({start for start, _ in shared})
    seeds = [k for k in sorted({k for _, k in shared}) if all((s, k) in shared for s in starts)]
    assert seeds, "two arms that are compared share a seed of every start"
    apart = np.array([
        [hits(ours[s, k], what) - hits(theirs[s, k], what) for k in seeds] for s in starts
    ])  # fmt: skip
    known = ~np.isnan(apart).any((0, 1))
    apart, own = apart[..., known], np.unique(np.asarray(entities)[known], return_inverse=True)[1]
    middle = float(apart.mean())
    # Of an entity what its queries add to the mean, which so stays that of the queries.
    summed = (apart - middle) @ np.eye(own.max() + 1)[own] * ((own.max() + 1) / len(own))
    low, high, p = interval(middle + summed)  # [starts, seeds, entities]
    return Difference(middle, low, high, p, len(starts) * len(seeds))


def variance_of_mean(values: np.ndarray) -> tuple[float, float]:
    """Of a table whose axes are crossed random effects: the variance of its mean, and its degrees
    of freedom, at least 1. An axis of length 1 is none."""
    values = values.squeeze()
    every = [axes for n in range(values.ndim + 1) for axes in combinations(range(values.ndim), n)]
    effects: dict[tuple[int, ...], np.ndarray] = {}
    squares, degrees = {}, {}
    for axes in every:
        others = tuple(axis for axis in range(values.ndim) if axis not in axes)
        effects[axes] = values.mean(others, keepdims=True)
        effects[axes] = effects[axes] - sum(effects[some] for some in every if {*some} < {*axes})
        degrees[axes] = int(np.prod([values.shape[axis] - 1 for axis in axes]))
        size = values.size / effects[axes].size
        squares[axes] = size * float((effects[axes] ** 2).sum()) / max(degrees[axes], 1)
    total, weights = 0.0, dict.fromkeys(every, 0)
    for axes in every[1:]:
        above = {more: (-1) ** (len(more) - len(axes)) for more in every if {*axes} <= {*more}}
        part = sum(sign * squares[more] for more, sign in above.items())
        if part > 0:  # the variance of this effect, times its share of the mean's
            total += part
            for more, sign in above.items():
                weights[more] += sign
    spread = sum((weights[axes] * squares[axes]) ** 2 / degrees[axes] for axes in every[1:])
    return total / values.size, max(total**2 / spread, 1.0) if spread else 1.0


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Low, high, p: the 95 % interval of such a table's mean, and the two-sided p of 0."""
    middle, (variance, degrees) = float(values.mean()), variance_of_mean(values)
    if variance == 0:
        return middle, middle, float(middle == 0)
    t, shares = _student(degrees)
    half = float(np.interp(0.975, shares, t)) * variance**0.5
    p = 2 * float(np.interp(-abs(middle) / variance**0.5, t, shares))
    return middle - half, middle + half, p


def _student(degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Student's distribution: values, and the share of it below each.

    With t = sqrt(degrees) * tan(angle) its density is a power of the cosine.
    """
    angle = np.linspace(-np.pi / 2, np.pi / 2, 200_001)[1:-1]
    with np.errstate(under="ignore"):
        density = np.cos(angle) ** (degrees - 1)
    shares = np.cumsum(density) - density / 2
    return np.sqrt(degrees) * np.tan(angle), shares / density.sum()


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction: the chance to call any of several differences real that is not."""
    order = np.argsort(p, kind="stable")
    raised = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    out = np.empty(len(p))
    out[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return [float(x) for x in out]
