"""Charts of a run, each for a light and for a dark page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from elva.report.drawing import Drawing, Series, Theme

PANEL = (4.6, 3.4)
"""Inches of a chart that stands beside another on a wide page and below it on a narrow one."""


def grain_chart(
    kinds: Sequence[str], groups: Mapping[Series, Mapping[str, Sequence[float]]]
) -> Drawing:
    """Grouped bars: mean grain distance by grain type, with the mean's standard error."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        width = 0.82 / max(1, len(groups))
        for k, (series, distances) in enumerate(groups.items()):
            at = np.arange(len(kinds)) - 0.41 + (k + 0.5) * width
            values = [distances.get(kind, ()) for kind in kinds]
            axes.bar(
                at, [fmean(v) if v else 0.0 for v in values], width * 0.92,
                color=series.colour(theme), label=series.title,
                yerr=[stdev(v) / sqrt(len(v)) if len(v) > 1 else 0.0 for v in values],
                error_kw={"elinewidth": 0.8, "ecolor": theme.ink},
            )  # fmt: skip
        counts = [max(len(d.get(kind, ())) for d in groups.values()) for kind in kinds]
        labels = [f"{kind}\n{count}" for kind, count in zip(kinds, counts, strict=True)]
        axes.set_xticks(range(len(kinds)), labels)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("mean cosine distance")
        axes.grid(axis="y")
        _legend(figure, axes, len(groups))

    return Drawing((9.6, 3.7), draw)


def grain_histogram(
    kinds: Sequence[str], groups: Mapping[Series, Mapping[str, Sequence[float]]]
) -> Drawing:
    """Histograms of grain distances, a panel a type; what lies at 0 is not seen."""

    def draw(figure: Figure, theme: Theme) -> None:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            every = [d for group in groups.values() for d in group.get(kind, ())]
            edges = np.linspace(0.0, max(0.05, *every), 25)
            for series, group in groups.items():
                found = np.asarray(group.get(kind, ()))
                axes.hist(
                    found, edges, weights=np.full(len(found), 1 / max(1, len(found))),
                    histtype="step", color=series.colour(theme), label=series.title,
                )  # fmt: skip
            axes.set_title(kind, parse_math=False)
            axes.set_xlabel("cosine distance")
        panels[0].set_ylabel("share of queries")
        _legend(figure, panels[0], len(groups))

    return Drawing((max(4.8, 2.4 * len(kinds)), 3.2), draw)


def rank_chart(pool: int, series: Mapping[Series, Sequence[int]]) -> Drawing:
    """Share of a task's queries whose positive is within the first k, for every k.

    Args:
        pool: candidates.
        series: ranks.
    """
    ranks = [np.asarray(found) for found in series.values()]
    furthest = max(10, *(int(r.max()) for r in ranks))

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        ks = np.unique(np.geomspace(1, furthest, 200).astype(int))
        axes.plot(ks, np.minimum(1, ks / pool), color=theme.muted, ls=":")
        for s, found in zip(series, ranks, strict=True):
            within = np.searchsorted(np.sort(found), ks, side="right") / len(found)
            front = s.role == "last"
            axes.plot(
                ks, within, color=s.colour(theme), drawstyle="steps-post",
                lw=2.4 if front else 1.6, zorder=4 if front else 3,
            )  # fmt: skip
        rank_axis(axes.xaxis, furthest)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("rank k")
        axes.set_ylabel("positive within the first k")
        axes.grid()

    return Drawing(PANEL, draw)


def rank_axis(axis: Axis, furthest: int) -> None:
    """Ranks on a logarithmic axis."""
    axes = axis.axes
    near, far = (1, 2, 5, 10, 20, 50, 100, 200), (1, 5, *(10**e for e in range(1, 8)))
    ticks = [k for k in (near if furthest <= 200 else far) if k <= furthest]
    if axis is axes.xaxis:
        axes.set_xscale("log")
        axes.set_xlim(1, furthest)
    else:
        axes.set_yscale("log")
        axes.set_ylim(1, furthest)
    axis.set_ticks(ticks)
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(lambda k, _: f"{k:,.0f}")


_PANELS: dict[str, tuple[str, ...]] = {
    "loss parts": ("lm", "infonce", "policy"),
    "reward": ("reward",),
    "its parts": ("margin_reward", "rank_reward"),
    "KL": ("kl",),
    "summary tokens": ("completion_length",),
    "shares": ("frac_no_ret", "frac_zero_std", "rank_1"),
}
"""Columns of the curves, and the values of metrics.jsonl in each."""

_LABELS = {
    "lm": "caption", "infonce": "InfoNCE", "policy": "policy", "reward": "mean ± std of a group",
    "margin_reward": "margin", "rank_reward": "rank",
    "kl": "to the stage's start", "completion_length": "mean", "frac_no_ret": "without [RET]",
    "frac_zero_std": "groups without spread", "rank_1": "positive first in its list",
}  # fmt: skip


def curves(stages: Mapping[str, Sequence[Mapping[str, float | None]]]) -> Drawing | None:
    """Small multiples: a row a stage, a column a quantity; None where there is nothing to draw."""
    found = {
        panel: [k for k in keys if any(_values(s, k) is not None for s in stages.values())]
        for panel, keys in _PANELS.items()
    }
    columns = {panel: keys for panel, keys in found.items() if keys}
    if not columns:
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        cells = figure.subplots(len(stages), len(columns), squeeze=False)
        for row, (title, lines) in zip(cells, stages.items(), strict=True):
            for axes, (panel, keys) in zip(row, columns.items(), strict=True):
                _cell(axes, theme, panel, keys, lines)
            words = title.replace("control ", "control\n")
            row[0].set_ylabel(words, rotation=0, ha="right", va="center", weight="bold")
            row[0].yaxis.label.set_color(theme.ink)
        depth = max(len(keys) for keys in columns.values())
        for axes, (panel, keys) in zip(cells[0], columns.items(), strict=True):
            axes.set_title(panel, loc="left", pad=6 + 10 * depth)
            for i, key in enumerate(keys):
                axes.annotate(
                    _LABELS[key], (0, 1), (0, 4 + 10 * (depth - 1 - i)), xycoords="axes fraction",
                    textcoords="offset points", fontsize=7.5, color=_ink(theme, panel, key),
                )  # fmt: skip

    return Drawing((9.6, 0.75 + 1.2 * len(stages)), draw)


def overlay(lines: Mapping[Series, Sequence[float | None]]) -> Drawing:
    """A value by step, of several runs.

    Args:
        lines: a value a step; None where it is missing.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for series, found in lines.items():
            values = np.array([np.nan if v is None else float(v) for v in found])
            steps, colour = np.arange(1, len(values) + 1), series.colour(theme)
            axes.plot(steps, values, color=colour, lw=0.6, alpha=0.35)
            axes.plot(steps, smoothed(values), color=colour, lw=1.6)
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.set_xlabel("step")
        axes.grid(axis="y")

    return Drawing(PANEL, draw)


def _cell(
    axes: Axes,
    theme: Theme,
    panel: str,
    keys: Sequence[str],
    lines: Sequence[Mapping[str, float | None]],
) -> None:
    drawn = False
    for key in keys:
        values, ink = _values(lines, key), _ink(theme, panel, key)
        if values is None:
            continue
        steps = np.arange(1, len(values) + 1)
        smooth = smoothed(values)
        axes.plot(steps, values, color=ink, lw=0.6, alpha=0.35)
        axes.plot(steps, smooth, color=ink, lw=1.5)
        spread = _values(lines, f"{key}_std")
        if spread is not None:
            spread = smoothed(spread)
            axes.fill_between(steps, smooth - spread, smooth + spread, color=ink, alpha=0.2, lw=0)
        drawn = True
    if not drawn:
        axes.set_axis_on()
        axes.spines[:].set_visible(False)
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "-", transform=axes.transAxes, color=theme.muted, ha="center")
        return
    if panel == "shares":
        axes.set_ylim(-0.04, 1.04)
    axes.locator_params(axis="x", nbins=3, integer=True)
    axes.locator_params(axis="y", nbins=4)
    axes.grid(axis="y")


def _ink(theme: Theme, panel: str, key: str) -> str:
    return (theme.last, theme.controls[3], theme.controls[1])[_PANELS[panel].index(key)]


def _values(lines: Sequence[Mapping[str, float | None]], key: str) -> np.ndarray | None:
    """A value by step, NaN where it is missing; None where it always is."""
    found = [line.get(key) for line in lines]
    values = np.array([np.nan if v is None else float(v) for v in found])
    return None if np.isnan(values).all() else values


def smoothed(values: np.ndarray) -> np.ndarray:
    """A centred mean over a twentieth of the curve, shorter at its ends; NaNs are left out."""
    half = max(1, len(values) // 40)
    padded = np.pad(values, half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    known = ~np.isnan(windows)
    count = known.sum(1)
    total = np.where(known, windows, 0.0).sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, 7), frameon=False)
