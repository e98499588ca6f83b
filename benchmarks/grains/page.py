"""The answer as tables and a plot, from the files of the trials."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.grains.arms import arms
from benchmarks.grains.statistics import Difference, Results, difference, holm, mean
from benchmarks.grains.trial import COSTS, ENTITIES, RESULTS, STARTS

CONTROL = "hard"
"""The best control, by R@1 of both directions on val."""


def read(split: str, results: Path = RESULTS) -> dict[str, dict[tuple[int, int], Any]]:
    """Arm -> (start, seed) -> a split's figures, in arms.yaml's order, of the arms all of whose
    trials have them."""
    found: dict[str, dict[tuple[int, int], Any]] = {}
    for name, arm in arms().items():
        trials = [json.loads(f.read_text("utf-8")) for f in sorted((results / name).glob("*.json"))]
        own = {(one["start"], one["seed"]): one[split] for one in trials if split in one}
        if own.keys() >= {(s, k) for s in STARTS for k in range(arm.described.pairs)}:
            found[name] = own
    for name in [name for name in found if arms()[name].stage is None]:
        own = {start: figures for (start, _), figures in found[name].items()}
        pairs = {pair for others in found.values() for pair in others}
        found[name] = {pair: own[pair[0]] for pair in sorted(pairs)}  # whatever the seed
    return found


def curve_table(split: str, results: Path = RESULTS) -> str:
    """Markdown, a row a look at stage 2: R@1 on val, the mean of the starts (lowest to highest)."""
    assert split == "val", "starts are looked at on val"
    curves = [json.loads(f.read_text("utf-8"))["curve"] for f in (results / "start").glob("*.json")]
    rows = []
    for step in curves[0]["t2i"]:
        of = ([curve[direction][step] for curve in curves] for direction in ("t2i", "i2t"))
        rows.append([step, *(f"{fmean(r):.3f} ({min(r):.3f} to {max(r):.3f})" for r in of)])
    return markdown(["steps of stage 2", "t→i R@1", "i→t R@1"], rows)


# -- the comparisons that the plan names -----------------------------------------------------------

SHOWN = {"recall": "R@1", "recall_5": "R@5", "own": "R@1 within the entity"}


def comparisons(
    found: Mapping[str, Results], what: str, entities: Sequence[int]
) -> dict[tuple[str, str], Difference]:
    """(arm, the arm that it is compared with) -> their difference, p corrected for them all."""
    planned = [
        (name, other)
        for name in found
        for other in arms()[name].described.against
        if other in found
    ]
    apart = [difference(found[a], found[b], what, entities) for a, b in planned]
    raised = holm([one.p for one in apart])
    return {two: d._replace(p=p) for two, d, p in zip(planned, apart, raised, strict=True)}


def entities_of(split: str, results: Path = RESULTS) -> list[int]:
    """Which entity each query of a split asks for."""
    found: dict[str, list[int]] = json.loads((results / ENTITIES.name).read_text("utf-8"))
    return found[split]


def comparison_table(split: str, results: Path = RESULTS) -> str:
    """Markdown, a row a comparison."""
    found = read(split, results)
    entities = entities_of(split, results)
    apart = {what: comparisons(found, what, entities) for what in SHOWN}
    heads = ["arm", "minus", "pairs", *(h for shown in SHOWN.values() for h in (shown, "p"))]
    lines = []
    for a, b in apart["recall"]:
        cells = [arms()[a].described.what, arms()[b].described.what]
        cells += [str(apart["recall"][a, b].pairs)]
        for of in apart.values():
            one = of[a, b]
            cells += [
                f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]",
                f"{one.p:.3f}" if one.p >= 0.0005 else "<0.001",
            ]
        lines.append(cells)
    return markdown(heads, lines)


# -- every arm -------------------------------------------------------------------------------------


def table(split: str, results: Path = RESULTS) -> str:
    """Markdown, a row an arm."""
    found = read(split, results)
    heads = ["arm", "pairs", "t→i R@1", "i→t R@1", "R@5", "within the entity",
             "R@1 minus the start's", "minus hard batches'", "tone: distance", "read",
             "lead"]  # fmt: skip
    lines = []
    for name, own in found.items():
        trained = arms()[name].stage is not None  # a start is one model, whatever the seed
        cells = [arms()[name].described.what, str(len(own) if trained else len(STARTS))]
        cells += [f"{mean(own, what):.3f}" for what in ("t2i", "i2t", "recall_5", "own")]
        for other in ("start", CONTROL):
            shared = own.keys() & found[other].keys()
            ours, theirs = (
                mean({pair: of[pair] for pair in shared}, "recall") for of in (own, found[other])
            )
            cells += [f"{ours - theirs:+.3f}" if name != other else ""]
        cells += [
            f"{figure_of(own, what):.3f}" for what in ("tone distance", "probe of the tone", "lead")
        ]
        lines.append(cells)
    return markdown(heads, lines)


def cost_table(split: str, results: Path = RESULTS) -> str:
    """Markdown, a row an arm whose cost was measured, beside its R@1 of both directions."""
    found, file = read(split, results), results / COSTS.name
    costs = json.loads(file.read_text(encoding="utf-8"))["arms"] if file.is_file() else {}
    rows = [
        [arms()[name].described.what, f"{min(cost['seconds']):.0f}",
         "-" if cost["first"] is None else f"{cost['first']:.1%}",
         f"{mean(found[name], 'recall'):.3f}" if name in found else "-"]
        for name in arms()
        if (cost := costs.get(name))
    ]  # fmt: skip
    return markdown(["arm", "s", "answers first where its reward looks", "R@1"], rows)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# -- which figure tells what use is made of the grains ---------------------------------------------

FIGURES: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "grain distance": lambda g: g["distance"]["all"],
    "tone distance": lambda g: g["distance"]["tone"],
    "gender distance": lambda g: g["distance"]["gender"],
    "grain distance over that across entities": lambda g: g["relative"],
    "distance within an entity": lambda g: g["within"],
    "distance across entities": lambda g: g["across"],
    "norm": lambda g: g["norm"],
    "lead": lambda g: g["lead"],
    "probe of the tone": lambda g: g["probe"]["tone"],
    "probe of the gender": lambda g: g["probe"]["gender"],
}


def figure_of(results: Results, figure: str) -> float:
    """The mean of one of `FIGURES`."""
    return fmean(FIGURES[figure](one["grains"]) for one in results.values())


def of_start(results: Results, start: int) -> Results:
    """Those from one start."""
    return {pair: figures for pair, figures in results.items() if pair[0] == start}


def tracking(found: Mapping[str, Results], names: Sequence[str]) -> dict[str, list[float]]:
    """Figure -> for each start how well, over arms, it tells R@1 within the entity: Spearman's rank
    correlation, of which an arm that collapses is one of many."""
    told: dict[str, list[float]] = {figure: [] for figure in FIGURES}
    for start in STARTS:
        own = [of_start(found[name], start) for name in names]
        truth = ranked([mean(one, "own") for one in own])
        for figure in FIGURES:
            guess = ranked([figure_of(one, figure) for one in own])
            told[figure].append(correlation(guess, truth))
    return told


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's, 0 where one does not vary: it tells nothing of the other."""
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 < y.std() else 0.0


def tracking_table(split: str, results: Path = RESULTS) -> str:
    """Markdown, a row a figure: the mean over starts, lowest and highest."""
    found = read(split, results)
    trained = {name: arms()[name].stage for name in found}
    groups = {
        "every arm": [*found],
        "hard batches": [n for n, stage in trained.items() if stage and stage.hard_batches],
        "other batches": [n for n, stage in trained.items() if stage and not stage.hard_batches],
    }
    told = {title: tracking(found, names) for title, names in groups.items()}
    heads = ["figure", *(f"{title} ({len(names)})" for title, names in groups.items())]
    return markdown(heads, [
        [figure, *(f"{fmean(r):+.2f} ({min(r):+.2f} to {max(r):+.2f})"
                   for r in (of[figure] for of in told.values()))]
        for figure in FIGURES
    ])  # fmt: skip


def ranked(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, the mean of them where values are equal."""
    x = np.asarray(values)
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2


# -- the plot --------------------------------------------------------------------------------------

COLOURS = {"control": "C0", "paper": "C3", "ours": "C2", "graded": "C1"}
COLLAPSED = 0.8
"""Share of the start's R@1 within the entity: arms below are named at a plot's edge, so that the
others can be seen."""
DRAWN = ("grain distance", "probe of the tone")
WIDEST = 8
"""Points of R@1 at which an interval is cut off, of two seeds that differ."""


def plot(split: str, path: Path, results: Path = RESULTS) -> None:
    """Left: the comparisons with their intervals, uncorrected. Right: where arms stand by `DRAWN`
    and by R@1 within the entity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = read(split, results)
    apart = comparisons(found, "recall", entities_of(split, results))
    figure = pyplot.figure(figsize=(12, 7), layout="constrained")
    left, *right = figure.subplot_mosaic("AB;AC", width_ratios=(1.3, 1)).values()
    for y, ((name, _), one) in enumerate(apart.items()):
        colour = COLOURS[arms()[name].described.group]
        left.plot([100 * one.low, 100 * one.high], [y, y], color=colour, linewidth=2, alpha=0.5)
        left.plot(100 * one.mean, y, "o", color=colour, markersize=6)
    words = [f"{arms()[a].described.what}\nminus {arms()[b].described.what}" for a, b in apart]
    left.set_yticks(range(len(apart)), words, fontsize=8)
    left.axvline(0, color="0.4", linewidth=1)
    left.invert_yaxis()
    left.grid(axis="x", color="0.9")
    left.set_xlim(*np.clip(left.get_xlim(), -WIDEST, WIDEST))
    left.set_xlabel(f"points of R@1, both directions; an interval ends at {WIDEST} at most")
    own = {name: mean(of, "own") for name, of in found.items()}
    gone = [name for name in own if own[name] < COLLAPSED * own["start"]]
    for axes, what in zip(right, DRAWN, strict=True):
        for name, of in found.items():
            if name not in gone:
                axes.plot(figure_of(of, what), 100 * own[name], "o", markersize=6, alpha=0.8,
                          color=COLOURS[arms()[name].described.group])  # fmt: skip
        axes.plot(figure_of(found["start"], what), 100 * own["start"], "k*", markersize=11)
        axes.set_xlabel(what)
        axes.set_ylabel("R@1 within the entity, %")
        axes.grid(color="0.92")
        axes.locator_params(axis="x", nbins=6)
    for group, colour in COLOURS.items():
        right[0].plot([], [], "o", color=colour, label=group)
    right[0].plot([], [], "k*", label="the start")
    right[0].legend(frameon=False, fontsize=8)
    if gone:
        right[1].set_title(f"off the plots: {', '.join(gone)}", fontsize=8, loc="left")
    figure.suptitle(
        f"stage 3 on the emoji, {split} split; 95 % intervals, not corrected for their number",
        x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Print the tables and draw the plots."""
    for split in ("val", "test"):
        if CONTROL in (found := read(split)) and "start" in found:
            path = RESULTS / f"{split}.png"
            curves = [curve_table] if split == "val" else []
            for made in (*curves, comparison_table, cost_table, tracking_table, table):
                print(f"{split}\n\n{made(split)}\n")
            plot(split, path)
            print(path)
