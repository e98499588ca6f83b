"""`elva report`: what was trained, what it retrieves, and what that means, as one page.

Everything comes from the files of the run directory; only the pictures of the retrieval examples
are read from the data. A part whose files are missing is left out: half a run has a report too.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from elva.files import write_bytes, write_text
from elva.recipe import to_dict
from elva.recipes import RECIPES
from elva.report import charts
from elva.report.figures import MIN_PROBES, TASKS, Row, chance, grain_counts, rows_of
from elva.report.gallery import examples
from elva.report.render import render
from elva.report.sentences import lead, moved, notes
from elva.report.table import figure_cells, grain_cells
from elva.run import Run


def report(run: Run) -> Path:
    """Write RUN/report.html, its charts beside it and the pictures it shows under RUN/pictures."""
    rows = rows_of(run)
    shown = examples(run, rows)
    drawn = _draw(run, rows)
    html = render(
        "report.html.j2",
        title=f"ELVA: {run.recipe.name}, seed {run.recipe.seed}",
        heading=f"{run.recipe.name}, seed {run.recipe.seed}",
        lead=lead(run, rows),
        figures=figure_cells(rows) if any(row.role != "control" for row in rows) else None,
        chance=bool(chance(rows)),
        notes=notes(run, rows),
        min_probes=MIN_PROBES,
        examples=shown,
        facts=_facts(run),
        command=_command(run),
        recipe=yaml.safe_dump(to_dict(run.recipe), sort_keys=False),
        **drawn,
    )
    for file, picture in shown.pictures.items():
        write_bytes(run.directory / file, picture)
    path = run.directory / "report.html"
    write_text(path, html)
    return path


def _draw(run: Run, rows: Sequence[Row]) -> dict[str, Any]:
    """Draw the charts that the run has data for; the values of the page's sections on them."""
    probed = [row for row in rows if row.grains]
    counts = grain_counts(probed)
    if probed:
        kinds = [kind for kind, count in counts.items() if count >= MIN_PROBES] or list(counts)
        distances = {row.series: row.grains for row in probed}
        charts.grain_chart(run.directory / "grain-distance.png", kinds, distances)
    compared = [row for row in rows if row.role != "earlier"]
    panels, moves = {}, []
    for task, label in TASKS.items():
        series = {
            row.series: [s["rank"] for s in row.samples(task).values()]
            for row in compared
            if row.samples(task)
        }
        pool = max((row.figures.get(f"{task}_pool") or 0 for row in compared), default=0)
        if series and pool > 1:
            panels[label] = (pool, series)
            moves.append(moved(label, compared, task))
    if panels:
        charts.rank_chart(run.directory / "ranks.png", panels)
    return {
        "grains": grain_cells(probed, counts) if probed else None,
        "moves": list(filter(None, moves)) if panels else None,
        "curves": _draw_curves(run),
    }


def _draw_curves(run: Run) -> bool:
    logged: dict[str, list[dict[str, Any]]] = {}
    for line in run.metrics():
        logged.setdefault(line["stage"], []).append(line)
    order = [n for n in [*run.recipe.stages, *run.recipe.controls] if n in logged]
    lines = {run.title(name): logged[name] for name in order}
    return bool(lines) and charts.curves(run.directory / "curves.png", lines)


def _facts(run: Run) -> list[tuple[str, str]]:
    noted = run.directory / "run.json"
    facts: dict[str, Any] = json.loads(noted.read_text("utf-8")) if noted.is_file() else {}
    machine = facts.get("machine") or {}
    return [
        ("started", str(facts.get("started") or "unknown")),
        ("seed", str(run.recipe.seed)),
        ("commit", str(facts.get("commit") or "unknown (installed without a checkout)")),
        ("machine", f"{machine.get('cpus', '?')} CPUs, {machine.get('processor', 'unknown')}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in (facts.get("versions") or {}).items())),
    ]


def _command(run: Run) -> str:
    known = f"--recipe {run.recipe.name} " if run.recipe.name in RECIPES else ""
    file = shlex.quote(str(run.directory / "recipe.yaml"))
    return f"elva train {known}--config {file} --output NEW"
