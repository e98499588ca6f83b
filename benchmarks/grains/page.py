"""The answer as a table and plots, from the files of the trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.grains.arms import arms
from benchmarks.grains.statistics import Difference, Results, difference, holm, mean
from benchmarks.report import RESULTS as KEPT

RESULTS = KEPT / "grains"
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
                found.setdefault(name, {})[pair] = trial[split] | {"seconds": trial["seconds"]}
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
    heads = ("arm", "pairs", "t→i R@1", "i→t R@1", f"both, less {CONTROL}'s", "p",
             "minimal pairs R@1", f"less {CONTROL}'s", "grain distance", "s")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, own in found.items():
        cells = [arms()[name].described.what, str(len(own))]
        cells += [f"{mean(own, direction):.3f}" for direction in ("t2i", "i2t")]
        cells += [shown(recall[name]), f"{recall[name].p:.3f}"] if name in recall else ["", ""]
        cells += [f"{mean(own, 'pairs'):.3f}", shown(pairs[name]) if name in pairs else ""]
        cells += [f"{fmean(one['grains']['distance']['all'] for one in own.values()):.3f}"]
        cells += [f"{np.median([one['seconds'] for one in own.values()]):.0f}"]
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


def tracking(split: str, results: Path = RESULTS) -> dict[str, float]:
    """Figure -> how well its change from the start tells that of minimal pairs: Pearson's
    correlation over arms, of means over pairs of start and seed."""
    found = read(split, results)
    moved, pairs = {name: [] for name in FIGURES}, []
    start = {pair[0]: figures for pair, figures in found["start"].items()}
    for name, own in found.items():
        if name != "start":
            for figure, of in FIGURES.items():
                apart = [of(f["grains"]) - of(start[s]["grains"]) for (s, _), f in own.items()]
                moved[figure].append(fmean(apart))
            began = {pair: start[pair[0]] for pair in own}
            pairs.append(mean(own, "pairs") - mean(began, "pairs"))
    return {name: float(np.corrcoef(of, pairs)[0, 1]) for name, of in moved.items()}


COLOURS = {"control": "C0", "paper": "C3", "ours": "C2", "graded": "C1"}


def plot(split: str, path: Path, results: Path = RESULTS) -> None:
    """Left: each arm's difference to the control, with its interval. Right: where arms stand in
    grain distance and in minimal pairs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = read(split, results)
    apart = differences(found, "recall")
    size = (12, 1.8 + 0.3 * len(apart))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=size, layout="constrained")
    for y, (name, one) in enumerate(apart.items()):
        colour = COLOURS[arms()[name].described.group]
        left.plot([100 * one.low, 100 * one.high], [y, y], color=colour, linewidth=2, alpha=0.5)
        left.plot(100 * one.mean, y, "o", color=colour, markersize=6)
    left.axvline(0, color="0.4", linewidth=1)
    left.set_yticks(range(len(apart)), [arms()[name].described.what for name in apart], fontsize=8)
    left.invert_yaxis()
    left.grid(axis="x", color="0.9")
    left.set_xlabel(f"R@1 of both directions, points over {arms()[CONTROL].described.what}")
    for name, own in found.items():
        group = arms()[name].described.group
        x = fmean(one["grains"]["distance"]["all"] for one in own.values())
        right.plot(x, mean(own, "pairs"), "o", color=COLOURS[group], markersize=6)
        right.annotate(name, (x, mean(own, "pairs")), (4, 2), fontsize=6, color="0.3",
                       textcoords="offset points")  # fmt: skip
    for group, colour in COLOURS.items():
        right.plot([], [], "o", color=colour, label=group)
    right.set_xlabel("grain distance (the paper's measure)")
    right.set_ylabel("R@1 among the pictures of the same entity")
    right.grid(color="0.92")
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(f"stage 3 on the emoji, {split} split, 95 % intervals", x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Print the tables and draw the plots."""
    for split in ("val", "test"):
        if CONTROL not in read(split):
            continue
        print(f"{split}\n\n{table(split)}\n")
        for name, r in tracking(split).items():
            print(f"  change of minimal pairs with {name}: r = {r:+.2f}")
        plot(split, RESULTS / f"{split}.png")
