"""Charts of a run, each written twice: for a light and for a dark page.

Drawing goes through matplotlib's object interface, so it needs no display and leaves no state
behind; a file is replaced whole or not at all.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elva.files import write_bytes

DOTS_PER_INCH = 160

PANELS_A_ROW = 4
"""Tasks beside each other in the chart of ranks."""


@dataclass(frozen=True)
class Theme:
    """Colours of a page: Okabe and Ito's where hue tells apart, grey for what came before."""

    suffix: str
    paper: str
    ink: str
    muted: str
    rule: str
    earlier: tuple[str, ...]
    before: str
    last: str
    controls: tuple[str, ...]


LIGHT = Theme(
    "", "#ffffff", "#1d2329", "#5b6670", "#dfe3e7",
    ("#d9dde1", "#bcc3ca", "#9aa3ac"), "#59636e", "#0072b2",
    ("#e69f00", "#009e73", "#cc79a7", "#d55e00"),
)  # fmt: skip
DARK = Theme(
    "-dark", "#161a1f", "#e6e9ec", "#9aa5b1", "#313940",
    ("#343b43", "#4a535c", "#66707a"), "#a9b3bd", "#56b4e9",
    ("#e69f00", "#22c39a", "#e39ac3", "#f0803c"),
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """A stage or control as the charts show it: the same colour in each of them."""

    title: str
    role: str  # "earlier", "before", "last" or "control"
    place: int = 0  # among those of its role

    def colour(self, theme: Theme) -> str:
        if self.role == "before":
            return theme.before
        if self.role == "last":
            return theme.last
        shades = theme.controls if self.role == "control" else theme.earlier
        return shades[self.place % len(shades)]


# -- charts ----------------------------------------------------------------------------------------


def grain_chart(
    path: Path, kinds: Sequence[str], groups: Mapping[Series, Mapping[str, Sequence[float]]]
) -> None:
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

    draw_themes(path, (9.6, 3.7), draw)


def grain_histogram(
    path: Path, kinds: Sequence[str], groups: Mapping[Series, Mapping[str, Sequence[float]]]
) -> None:
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

    draw_themes(path, (max(4.8, 2.4 * len(kinds)), 3.2), draw)


def rank_chart(
    path: Path, panels: Mapping[str, tuple[int, Mapping[Series, Sequence[int]]]]
) -> None:
    """Share of queries whose positive is within the first k, for every k; a panel a task.

    Args:
        panels: task -> (candidates in the pool, series -> ranks).
    """

    deep = ceil(len(panels) / PANELS_A_ROW)
    ranks = [np.asarray(r) for _, series in panels.values() for r in series.values()]
    lowest = max(0.0, np.floor(10 * min((r == 1).mean() for r in ranks) - 0.5) / 10)
    furthest = max(10, *(int(r.max()) for r in ranks))
    ticks = (
        (1, 2, 5, 10, 20, 50, 100, 200)
        if furthest <= 200
        else (1, 5, *(10**e for e in range(1, 8)))
    )

    def draw(figure: Figure, theme: Theme) -> None:
        across = min(len(panels), PANELS_A_ROW)
        grid = figure.subplots(deep, across, sharex=True, sharey=True, squeeze=False)
        cells = list(grid.flatten())
        for empty in cells[len(panels) :]:
            empty.set_axis_off()
        ks = np.unique(np.geomspace(1, furthest, 400).astype(int))
        for axes, (task, (pool, series)) in zip(cells, panels.items(), strict=False):
            if lowest == 0:
                axes.plot(ks, np.minimum(1, ks / pool), color=theme.muted, ls=":", label="chance")
            for s, found in series.items():
                within = np.searchsorted(np.sort(found), ks, side="right") / len(found)
                front = s.role == "last"
                axes.plot(
                    ks, within, color=s.colour(theme), label=s.title, drawstyle="steps-post",
                    lw=2.4 if front else 1.6, zorder=4 if front else 3,
                )  # fmt: skip
            axes.set_xscale("log")
            axes.set_xlim(1, furthest)
            axes.set_ylim(lowest, 1 + 0.02 * (1 - lowest))
            axes.set_xticks([k for k in ticks if k <= furthest])
            axes.xaxis.set_major_formatter(lambda k, _: f"{k:,.0f}")
            axes.minorticks_off()
            axes.set_title(task)
            axes.set_xlabel("rank k")
            axes.grid()
        for axes in grid[:, 0]:
            axes.set_ylabel("positive within the first k")
        _legend(figure, cells[0], 7)

    draw_themes(path, (9.6, 3.9 * deep), draw)


PANELS: dict[str, tuple[str, ...]] = {
    "loss parts": ("lm", "infonce", "policy"),
    "reward": ("reward",),
    "KL": ("kl",),
    "summary tokens": ("completion_length",),
    "shares": ("frac_no_ret", "frac_zero_std", "rank_1"),
}
"""Columns of the curves, and the values of metrics.jsonl in each."""

_LABELS = {
    "lm": "caption", "infonce": "InfoNCE", "policy": "policy", "reward": "mean ± std of a group",
    "kl": "to the stage's start", "completion_length": "mean", "frac_no_ret": "without [RET]",
    "frac_zero_std": "groups without spread", "rank_1": "positive first in its list",
}  # fmt: skip


def curves(path: Path, stages: Mapping[str, Sequence[Mapping[str, float | None]]]) -> bool:
    """Small multiples: a row a stage, a column a quantity. Whether there was anything to draw."""
    found = {
        panel: [k for k in keys if any(_values(s, k) is not None for s in stages.values())]
        for panel, keys in PANELS.items()
    }
    columns = {panel: keys for panel, keys in found.items() if keys}
    if not columns:
        return False

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

    draw_themes(path, (9.6, 0.75 + 1.2 * len(stages)), draw)
    return True


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
    return (theme.last, theme.controls[3], theme.controls[1])[PANELS[panel].index(key)]


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


# -- files -----------------------------------------------------------------------------------------


def draw_themes(
    path: Path,
    inches: tuple[float, float],
    draw: Callable[[Figure, Theme], None],
    themes: Sequence[Theme] = (LIGHT, DARK),
    layout: Literal["constrained"] | None = "constrained",
) -> None:
    """Draw once a theme, from matplotlib's defaults whatever the user's own settings are."""
    for theme in themes:
        with matplotlib.rc_context(), warnings.catch_warnings():
            # A script that no font has shows as boxes; the words stand in the page beside it.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_style(theme))
            figure = Figure(figsize=inches, layout=layout)
            draw(figure, theme)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
        write_bytes(path.with_stem(path.stem + theme.suffix), buffer.getvalue())


WIDE = (
    "Noto Sans CJK", "Noto Sans", "Source Han Sans", "WenQuanYi", "IPA", "Hiragino", "PingFang",
    "Malgun Gothic", "Meiryo", "Yu Gothic", "Microsoft YaHei", "Arial Unicode", "Unifont",
)  # fmt: skip
"""How fonts of further scripts are called, on Linux, macOS and Windows."""


@lru_cache(maxsize=1)
def families() -> tuple[str, ...]:
    """matplotlib's own font, and those installed of further scripts: each has what others lack."""
    names = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *sorted(name for name in names if name.startswith(WIDE)))


@lru_cache(maxsize=1)
def _drawn() -> frozenset[int]:
    """Characters that one of `families` has."""
    paths = (font_manager.findfont(name) for name in families())
    return frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


def drawable(text: str) -> str:
    r"""The text with the escape of each character that no installed font has: `\u65e5`."""
    return "".join(
        c if ord(c) in _drawn() or c.isspace() else c.encode("unicode_escape").decode()
        for c in text
    )


def _style(theme: Theme) -> Any:
    """rcParams; untyped, because matplotlib's stubs ask for every name as a literal."""
    return {
        "font.family": list(families()),
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.rule,
        "axes.facecolor": theme.paper,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": theme.paper,
        "grid.color": theme.rule,
        "grid.linewidth": 0.7,
        "legend.labelcolor": theme.ink,
        "text.color": theme.ink,
        "axes.titlecolor": theme.ink,
        "xtick.color": theme.rule,
        "ytick.color": theme.rule,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
    }
