"""The figures of a run as cells: for the terminal, for programs and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from elva.evaluation.columns import columns
from elva.report.figures import Row, chance, rows_of
from elva.run import Run


@dataclass(frozen=True)
class Cells:
    """A table's words.

    Args:
        best: (row, column) of the largest figure of each column.
        notes: (row, column) -> what stands below a figure, its interval.
    """

    head: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]]
    notes: Mapping[tuple[int, int], str] = field(default_factory=dict)


def as_json(run: Run) -> dict[str, Any]:
    """The figures of the table and of the grains, for programs."""
    rows = rows_of(run)
    found = []
    for row in rows:
        kind, least = row.least_grain or (None, None)
        found.append({
            "name": row.name,
            "kind": "control" if row.role == "control" else "stage",
            "steps": row.steps,
            "seconds": row.seconds,
            "figures": dict(row.figures),
            "least_grain_distance": least,
            "least_grain_type": kind,
            "least_read_accuracy": least_read(row),
            "least_read_type": row.least_read[0] if row.least_read else None,
        })  # fmt: skip
    return {
        "run": str(run.directory),
        "recipe": run.recipe.name,
        "seed": run.recipe.seed,
        "rows": found,
        "chance": chance(rows),
    }


def table(run: Run) -> Table:
    """The table for a terminal: a row a stage and a control, the best in bold, chance last."""
    rows = rows_of(run)
    cells, last = figure_cells(rows), len(rows)
    drawn = Table(title=f"held-out queries, {run.recipe.name}, seed {run.recipe.seed}", box=None)
    for j, head in enumerate(cells.head):
        drawn.add_column(head, justify="right" if j else "left", no_wrap=True)
    for i, row in enumerate(cells.rows):
        words = [Text(c, "bold" if (i, j) in cells.best else "") for j, c in enumerate(row)]
        drawn.add_row(*words, style="dim" if i == last else "")
    return drawn


def figure_cells(rows: Sequence[Row]) -> Cells:
    """A row a stage and a control; then chance, where it is known."""
    shown = columns(row.figures for row in rows)
    cells, values = [], []
    for row in rows:
        figures = [row.figures.get(key) for key in shown]
        values.append([*figures, least_read(row)])
        steps = "-" if row.steps is None else f"{row.steps:,}"
        seconds = "-" if row.seconds is None else f"{row.seconds:.0f}"
        cells.append([row.title, *map(number, figures), typed(row.least_read), steps, seconds])
    if levels := chance(rows):
        cells.append(["chance", *(number(levels.get(key)) for key in shown), "", "", ""])
    return Cells(["", *shown.values(), "least read", "steps", "seconds"], cells, best_of(values))


def grain_cells(rows: Sequence[Row], counts: Mapping[str, int]) -> Cells:
    """Mean grain distance: a row a stage and a control, a column a grain type; then queries."""
    kinds = list(counts)
    means = [[fmean(row.grains[k]) if k in row.grains else None for k in kinds] for row in rows]
    pairs = list(zip(rows, means, strict=True))
    cells = [[row.title, typed(row.least_grain), *map(number, found)] for row, found in pairs]
    cells.append(["queries", "", *map(str, counts.values())])
    return Cells(
        ["", "least", *kinds], cells, best_of([[_least_distance(r), *found] for r, found in pairs])
    )


def best_of(values: Sequence[Sequence[float | None]]) -> set[tuple[int, int]]:
    """(row, column) of the largest of each column as printed, counting the column of names."""
    best = set()
    for column, found in enumerate(zip(*values, strict=True), start=1):
        printed = [0.0 if v is None else round(v, 3) for v in found]
        if len(printed) > 1 and max(printed) > 0:
            best |= {(i, column) for i, v in enumerate(printed) if v == max(printed)}
    return best


def number(value: float | None) -> str:
    """A figure as every table and sentence prints it."""
    return "-" if value is None else f"{value:.3f}"


def _least_distance(row: Row) -> float | None:
    """Of the grain type that the row sees least."""
    return row.least_grain[1] if row.least_grain else None


def least_read(row: Row) -> float | None:
    """The accuracy of the grain type that is read worst."""
    return row.least_read[1] if row.least_read else None


def typed(least: tuple[str, float] | None) -> str:
    """A figure with the name of its grain type."""
    return f"{least[1]:.3f} {least[0]}" if least else "-"
