"""`elva report`: what was trained, what it retrieves, and what that means, as one page.

Everything comes from the files of the run directory; only the pictures of the retrieval examples
are read from the data. A part whose files are missing is left out: half a run has a report too.
The page is one file, which fetches nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from elva.files import write_text
from elva.recipes import RECIPES
from elva.report import answer, compare, sections
from elva.report.drawing import DARK, LIGHT, variables
from elva.report.figures import MIN_PROBES, TASKS, chance, grain_counts, rows_of
from elva.report.gallery import examples
from elva.report.render import render
from elva.report.sentences import lead, moved, notes
from elva.report.shapes import read
from elva.report.table import as_json, grain_cells
from elva.run import Run

PAGE = "report.html"


def report(runs: Run | Sequence[Run], output: Path | None = None) -> Path:
    """Write the page of a run, or one that compares several.

    Args:
        output: the file; None: report.html of the (first) run.

    Returns:
        The file.
    """
    every = [runs] if isinstance(runs, Run) else list(runs)
    path = every[0].directory / PAGE if output is None else output
    write_text(path, _page(every[0]) if len(every) == 1 else _comparison(every))
    return path


def figures(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page shows, for programs: of one run, or of several under `runs`."""
    if len(runs) == 1:
        rows = rows_of(runs[0])
        return {**as_json(runs[0]), **answer.as_json(rows, answer.differences(rows))}
    known = compare.compared(runs)
    return {
        "runs": [as_json(run) for run in runs],
        **answer.as_json(compare.arms(known), compare.differences(known)),
        "recipe_differences": compare.recipe_differences(known),
    }


def _page(run: Run) -> str:
    rows = rows_of(run)
    probed = [row for row in rows if row.grains]
    compared = [row for row in rows if row.role != "earlier"]
    return render(
        "report.html.j2",
        title=f"ELVA: {run.recipe.name}, seed {run.recipe.seed}",
        heading=f"{run.recipe.name}, seed {run.recipe.seed}",
        light=variables(LIGHT),
        dark=variables(DARK),
        lead=lead(run, rows),
        figures=answer.answer_cells(rows) if compared else None,
        differences=answer.difference_cells(answer.differences(rows)),
        chance=bool(chance(rows)),
        notes=notes(run, rows),
        min_probes=MIN_PROBES,
        grains=grain_cells(probed, grain_counts(probed)) if probed else None,
        grain_chart=sections.grain_distances(rows),
        ranks=sections.ranks(rows),
        moves=sections.moves(rows),
        moved=list(filter(None, (moved(name, compared, task) for task, name in TASKS.items()))),
        rewards=sections.rewards(rows),
        pushes=sections.pushes(rows),
        maps=sections.maps(rows),
        examples=examples(run, rows),
        curves=sections.curves(run),
        facts=_facts(run),
        command=_command(run),
        recipe=yaml.safe_dump(asdict(run.recipe), sort_keys=False),
    )


def _comparison(runs: Sequence[Run]) -> str:
    known = compare.compared(runs)
    arms = compare.arms(known)
    differing = compare.recipe_differences(known)
    return render(
        "runs.html.j2",
        title=f"ELVA: {', '.join(one.name for one in known)}",
        heading=f"{len(known)} runs: {', '.join(one.name for one in known)}",
        light=variables(LIGHT),
        dark=variables(DARK),
        lead=compare.lead(known),
        figures=answer.answer_cells(arms) if arms else None,
        chance=bool(chance(arms)),
        differences=answer.difference_cells(compare.differences(known)),
        seeds=", ".join(f"{one.name} {one.run.recipe.seed}" for one in known),
        recipes=compare.recipe_cells(known, differing),
        ranks=compare.ranks(known),
        curves=compare.curves(known),
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    facts = read(run, "run.json")
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
