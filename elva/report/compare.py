"""Runs beside each other: their figures, what differs in their recipes, curves over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from elva.evaluation.columns import columns
from elva.recipes import flat
from elva.report import charts
from elva.report.answer import Difference, certain, difference, differences_of_runs
from elva.report.drawing import Series, svg
from elva.report.figures import TASKS, Row, row_with, rows_of
from elva.report.sections import Key, Panel, Section
from elva.report.table import Cells, number
from elva.run import Run

_OVERLAID = {"loss": "loss", "reward": "reward", "rank_1": "positive first in its list"}
"""Values of metrics.jsonl that are drawn, and their headings."""


@dataclass(frozen=True)
class Compared:
    """A run under the name that tells it from the others, with its rows under the same."""

    run: Run
    name: str
    series: Series
    rows: list[Row]

    @property
    def last(self) -> Row | None:
        """The last stage, in the run's colour."""
        row = row_with(self.rows, "last")
        return None if row is None else replace(row, series=self.series)


def compared(runs: Sequence[Run]) -> list[Compared]:
    """The runs in the order given, each under the shortest end of its path that no other has."""
    places = [run.directory.absolute().parts for run in runs]
    depth = next(
        (n for n in range(1, 99) if len({place[-n:] for place in places}) == len(places)), 99
    )
    found = []
    for i, (run, place) in enumerate(zip(runs, places, strict=True)):
        name = "/".join(place[-depth:])
        rows = [
            replace(row, series=replace(row.series, title=f"{name}: {row.title}"))
            for row in rows_of(run)
        ]
        series = Series(f"{name}: {_last_title(run)}", "control" if i else "last", max(0, i - 1))
        found.append(Compared(run, name, series, rows))
    return found


def _last_title(run: Run) -> str:
    row = row_with(rows_of(run), "last")
    return "no stage" if row is None else row.title


def arms(runs: Sequence[Compared]) -> list[Row]:
    """The last stage and the controls of each run, in the order of runs."""
    return [row for one in runs for row in one.rows if row.role in ("last", "control")]


def differences(runs: Sequence[Compared]) -> list[Difference]:
    """The last stage of each run but the first against the first's, on the queries of both."""
    last = [row for one in runs if (row := one.last) is not None]
    return differences_of_runs(last) if last and runs[0].last is not None else []


def lead(runs: Sequence[Compared]) -> str:
    """Each run's first figure, and how far it is from the first run's on the same queries."""
    last = [row for one in runs if (row := one.last) is not None]
    key, heading = next(iter(columns(row.figures for row in last).items()), ("", ""))
    known = [row for row in last if row.figures.get(key) is not None]
    if not known:
        return "None of these runs has been evaluated yet."
    words = []
    for row in known:
        steps = "" if row.steps is None else f" ({row.steps:,} steps)"
        words.append(f"{row.title}{steps} has {heading} {number(row.figures[key])}")
        apart = None if row is known[0] else difference(row, known[0], key)
        if apart is not None:
            words[-1] += f", {certain(apart)} against {known[0].title}"
    return "; ".join(words) + "."


def recipe_differences(runs: Sequence[Compared]) -> dict[str, list[Any]]:
    """Field -> its value in each run, of the fields that differ; None where a run has it not."""
    fields = [flat(asdict(one.run.recipe)) for one in runs]
    names = dict.fromkeys(name for one in fields for name in one)
    found = {name: [one.get(name) for one in fields] for name in names}
    return {name: values for name, values in found.items() if any(v != values[0] for v in values)}


def recipe_cells(runs: Sequence[Compared], found: Mapping[str, Sequence[Any]]) -> Cells:
    """A row a field, a column a run."""
    rows = [[name, *("-" if v is None else str(v) for v in values)]
            for name, values in found.items()]  # fmt: skip
    return Cells(["", *(one.name for one in runs)], rows, set())


def curves(runs: Sequence[Compared]) -> Section:
    """Values of each stage's steps, a panel a stage and value, the runs over each other."""
    panels = []
    stages = dict.fromkeys(name for one in runs for name in one.run.recipe.stages)
    logged = [(one.series, one.run.metrics()) for one in runs]
    for stage in stages:
        for key, heading in _OVERLAID.items():
            lines = {
                series: [line.get(key) for line in every if line["stage"] == stage]
                for series, every in logged
            }
            lines = {s: v for s, v in lines.items() if any(value is not None for value in v)}
            if lines:
                alt = f"Curves: {heading} of stage {stage} by step, a line a run."
                panels.append(Panel(f"stage {stage}: {heading}", svg(charts.overlay(lines), alt)))
    return Section(panels, _keys(runs) if panels else [], [])


def ranks(runs: Sequence[Compared]) -> Section:
    """Recall for every k of each run's last stage, by task."""
    panels = []
    last = [row for one in runs if (row := one.last) is not None]
    for task, label in TASKS.items():
        series = {
            row.series: [s["rank"] for s in row.samples(task).values()]
            for row in last
            if row.samples(task)
        }
        pools = [row.figures.get(f"{task}_pool") or 0 for row in last]
        if series and max(pools) > 1:
            alt = f"Curves, {label}: share of queries whose positive is among the first k, by run."
            panels.append(Panel(label, svg(charts.rank_chart(max(pools), series), alt)))
    keys = [*_keys(runs), Key("chance", "var(--chart-muted)", "⋯")]
    return Section(panels, keys if panels else [], [])


def _keys(runs: Sequence[Compared]) -> list[Key]:
    return [Key(one.name, one.series.variable) for one in runs]
