"""What the figures of a run mean, as sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elva.evaluation.columns import PAIRS, columns, tasks_of
from elva.report.answer import certain, difference, intervals
from elva.report.figures import TASKS, Row, row_with
from elva.report.table import number
from elva.run import Run

_NOUNS = {"t": "texts", "i": "pictures", "it": "pictures with texts"}
"""A task's sides in words."""


def lead(run: Run, rows: Sequence[Row]) -> str:
    """What was trained, for how long, and what came of it."""
    recipe, scratch = run.recipe, run.recipe.model.scratch
    model = recipe.model.path or (
        f"A Qwen2-VL of {scratch.layers} layers and {scratch.hidden_size} units, created from "
        f"random weights, with pictures of {scratch.image_size} pixels,"
    )
    stages = [row for row in rows if row.role != "control"]
    if not stages:
        return f"{model} is to be trained by this recipe; no stage is finished yet."
    steps = sum(row.steps or 0 for row in stages)
    return (
        f"{model} was trained for {steps:,} steps, in {_list([_stepped(row) for row in stages])}, "
        f"{_aim(run, rows)}. {_verdict(rows)}"
    )


def _aim(run: Run, rows: Sequence[Row]) -> str:
    if list(run.recipe.stages.values())[-1].data == "emoji":
        return "to find pictures by their names and names by their pictures"
    sides = [task.split("2") for task in tasks_of(row.figures for row in rows)]
    words = [f"{_NOUNS[shown]} by {_NOUNS[asked]}" for asked, shown in sides]
    return f"to find {_list(words)}" if words else "to retrieve"


def _shown(figures: Mapping[str, Any], task: str = "") -> str:
    """What the candidates of a task are, or of the task whose minimal pairs were measured."""
    named = task or figures.get("minimal_pair_task") or "t2i"
    return _NOUNS[named.split("2")[1]]


def _verdict(rows: Sequence[Row]) -> str:
    """The last stage against where it started and against the best control, steps first."""
    key, heading = next(iter(columns(row.figures for row in rows).items()), ("", ""))
    known = [row for row in rows if row.figures.get(key) is not None]
    last, before = row_with(known, "last"), row_with(known, "before")
    if last is None:
        return "It has not been evaluated yet."
    words = f"After {_stepped(last)} its {heading} on held-out queries is {_figure(last, key)}"
    if before is not None:
        words += f", after {before.title} it was {number(before.figures[key])}"
        words += _apart(last, before, key)
    controls = [row for row in known if row.role == "control"]
    if controls:
        best = max(controls, key=lambda row: row.figures[key])
        words += f"; the best control, {best.name}{_steps(best)}, has {number(best.figures[key])}"
        words += _apart(last, best, key)
    return words + "."


def _stepped(row: Row) -> str:
    return f"{row.title}{_steps(row)}"


def _steps(row: Row) -> str:
    return "" if row.steps is None else f" ({row.steps:,} steps)"


def _figure(row: Row, key: str) -> str:
    """A figure with its interval, where there is one."""
    known = intervals(row).get(key)
    words = number(row.figures[key])
    if known is None or known.low == known.high:
        return words
    return f"{words} ({known.low:.3f} to {known.high:.3f})"


def _apart(ours: Row, theirs: Row, key: str) -> str:
    """How far two rows are apart on the same queries; empty where they share none."""
    found = difference(ours, theirs, key) if "_recall_at_" in key and key != PAIRS else None
    return "" if found is None else f", a difference of {certain(found)}"


def notes(run: Run, rows: Sequence[Row]) -> list[str]:
    """What a reader must know to read the table."""
    figures = next((row.figures for row in reversed(rows) if row.figures), {})
    sizes = {
        label: (figures[f"{task}_queries"], figures[f"{task}_pool"])
        for task, label in TASKS.items()
        if figures.get(f"{task}_queries") and figures.get(f"{task}_pool")
    }
    found = []
    if sizes:
        asked = [
            f"{q:,} queries {label} against {n:,} candidates" for label, (q, n) in sizes.items()
        ]
        found.append(
            f"{_list(asked)}. R@k: share of queries with their right answer among the first k, "
            "ties counted against it. Best in bold. Below a recall, and of a difference, the 95 % "
            "interval of the bootstrap over queries; differences are paired, query by query, "
            "with p of the exact sign test. "
            f"One training seed ({run.recipe.seed}) was run: how far another would move a figure, "
            "these intervals do not say."
        )
    if figures.get("minimal_pair_pool_mean"):
        rivals = f"on average {figures['minimal_pair_pool_mean']:.1f}"
        found.append(
            f"Pairs: only the {_shown(figures)} of the query's own entity compete ({rivals}), so "
            "nothing but the small grains decides. Least read: the grain type that a linear probe, "
            "fitted on the answers of training, tells worst from those of these queries."
        )
    for task in tasks_of(row.figures for row in rows)[:1]:
        silent = {row.title: row.figures.get(f"{task}_frac_no_ret") or 0.0 for row in rows}
        shares = [f"{title} {share:.0%}" for title, share in silent.items() if share > 0.01]
        if shares:
            found.append(
                f"Summaries of {_shown(figures, task)} that never reached [RET]: {_list(shares)}. "
                "Their embeddings are the fallback, read where the length limit cut them off."
            )
    if any(row.role == "control" for row in rows):
        last = run.title(list(run.recipe.stages)[-1])
        found.append(
            f"A control starts where {last} starts and is evaluated the same way: {last} is worth "
            f"what it adds to its controls, not to the stage before. {_lengths(rows)}"
        )
    return found


def _lengths(rows: Sequence[Row]) -> str:
    """Steps of the last stage and of its controls."""
    last = row_with(rows, "last")
    arms = [row for row in (last, *(r for r in rows if r.role == "control")) if row is not None]
    return f"Steps: {_list([f'{row.steps or 0:,} in {row.title}' for row in arms])}."


def moved(label: str, rows: Sequence[Row], task: str) -> str:
    """One sentence: which way the ranks went in the last stage."""
    before, last = row_with(rows, "before"), row_with(rows, "last")
    if before is None or last is None:
        return ""
    old, new = before.samples(task), last.samples(task)
    pairs = [(old[i]["rank"], new[i]["rank"]) for i in new if i in old]
    up, down = sum(b > a for b, a in pairs), sum(b < a for b, a in pairs)
    if not pairs:
        return ""
    won, lost = sum(b > 1 == a for b, a in pairs), sum(b == 1 < a for b, a in pairs)
    return (
        f"{label}, {last.title} against {before.title}: of {len(pairs):,} queries the right answer "
        f"rises in {up}, falls in {down} and stays in {len(pairs) - up - down}; "
        f"{won} win the first place, {lost} lose it."
    )


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
