"""What a run reached beside its controls: recalls with intervals, and differences of the same
queries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from elva.evaluation.columns import columns
from elva.evaluation.intervals import (
    Interval,
    SignTest,
    mean_interval,
    paired_interval,
    sign_test,
)
from elva.report.figures import TASKS, Row, chance, row_with
from elva.report.table import Cells, best_of, least_read, number, typed

CUTOFFS = (1, 5)


class Difference(NamedTuple):
    """A row's recall minus another's over the queries that both were asked.

    Args:
        figure: As in `figures` (`t2i_recall_at_1`).
    """

    ours: Row
    theirs: Row
    figure: str
    interval: Interval
    test: SignTest


def intervals(row: Row) -> dict[str, Interval]:
    """Figure -> its interval, of each recall whose queries' ranks the row has."""
    found = {}
    for task in TASKS:
        ranks = [sample["rank"] for sample in row.samples(task).values()]
        for k in CUTOFFS if ranks else ():
            found[f"{task}_recall_at_{k}"] = mean_interval([float(rank <= k) for rank in ranks])
    return found


def difference(ours: Row, theirs: Row, figure: str) -> Difference | None:
    """None where no query was asked of both with the same right answers."""
    task, _, k = figure.partition("_recall_at_")
    new, old = ours.samples(task), theirs.samples(task)
    both = [i for i in new if i in old and new[i]["positives"] == old[i]["positives"]]
    if not both:
        return None
    won, was = ([float(side[i]["rank"] <= int(k)) for i in both] for side in (new, old))
    return Difference(ours, theirs, figure, paired_interval(won, was), sign_test(won, was))


def differences(rows: Sequence[Row]) -> list[Difference]:
    """The last stage against each control and against the stage before it, in R@1 of each task."""
    last = row_with(rows, "last")
    others = [row for row in rows if row.role == "control"]
    others += [row for row in rows if row.role == "before"]
    return [] if last is None else _differences((last, other) for other in others)


def differences_of_runs(rows: Sequence[Row]) -> list[Difference]:
    """Each row but the first against the first."""
    return _differences((row, rows[0]) for row in rows[1:])


def _differences(pairs: Iterable[tuple[Row, Row]]) -> list[Difference]:
    figures = [f"{task}_recall_at_1" for task in TASKS]
    found = (difference(ours, theirs, figure) for ours, theirs in pairs for figure in figures)
    return [one for one in found if one is not None]


def answer_cells(rows: Sequence[Row]) -> Cells:
    """A row a stage and a control, its steps first, its recalls with intervals; then chance."""
    shown = columns(row.figures for row in rows)
    cells, values = [], []
    notes: dict[tuple[int, int], str] = {}
    for i, row in enumerate(rows):
        known = intervals(row)
        figures = [row.figures.get(key) for key in shown]
        values.append([None, *figures, least_read(row)])
        steps = "-" if row.steps is None else f"{row.steps:,}"
        seconds = "-" if row.seconds is None else f"{row.seconds:,.0f}"
        cells.append([row.title, steps, *map(number, figures), typed(row.least_read), seconds])
        notes |= {
            (i, j): _range(known[key])
            for j, key in enumerate(shown, 2)
            if key in known and _is_wide(known[key])
        }
    if levels := chance(rows):
        cells.append(["chance", "", *(number(levels.get(key)) for key in shown), "", ""])
    head = ["", "steps", *shown.values(), "least read", "seconds"]
    return Cells(head, cells, best_of(values), notes)


def difference_cells(found: Sequence[Difference]) -> Cells | None:
    """A row a pair, a column a figure; None without any."""
    figures = list(dict.fromkeys(one.figure for one in found))
    pairs = list(dict.fromkeys((one.ours.title, one.theirs.title) for one in found))
    by = {(one.ours.title, one.theirs.title, one.figure): one for one in found}
    cells, notes = [], {}
    for i, pair in enumerate(pairs):
        row = [f"{pair[0]} minus {pair[1]}", _steps(next(o for o in found if _pair(o) == pair))]
        for j, figure in enumerate(figures, 2):
            one = by.get((*pair, figure))
            row.append("-" if one is None else f"{one.interval.mean:+.3f}")
            if one is not None and _is_wide(one.interval):
                notes[i, j] = f"{_range(one.interval, '+')}; {_tested(one.test)}"
        cells.append(row)
    labels = [f"{TASKS[figure.partition('_recall_at_')[0]]} R@1" for figure in figures]
    return Cells(["", "steps", *labels], cells, set(), notes) if cells else None


def as_json(rows: Sequence[Row], found: Sequence[Difference]) -> dict[str, Any]:
    """The page's intervals, for programs."""
    return {
        "intervals": {
            row.title: {figure: one._asdict() for figure, one in intervals(row).items()}
            for row in rows
        },
        "differences": [
            {
                "ours": one.ours.title, "theirs": one.theirs.title,
                "steps": [one.ours.steps, one.theirs.steps], "figure": one.figure,
                **one.interval._asdict(), **one.test._asdict(),
            }
            for one in found
        ],
    }  # fmt: skip


def certain(one: Difference) -> str:
    """In words, with the interval."""
    low, high = one.interval.low, one.interval.high
    if not _is_wide(one.interval):
        return f"{one.interval.mean:+.3f}"
    sure = "" if low > 0 or high < 0 else ", too small for these queries to tell"
    return f"{one.interval.mean:+.3f} ({low:+.3f} to {high:+.3f}){sure}"


def _pair(one: Difference) -> tuple[str, str]:
    return one.ours.title, one.theirs.title


def _steps(one: Difference) -> str:
    ours, theirs = ("-" if r.steps is None else f"{r.steps:,}" for r in (one.ours, one.theirs))
    return f"{ours} against {theirs}"


def _tested(test: SignTest) -> str:
    return f"won {test.won:,}, lost {test.lost:,}, p {test.p:.2g}"


def _is_wide(interval: Interval) -> bool:
    """False where all queries have one value, of which a resample says nothing."""
    return interval.low < interval.high


def _range(interval: Interval, sign: str = "") -> str:
    return f"{interval.low:{sign}.3f} to {interval.high:{sign}.3f}"
