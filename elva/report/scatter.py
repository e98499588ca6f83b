"""Charts of a run's queries, candidates and negatives, one by one: a panel each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from elva.report.charts import PANEL, rank_axis
from elva.report.drawing import Drawing, Series, Theme

QUERIES = 1500
"""Ours: queries drawn one by one; of more as many, at equal distances, which the page says."""

GROUPS = 5
"""Colours that tell groups of candidates apart; the others are grey."""

MARKERS = "os^Dv"


def spread(rows: Sequence[Any]) -> list[Any]:
    """At most `QUERIES` of some rows, at equal distances."""
    if len(rows) <= QUERIES:
        return list(rows)
    return [rows[i * len(rows) // QUERIES] for i in range(QUERIES)]


def moves(before: Series, last: Series, pairs: Sequence[tuple[int, int]]) -> Drawing:
    """Ranks of the right answers before and after a stage: a disc is one query or more.

    Args:
        pairs: (before, after) of each query.
    """
    counts = Counter(pairs)
    furthest = max(10, *(rank for pair in counts for rank in pair))

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        axes.plot([1, furthest], [1, furthest], color=theme.muted, lw=0.8, ls=":")
        for count in sorted(set(counts.values())):  # one size a call: its shape is written once
            alike = np.array([pair for pair, n in counts.items() if n == count])
            axes.scatter(
                alike[:, 0], alike[:, 1], s=14 * sqrt(count), color=last.colour(theme), alpha=0.45,
                linewidths=0, clip_on=False,
            )  # fmt: skip
        rank_axis(axes.xaxis, furthest)
        rank_axis(axes.yaxis, furthest)
        axes.set_aspect("equal")
        axes.set_xlabel(f"rank after {before.title}")
        axes.set_ylabel(f"rank after {last.title}")
        axes.grid()

    return Drawing(PANEL, draw)


def rewards(groups: Mapping[Series, Sequence[tuple[float, float]]]) -> Drawing:
    """The two parts of each query's reward against each other, and their means as crosses.

    Args:
        groups: stage -> (margin, rank) rewards.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for series, found in groups.items():
            margin, rank = np.array(found).T
            colour = series.colour(theme)
            axes.scatter(margin, rank, s=10, color=colour, alpha=0.45, linewidths=0)
            axes.plot(margin.mean(), rank.mean(), "P", ms=11, color=colour, mec=theme.ink, zorder=4)
        most = max(margin for found in groups.values() for margin, _ in found)
        axes.set_xlim(-0.02 * max(most, 0.1), 1.05 * max(most, 0.1))
        axes.set_xlabel("margin reward")
        axes.set_ylabel("rank reward")
        axes.grid()

    return Drawing(PANEL, draw)


def groups_of(points: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Grain type -> its most frequent texts among some points, each of three points or more; the
    types in the order of how many points these texts cover, at most two."""
    found = {}
    for kind in dict.fromkeys(kind for point in points for kind in point["grains"]):
        counts = Counter(p["grains"][kind] for p in points if kind in p["grains"])
        texts = [(n, text) for text, n in counts.most_common(GROUPS) if n >= 3]
        if len(texts) > 1:
            found[kind] = texts
    order = sorted(found, key=lambda kind: -sum(n for n, _ in found[kind]))
    return {kind: [text for _, text in found[kind]] for kind in order[:2]}


def _group_colours(theme: Theme) -> tuple[str, ...]:
    """`GROUPS` colours."""
    return (theme.last, *theme.controls)


def plane(points: Sequence[Mapping[str, Any]], kind: str | None, texts: Sequence[str]) -> Drawing:
    """Candidates in the plane of their first two principal components.

    Args:
        points: `x`, `y` and `grains` of each.
        kind: The grain type that colours them; None: all are one.
        texts: Its texts that have a colour.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        x, y = (np.array([p[side] for p in points]) for side in ("x", "y"))
        of = [p["grains"].get(kind) for p in points]
        rest = np.array([text not in texts for text in of])
        axes.scatter(x[rest], y[rest], s=7, color=theme.muted, alpha=0.35, linewidths=0)
        for text, colour, marker in zip(texts, _group_colours(theme), MARKERS, strict=False):
            own = np.array([found == text for found in of])
            axes.scatter(x[own], y[own], s=16, color=colour, marker=marker, linewidths=0, zorder=3)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set(xticks=[], yticks=[], xlabel="first component", ylabel="second component")

    return Drawing(PANEL, draw)


def pushes(shares: Mapping[str, Sequence[float]]) -> Drawing:
    """How much of an objective's push each of a query's negatives gets, by the negative's rank.

    Args:
        shares: "InfoNCE" and "reward" -> mean shares at ranks 1, 2, ...
    """

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        axes.axhline(0, color=theme.muted, lw=0.8)
        for colour, found in zip((theme.controls[0], theme.last), shares.values(), strict=False):
            axes.plot(np.arange(1, len(found) + 1), found, color=colour, lw=1.8)
        rank_axis(axes.xaxis, max(2, *map(len, shares.values())))
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.set_xlabel("the negative's rank among the query's negatives")
        axes.set_ylabel("share of the push")
        axes.grid(axis="y")

    return Drawing(PANEL, draw)
