"""Evaluation by protocol (paper, sec. 4): each set's own figures, their means, and tables."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.table import Table

from elva.data.mbeir import QuerySet
from elva.evaluation.metrics import Figures
from elva.evaluation.sets import (
    BENCHMARKS,
    MODELS,
    UNREAD,
    UNSEEN,
    Line,
    cutoff,
    figures,
    heading,
    lines,
)

_REBUILT = "MRBench is rebuilt: the paper's own list of queries is not public"
_UNKNOWN = "the paper's figures of the unseen sets are not known to us: their cells are empty"


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Every set's figures, in points, and where the paper has the set its figures beside them."""
    unseen = {stem: row for stem, row in result["sets"].items() if stem in UNSEEN}
    others = {stem: row for stem, row in result["sets"].items() if stem not in UNSEEN}
    shown = [_retrieved({**result, "sets": others})] if others else []
    return [*shown, _unseen(result, unseen)] if unseen else shown


def _retrieved(result: Mapping[str, Any]) -> Table:
    found = result["sets"]
    titles, paper, means = BENCHMARKS["MRBench" if result.get("mrbench") else "M-BEIR"]
    known = any(stem in titles for stem in found) and result["pools"] == "local"
    models = [model for model in paper if model.startswith("ELVA")] if known else []
    title = f"{result['split']}, {result['pools']} pools"
    shown = Table(title=title, caption=_REBUILT if result.get("mrbench") else None)
    shown.add_column("set")
    for name in ("queries", "pool", "hit@k", "recall@k", "MRR", "nDCG@10", "own hit@1", *models):
        shown.add_column(name, justify="right")
    places = list(titles)
    for stem, row in found.items():
        k = row["k"]
        values = [row.get(n) for n in (f"hit_at_{k}", f"recall_at_{k}", "mrr", "ndcg_at_10")]
        beside = [f"{paper[m][places.index(stem)]:.1f}" if stem in titles else "" for m in models]
        shown.add_row(
            f"{titles.get(stem, stem)} (k = {k})", f"{row['queries']:,}", f"{row['pool']:,}",
            *map(_points, values), _points(row.get("hit_at_1_among_its_own")), *beside,
        )  # fmt: skip
    whole = set(titles) <= set(found)
    beside = [f"{means[m]:.1f}" if whole else "" for m in models]
    shown.add_section()
    shown.add_row("average", "", "", _points(averages(found)["average"]), "", "", "", "", *beside)
    return shown


def _unseen(result: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Sets that no stage trains on, each with the figures that its own paper defines."""
    keys = list(dict.fromkeys(key for stem in found for key in figures(stem)))
    title = f"{result['split']}, {result['pools']} pools"
    shown = Table(title=title, caption="the paper's figures of these sets are not known to us")
    shown.add_column("set")
    for name in ("queries", "pool", *map(heading, keys)):
        shown.add_column(name, justify="right")
    for stem, row in found.items():
        cells = [_points(row.get(key)) if key in figures(stem) else "" for key in keys]
        shown.add_row(UNSEEN[stem][0], f"{row['queries']:,}", f"{row['pool']:,}", *cells)
    if len(found) > 1:
        means = [_mean([row.get(key) for row in found.values()]) for key in keys]
        shown.add_section()
        shown.add_row("average", "", "", *map(_points, means))
    return shown


def row(one: QuerySet, found: Figures) -> dict[str, Any]:
    """A set's figures."""
    return {
        "task": one.task,
        "queries": len(found.per_query),
        "pool": len(one.pool),
        "unanswered": len(found.unanswered),
        "k": cutoff(one.stem),
        **found.mean,
    }


def averages(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means of what each set is judged by, over the sets of each task and over all; None where
    no set could be judged."""
    tasks: dict[str, list[float]] = {}
    for stem, row in sets.items():
        value = row.get(figures(stem)[0])
        if value is not None:
            tasks.setdefault(row["task"], []).append(value)
    every = [value for values in tasks.values() for value in values]
    return {"tasks": {t: fmean(v) for t, v in tasks.items()}, "average": _mean(every)}


# -- beside the paper ------------------------------------------------------------------------------


def beside_paper(measured: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each figure of each set that the paper reports.

    Args:
        measured: name -> what `figures.json` holds.

    Returns:
        `benchmark`, `set`, `figure`, and in points `paper` (model -> figure) and `ours` (name ->
        figure); what was not measured, or is not known, is not in them.
    """
    rows = []
    for line in lines():
        found = {name: _measured(result, line) for name, result in measured.items()}
        ours = {name: 100 * value for name, value in found.items() if value is not None}
        rows.append({
            "benchmark": line.benchmark, "set": line.title, "figure": heading(line.figure),
            "paper": line.paper, "ours": ours,
        })  # fmt: skip
    return rows


def _measured(result: Mapping[str, Any], line: Line) -> float | None:
    """A figure of a set; MRBench's sets have the names of M-BEIR's, and other queries."""
    if line.benchmark != "Unseen" and (line.benchmark == "MRBench") != bool(result.get("mrbench")):
        return None
    if not line.stem:
        own = [one for one in lines() if one.benchmark == line.benchmark and one.stem]
        values = [_measured(result, one) for one in own]
        return None if None in values else _mean(values)
    value = result["sets"].get(line.stem, {}).get(line.figure)
    return None if value is None else float(value)


def paper_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    """`beside_paper`'s rows for a terminal; a cell is empty where nothing is known or measured."""
    caption = (
        f"{_REBUILT}. {_UNKNOWN[0].upper()}{_UNKNOWN[1:]}. Not read here: {', '.join(UNREAD)}."
    )
    shown = Table(title="the paper's sets, in points", caption=caption)
    shown.add_column("set")
    shown.add_column("figure")
    for name in (*MODELS, *(names or ["ours"])):
        shown.add_column(name, justify="right")
    before = None
    for row in rows:
        if before not in (None, row["benchmark"]):
            shown.add_section()
        title = row["set"] if row["benchmark"] == "Unseen" else f"{row['benchmark']} {row['set']}"
        cells = [*(row["paper"].get(m) for m in MODELS), *(row["ours"].get(n) for n in names)]
        words = ["" if v is None else f"{v:.1f}" for v in cells]
        shown.add_row(title, row["figure"], *words, *([] if names else [""]))
        before = row["benchmark"]
    return shown


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _points(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
