"""The answer as a table and plots, from the files of the trials."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.grains.arms import arms
from benchmarks.grains.statistics import Difference, Results, difference, holm, mean
from benchmarks.grains.trial import COSTS, RESULTS

CONTROL = "hard"
"""The best control, by val."""


def read(split: str, results: Path = RESULTS) -> dict[str, dict[tuple[int, int], Any]]:
    """Arm -> (start, seed) -> a split's figures, of the trials that have them, in arms.yaml's
    order."""
    found: dict[str, dict[tuple[int, int], Any]] = {}
    for name in arms():
        for file in sorted((results / name).glob("*.json")):
            trial = json.loads(file.read_text(encoding="utf-8"))
            if split in trial:
                pair = trial["start"], trial["seed"]
                found.setdefault(name, {})[pair] = trial[split]
    starts = [name for name in found if arms()[name].stage is None and CONTROL in found]
    for name in starts:  # a start is the same whatever the seed that others go on by
        own = {start: figures for (start, _), figures in found[name].items()}
        found[name] = {pair: own[pair[0]] for pair in found[CONTROL] if pair[0] in own}
    return found


def differences(found: Mapping[str, Results], what: str) -> dict[str, Difference]:
    """Of every arm to the control, their p corrected for as many as there are."""
    others = [name for name in found if name != CONTROL]
    apart = [difference(found[name], found[CONTROL], what, (what, name)) for name in others]
    raised = holm([one.p for one in apart])
    return {
        name: one._replace(p=p) for name, one, p in zip(others, apart, raised, strict=True)
    }  # fmt: skip


def table(split: str, results: Path = RESULTS) -> str:
    """Markdown, a row an arm."""
    found = read(split, results)
    recall, pairs = (differences(found, what) for what in ("recall", "pairs"))
    file = results / COSTS.name
    costs = json.loads(file.read_text(encoding="utf-8"))["seconds"] if file.is_file() else {}
    heads = ("arm", "pairs", "t→i R@1", "i→t R@1", "R@5", f"both, less {CONTROL}'s", "p",
             "minimal pairs R@1", f"less {CONTROL}'s", "grain distance", "s")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, own in found.items():
        cells = [arms()[name].described.what, str(len(own))]
        cells += [f"{mean(own, what):.3f}" for what in ("t2i", "i2t", "recall_5")]
        cells += [shown(recall[name]), f"{recall[name].p:.3f}"] if name in recall else ["", ""]
        cells += [f"{mean(own, 'pairs'):.3f}", shown(pairs[name]) if name in pairs else ""]
        cells += [f"{fmean(one['grains']['distance']['all'] for one in own.values()):.3f}"]
        cells += [f"{min(costs[name]):.0f}" if name in costs else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(one: Difference) -> str:
    """+.012 [-.003, +.027]"""
    return f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"


FIGURES = {
    "grain distance": lambda g: g["distance"]["all"],
    "distance over that across entities": lambda g: g["relative"],
    "distance within an entity": lambda g: g["within"],
    "distance across entities": lambda g: g["across"],
    "norm": lambda g: g["norm"],
    "lead over the own entity's hardest": lambda g: g["contrast"],
    "probe of the tone": lambda g: g["probe"]["tone"],
    "probe of the gender": lambda g: g["probe"]["gender"],
}


def moved(found: Mapping[str, Results], figure: str) -> dict[str, float]:
    """Arm -> how far it moved a figure of `FIGURES` from its starts, a mean over pairs of start
    and seed."""
    began, of = found["start"], FIGURES[figure]
    return {
        name: fmean(of(own[pair]["grains"]) - of(began[pair]["grains"]) for pair in own)
        for name, own in found.items()
        if name != "start"
    }


def moved_pairs(found: Mapping[str, Results]) -> dict[str, float]:
    """Arm -> how far it moved R@1 among the pictures of the same entity from its starts."""
    return {
        name: mean(own, "pairs") - mean({pair: found["start"][pair] for pair in own}, "pairs")
        for name, own in found.items()
        if name != "start"
    }


def tracking(found: Mapping[str, Results]) -> dict[str, float]:
    """Figure -> how well its change tells that of minimal pairs: Spearman's rank correlation over
    arms, of which one that collapses is one of many."""
    pairs = ranked([*moved_pairs(found).values()])
    return {
        figure: float(np.corrcoef(ranked([*moved(found, figure).values()]), pairs)[0, 1])
        for figure in FIGURES
    }


def ranked(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, the mean of them where values are equal."""
    x = np.asarray(values)
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2


LEAST = -12.0
"""Points: an arm that lost more is named at the edge of a plot, so that the others can be seen."""
COLOURS = {"control": "C0", "paper": "C3", "ours": "C2", "graded": "C1"}
SHOWN = ("grain distance", "probe of the tone")
"""Of `FIGURES`, beside minimal pairs: the paper's, and the one that tracks them best on val."""


def plot(split: str, path: Path, results: Path = RESULTS) -> None:
    """Left: each arm's difference to the control, with its interval. Right: how far arms moved
    minimal pairs, over how far they moved the figures of `SHOWN`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = read(split, results)
    apart, tracks = differences(found, "recall"), tracking(found)
    size = (12, max(6.0, 1.6 + 0.24 * len(apart)))
    figure = pyplot.figure(figsize=size, layout="constrained")
    left, *right = figure.subplot_mosaic("ABC" if len(apart) < 12 else "AB;AC").values()
    for y, (name, one) in enumerate(apart.items()):
        colour = COLOURS[arms()[name].described.group]
        left.plot([100 * one.low, 100 * one.high], [y, y], color=colour, linewidth=2, alpha=0.5)
        left.plot(100 * one.mean, y, "o", color=colour, markersize=6)
        if 100 * one.mean < LEAST:
            left.text(LEAST, y, f" ← {100 * one.mean:.0f}", color=colour, va="center", fontsize=8)
    left.set_xlim(left=max(LEAST, left.get_xlim()[0]))
    left.axvline(0, color="0.4", linewidth=1)
    left.set_yticks(range(len(apart)), [arms()[name].described.what for name in apart], fontsize=8)
    left.invert_yaxis()
    left.margins(y=0.02)
    left.grid(axis="x", color="0.9")
    left.set_xlabel(f"R@1 of both directions, points over {arms()[CONTROL].described.what}")
    pairs = moved_pairs(found)
    for axes, what in zip(right, SHOWN, strict=True):
        for name, x in moved(found, what).items():
            if 100 * pairs[name] < LEAST:
                edge = f"off the plot: {name}, {x:+.2f}, {100 * pairs[name]:+.0f}"
                axes.text(0.02, 0.03, edge, fontsize=8, color="0.3", transform=axes.transAxes)
                continue
            axes.plot(x, 100 * pairs[name], "o", markersize=6, alpha=0.8,
                      color=COLOURS[arms()[name].described.group])  # fmt: skip
        axes.set_title(f"rank correlation over arms: {tracks[what]:+.2f}", fontsize=9, loc="left")
        axes.set_xlabel(f"change of the {what}")
        axes.set_ylabel("points of R@1 within an entity")
        axes.axhline(0, color="0.8", linewidth=1)
        axes.axvline(0, color="0.8", linewidth=1)
        axes.grid(color="0.92")
    for group, colour in COLOURS.items():
        right[0].plot([], [], "o", color=colour, label=group)
    right[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"stage 3 on the emoji, {split} split, 95 % intervals", x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Print the tables and draw the plots."""
    for split in ("val", "test"):
        if CONTROL not in (found := read(split)):
            continue
        print(f"{split}\n\n{table(split)}\n")
        for name, r in tracking(found).items():
            print(
                f"  rank correlation of the change of minimal pairs with that of {name}: {r:+.2f}"
            )
        plot(split, RESULTS / f"{split}.png")
