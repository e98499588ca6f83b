"""The in-batch ops of one query at a time, in plain loops over its positives and negatives.

Written from the words of the contract and from nothing that computes it: floats, lists and `math`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

Row = Sequence[float]


class Asked(NamedTuple):
    """What a batch says of its pairs."""

    target: Sequence[Sequence[int]]  # [B][P], -1: none
    excluded: Sequence[tuple[int, int]] = ()
    ids: Sequence[int] | None = None
    max_score: float | None = None


class Statistics(NamedTuple):
    """Of one query: three lists over its positives, its negatives hardest first, the logsumexp."""

    n_greater: list[int]
    n_equal: list[int]
    rank: list[int]
    order: list[int]
    logsumexp: float


def cosine(a: Row, b: Row) -> float:
    """NaN where a row is not finite, 0 where one is zero."""
    if not all(map(math.isfinite, (*a, *b))):
        return math.nan
    sizes = [max(map(abs, x)) for x in (a, b)]
    if 0 in sizes:
        return 0.0
    a, b = ([v / size for v in x] for x, size in zip((a, b), sizes, strict=True))
    return dot(a, b) / math.sqrt(dot(a, a)) / math.sqrt(dot(b, b))


def dot(a: Row, b: Row) -> float:
    return math.fsum(v * w for v, w in zip(a, b, strict=True))


def negatives(scores: Sequence[Row], asked: Asked, i: int) -> list[int]:
    """L_i: all candidates but those that something leaves out."""
    own = {t for t in asked.target[i] if t >= 0}
    out = own | {j for row, j in asked.excluded if row == i}
    if asked.ids is not None:
        names = {asked.ids[t] for t in own}
        out |= {j for j, name in enumerate(asked.ids) if name in names}
    if asked.max_score is not None:
        out |= {j for j, score in enumerate(scores[i]) if score > asked.max_score}
    return [j for j in range(len(scores[i])) if j not in out]


def statistics(scores: Sequence[Row], asked: Asked, i: int, temperature: float) -> Statistics:
    own = [scores[i][t] for t in asked.target[i] if t >= 0]
    everyone = negatives(scores, asked, i)
    found = [j for j in everyone if not math.isnan(scores[i][j])]
    counts = []
    for t in asked.target[i]:
        if t < 0:
            counts.append((0, 0, 0))
            continue
        bad = math.isnan(scores[i][t])
        greater = len(found) if bad else sum(scores[i][j] > scores[i][t] for j in found)
        alike = [j for j in everyone if j not in found] if bad else found
        equal = len(alike) if bad else sum(scores[i][j] == scores[i][t] for j in alike)
        counts.append((greater, equal, 1 + greater + equal))
    order = sorted(found, key=lambda j: (-scores[i][j], j))
    lse = logsumexp([*own, *(scores[i][j] for j in found)], temperature)
    return Statistics(*(list(x) for x in zip(*counts, strict=True)), order, lse)


def logsumexp(scores: Row, temperature: float) -> float:
    """NaN where a score is; -inf of none."""
    if any(map(math.isnan, scores)):
        return math.nan
    if not scores:
        return -math.inf
    peak = max(scores)
    return peak / temperature + math.log(
        math.fsum(math.exp((s - peak) / temperature) for s in scores)
    )


def mean(values: Row) -> float:
    """Over a query's positives; 0 for a query without one."""
    return math.fsum(values) / len(values) if values else 0.0


def info_nce(
    scores: Sequence[Row], asked: Asked, i: int, temperature: float, *, symmetric: bool
) -> float:
    losses = []
    for t in asked.target[i]:
        if t < 0:
            continue
        rivals = [[scores[i][j] for j in negatives(scores, asked, i)]]
        if symmetric:
            others = [j for j, given in enumerate(asked.target) if max(given) >= 0]
            rivals.append([scores[j][t] for j in others if t in negatives(scores, asked, j)])
        losses.append(mean([cross_entropy(scores[i][t], each, temperature) for each in rivals]))
    return mean(losses)


def cross_entropy(own: float, rivals: Row, temperature: float) -> float:
    """Of one positive among the rivals that are finite."""
    there = [own, *(s for s in rivals if not math.isnan(s))]
    return logsumexp(there, temperature) - own / temperature


def reward(scores: Sequence[Row], asked: Asked, i: int, head: int, **weights: float) -> float:
    """Eq. 3, 5 and 12, the mean over the positives."""
    there = [j for j in negatives(scores, asked, i) if not math.isnan(scores[i][j])]
    rivals = [scores[i][j] for j in there]
    own = [scores[i][t] for t in asked.target[i] if t >= 0]
    return mean([one_reward(s, rivals, head, **weights) for s in own])


def one_reward(
    own: float,
    rivals: Row,
    head: int,
    *,
    margin: float,
    rank_penalty: float,
    w_margin: float,
    w_rank: float,
) -> float:
    if math.isnan(own):
        return math.nan
    hinge = max(0.0, own - max(rivals) - margin) if rivals else 0.0
    # Ranked by score; the positive, marked 1, behind all that equal it.
    places = sorted([(-s, 0) for s in rivals] + [(-own, 1)])
    contrast = own / (1 + math.log(1 + places.index((-own, 1))))
    penalty = math.fsum(
        -s * (math.log(rank) - 1)
        for rank, (s, is_own) in enumerate(places, 1)
        if not is_own and rank <= head
    )
    return w_margin * hinge + w_rank * (contrast - rank_penalty * penalty)
