"""What a run's evaluations say: a row for each finished stage and control, read from its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from elva.data import schema
from elva.evaluation.columns import PAIRS, label
from elva.report.drawing import Series
from elva.report.shapes import read
from elva.run import Run

TASKS = {task: label(task) for task in schema.TASKS}
"""Task -> its heading; a run shows those of them that it measured."""

MIN_PROBES = 10
"""Ours: a grain type of fewer queries is listed, but neither drawn nor in the running for least."""


@dataclass(frozen=True)
class Row:
    """One finished stage or control, with what its files say; empty where they say nothing."""

    name: str
    series: Series
    steps: int | None
    seconds: float | None
    evaluation: Mapping[str, Any]

    @property
    def title(self) -> str:
        return self.series.title

    @property
    def role(self) -> str:
        return self.series.role

    @property
    def figures(self) -> Mapping[str, Any]:
        return self.evaluation.get("figures") or {}

    @property
    def grains(self) -> dict[str, list[float]]:
        """Grain type -> distances."""
        found = self.evaluation.get("grain_distances") or {}
        known = {kind: [d for d in ds if d is not None] for kind, ds in found.items()}
        return {kind: ds for kind, ds in known.items() if ds}

    @property
    def least_grain(self) -> tuple[str, float] | None:
        """The grain type that moves the embedding least, and its mean distance."""
        means = {kind: fmean(ds) for kind, ds in self.grains.items()}
        common = {k: m for k, m in means.items() if len(self.grains[k]) >= MIN_PROBES} or means
        return min(common.items(), key=lambda pair: pair[1]) if common else None

    @property
    def least_read(self) -> tuple[str, float] | None:
        """The grain type that a linear probe reads worst off the embedding, and its accuracy."""
        read = {k: one["accuracy"] for k, one in (self.figures.get("grain_reading") or {}).items()}
        return min(read.items(), key=lambda pair: pair[1]) if read else None

    def samples(self, task: str) -> dict[str, dict[str, Any]]:
        """Query id -> its text, rank, summary and first five."""
        found = (self.evaluation.get("samples") or {}).get(task) or []
        return {sample["id"]: sample for sample in found}


def rows_of(run: Run) -> list[Row]:
    """The finished stages in order, then the controls."""
    stages, controls = (
        [n for n in names if (run.stage(n) / "stage.json").is_file()]
        for names in (run.recipe.stages, run.recipe.controls)
    )
    late = dict(zip(reversed(stages), ("last", "before"), strict=False))
    found = []
    for names in (stages, controls):
        for place, name in enumerate(names):
            role = late.get(name, "earlier") if names is stages else "control"
            done, evaluation = (read(run, file, name) for file in ("stage.json", "evaluation.json"))
            series = Series(run.title(name), role, place)
            found.append(Row(name, series, done.get("steps"), done.get("seconds"), evaluation))
    return found


def row_with(rows: Iterable[Row], role: str) -> Row | None:
    """The row of the last stage, or of the one before."""
    return next((row for row in rows if row.role == role), None)


def grain_counts(rows: Iterable[Row]) -> dict[str, int]:
    """Grain type -> its queries, the most frequent type first."""
    counts: dict[str, int] = {}
    for row in rows:
        for kind, found in row.grains.items():
            counts[kind] = max(counts.get(kind, 0), len(found))
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def chance(rows: Iterable[Row]) -> dict[str, float]:
    """What drawing at random would give: k of the pool; for pairs one of the entity's own."""
    found: dict[str, float] = {}
    for figures in (row.figures for row in rows):
        for task in TASKS:
            if pool := figures.get(f"{task}_pool"):
                for k in (1, 5):
                    one_right = min(1.0, k / pool)
                    known = figures.get(f"{task}_chance_at_{k}")
                    found[f"{task}_recall_at_{k}"] = one_right if known is None else known
        if pool := figures.get("minimal_pair_pool_mean"):
            found[PAIRS] = 1 / pool
    return found
