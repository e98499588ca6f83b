"""Intervals of a mean over queries: the bootstrap, of one system's values or of paired differences.

They say how far another draw of queries would move a figure, and nothing of another training seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from elva.draws import Seed, multinomial

_RESAMPLES = 10_000
"""Ours: the 2.5 % quantile of as many has a standard error of 0.4 % of the resamples' spread."""


class Interval(NamedTuple):
    """A mean over queries and the bootstrap's 95 % interval (percentiles) around it."""

    mean: float
    low: float
    high: float
    queries: int


def mean_interval(values: Sequence[float], seed: Seed = ()) -> Interval:
    """The mean of one value a query, with its interval.

    A resample's mean depends only on how often it has each distinct value, so that a resample is a
    draw of counts, and 0/1 values of any number of queries cost nothing.

    Args:
        values: [Q], Q >= 1, finite.
        seed: of the draw; the same values and seed give the same interval.

    Example:
        >>> mean_interval([1.0, 0.0, 1.0, 1.0]).mean
        0.75
    """
    distinct, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    queries = int(counts.sum())
    drawn = multinomial((*seed, "bootstrap"), queries, counts / queries, _RESAMPLES)
    low, high = np.quantile(drawn @ distinct / queries, (0.025, 0.975))
    return Interval(float(counts @ distinct / queries), float(low), float(high), queries)


def paired_interval(ours: Sequence[float], theirs: Sequence[float], seed: Seed = ()) -> Interval:
    """The mean of ours minus theirs over the same queries, with its interval.

    Args:
        ours, theirs: [Q], a value a query, in the same order of queries.
    """
    return mean_interval(np.subtract(ours, theirs).tolist(), seed)


class SignTest(NamedTuple):
    """Queries on which one of two is better, and how likely so uneven a split is by chance."""

    won: int
    lost: int
    p: float


def sign_test(ours: Sequence[float], theirs: Sequence[float]) -> SignTest:
    """The exact two-sided sign test over the same queries (of hits and misses McNemar's).

    Args:
        ours, theirs: [Q], a value a query, in the same order of queries.

    Example:
        >>> sign_test([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])
        SignTest(won=5, lost=0, p=0.0625)
    """
    apart = np.subtract(ours, theirs)
    won, lost = int((apart > 0).sum()), int((apart < 0).sum())
    n = won + lost
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
            for i in range(min(won, lost) + 1)]  # fmt: skip
    return SignTest(won, lost, round(min(1.0, 2 * math.fsum(map(math.exp, logs))), 12))
