"""`report.html` and the table of a run: what was trained, what it retrieves, and what that means.

Everything comes from the files of the run directory; only the pictures of the retrieval examples
are read from the data. A part whose files are missing is left out: half a run has a report too.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from elva.data import DataError
from elva.errors import UserError
from elva.evaluation.trained import COLUMNS, source
from elva.files import write_text
from elva.recipe import RECIPES, to_dict
from elva.report import charts, page, pictures
from elva.report.figures import MIN_PROBES, TASKS, Row, chance, row_with, rows_of
from elva.report.gallery import Gallery
from elva.run import Run

_HEAD = ["", *COLUMNS.values(), "least grain", "steps", "seconds"]


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
    cells, best = _cells(rows)
    drawn = Table(title=f"held-out queries, {run.recipe.name}, seed {run.recipe.seed}", box=None)
    for j, head in enumerate(_HEAD):
        drawn.add_column(head, justify="right" if j else "left", no_wrap=True)
    for i, row in enumerate(cells):
        drawn.add_row(*(Text(c, "bold" if (i, j) in best else "") for j, c in enumerate(row)))
    if levels := chance(rows):
        drawn.add_row(*_chance_cells(levels), style="dim")
    return drawn


def _cells(rows: Sequence[Row]) -> tuple[list[list[str]], set[tuple[int, int]]]:
    """The table's words, and where the best of each column stand."""
    cells, values = [], []
    for row in rows:
        figures = [row.figures.get(key) for key in COLUMNS]
        values.append([*figures, row.least_grain[1] if row.least_grain else None])
        steps = "-" if row.steps is None else f"{row.steps:,}"
        seconds = "-" if row.seconds is None else f"{row.seconds:.0f}"
        cells.append([row.title, *map(_number, figures), _least(row), steps, seconds])
    return cells, _best(values)


def _best(values: Sequence[Sequence[float | None]]) -> set[tuple[int, int]]:
    """(row, column) of the largest of each column as printed, counting the column of names."""
    best = set()
    for column, found in enumerate(zip(*values, strict=True), start=1):
        printed = [0.0 if v is None else round(v, 3) for v in found]
        if len(printed) > 1 and max(printed) > 0:
            best |= {(i, column) for i, v in enumerate(printed) if v == max(printed)}
    return best


def _chance_cells(levels: Mapping[str, float]) -> list[str]:
    return ["chance", *(_number(levels.get(key)) for key in COLUMNS), "", "", ""]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _least(row: Row) -> str:
    return f"{row.least_grain[1]:.3f} {row.least_grain[0]}" if row.least_grain else "-"


# -- the page --------------------------------------------------------------------------------------


def report(run: Run) -> Path:
    """Write RUN/report.html, its charts beside it and the pictures it shows under RUN/pictures."""
    rows = rows_of(run)
    examples, credit = _examples(run, rows)
    parts = [_opening(run, rows), _grains(run, rows), _ranks(run, rows), examples]
    parts += [_curves(run), _facts(run), page.footer(credit) if credit else ""]
    path = run.directory / "report.html"
    write_text(path, page.page(f"ELVA: {run.recipe.name}, seed {run.recipe.seed}", parts))
    return path


def _opening(run: Run, rows: Sequence[Row]) -> str:
    recipe, scratch = run.recipe, run.recipe.model.scratch
    model = recipe.model.path or (
        f"A Qwen2-VL of {scratch.layers} layers and {scratch.hidden_size} units, created from "
        f"random weights, with pictures of {scratch.image_size} pixels,"
    )
    stages = [row for row in rows if row.role != "control"]
    if not stages:
        done = f"{model} is to be trained by this recipe; no stage is finished yet."
        return page.title(f"{recipe.name}, seed {recipe.seed}", done)
    steps = sum(row.steps or 0 for row in stages)
    seconds = sum(row.seconds or 0.0 for row in stages)
    done = (
        f"{model} was trained in {_list([row.title for row in stages])}, {steps:,} steps in "
        f"{seconds:,.0f} s, to find pictures by their names and names by their pictures. "
    )
    cells, best = _cells(rows)
    levels = chance(rows)
    if levels:
        cells.append(_chance_cells(levels))
    return "\n".join([
        page.title(f"{recipe.name}, seed {recipe.seed}", done + _verdict(rows)),
        page.table(_HEAD, cells, best, muted=1 if levels else 0),
        *(page.text(words, "note") for words in _notes(run, rows)),
    ])  # fmt: skip


def _verdict(rows: Sequence[Row]) -> str:
    """One sentence: the last stage against where it started and against the best control."""
    key, heading = next(iter(COLUMNS.items()))
    known = [row for row in rows if row.figures.get(key) is not None]
    last, before = row_with(known, "last"), row_with(known, "before")
    if last is None:
        return "It has not been evaluated yet."
    words = f"After {last.title} its {heading} on held-out queries is {_number(last.figures[key])}"
    if before is not None:
        words += f", after {before.title} it was {_number(before.figures[key])}"
    controls = [row for row in known if row.role == "control"]
    if controls:
        best = max(controls, key=lambda row: row.figures[key])
        words += f"; the best control, {best.name}, has {_number(best.figures[key])}"
    return words + "."


def _notes(run: Run, rows: Sequence[Row]) -> list[str]:
    """What a reader must know to read the table."""
    figures = next((row.figures for row in reversed(rows) if row.figures), {})
    sizes = {
        label: (figures[f"{task}_queries"], figures[f"{task}_pool"])
        for task, label in TASKS.items()
        if figures.get(f"{task}_queries") and figures.get(f"{task}_pool")
    }
    notes = []
    if sizes:
        asked = [
            f"{q:,} queries {label} against {n:,} candidates" for label, (q, n) in sizes.items()
        ]
        error = 50 / min(q for q, _ in sizes.values()) ** 0.5
        notes.append(
            f"{_list(asked)}. R@k: share of queries with their right answer among the first k, "
            "ties counted against it. Best in bold. The sample of queries alone leaves a recall "
            f"uncertain by up to ±{error / 100:.3f} (one standard error); seeds add to that."
        )
    if figures.get("minimal_pair_pool_mean"):
        rivals = f"on average {figures['minimal_pair_pool_mean']:.1f}"
        notes.append(
            f"Pairs: only the pictures of the query's own entity compete ({rivals}), so nothing "
            "but the small grains decides. Least grain: the smallest mean grain distance of any "
            f"type with {MIN_PROBES} queries or more."
        )
    silent = {row.title: row.figures.get("t2i_frac_no_ret") or 0.0 for row in rows}
    shares = [f"{title} {share:.0%}" for title, share in silent.items() if share > 0.01]
    if shares:
        notes.append(
            f"Summaries of pictures that never reached [RET]: {_list(shares)}. Their embeddings "
            "are the fallback, read where the length limit cut them off."
        )
    if any(row.role == "control" for row in rows):
        last = run.title(list(run.recipe.stages)[-1])
        clocked = all(c.steps is None and c.epochs is None for c in run.recipe.controls.values())
        length = "runs for its wall time" if clocked else "runs for the steps its recipe names"
        notes.append(
            f"A control starts where {last} starts, {length} and is evaluated the same way: "
            f"{last} is worth what it adds to its controls, not to the stage before."
        )
    return notes


def _grains(run: Run, rows: Sequence[Row]) -> str:
    probed = [row for row in rows if row.grains]
    if not probed:
        return ""
    counts: dict[str, int] = {}
    for row in probed:
        for kind, found in row.grains.items():
            counts[kind] = max(counts.get(kind, 0), len(found))
    kinds = sorted(counts, key=lambda k: (-counts[k], k))
    drawn = [k for k in kinds if counts[k] >= MIN_PROBES] or kinds
    charts.grain_chart(
        run.directory / "grain-distance.png", drawn, {row.series: row.grains for row in probed}
    )
    means = [[fmean(row.grains[k]) if k in row.grains else None for k in kinds] for row in probed]
    values = [
        [row.least_grain[1] if row.least_grain else None, *found]
        for row, found in zip(probed, means, strict=True)
    ]
    cells = [
        [row.title, _least(row), *map(_number, found)]
        for row, found in zip(probed, means, strict=True)
    ]
    cells.append(["queries", "", *(str(counts[k]) for k in kinds)])
    return page.section(
        "Does each grain move the embedding?",
        page.text(
            "A grain is one unit of meaning in a query: its entity, a gender, a skin tone. Grain "
            "distance (Liu et al., ELVA, arXiv:2606.20280, definition 2) is the cosine distance "
            "between a query's embedding and that of the query without the grain; near zero, the "
            "model is blind to it. A mean over types misleads, because the entity alone can carry "
            "it: look at the least."
        ),
        page.chart(
            "grain-distance.png",
            "Bars: mean grain distance by grain type, one colour a stage or control.",
            "Mean and its standard error. Under each type, its number of queries; types with fewer "
            f"than {MIN_PROBES} are in the table only.",
        ),
        page.table(["", "least", *kinds], cells, _best(values), muted=1),
    )


def _ranks(run: Run, rows: Sequence[Row]) -> str:
    compared = [row for row in rows if row.role != "earlier"]
    panels, sentences = {}, []
    for task, label in TASKS.items():
        series = {
            row.series: [s["rank"] for s in row.samples(task).values()]
            for row in compared
            if row.samples(task)
        }
        pool = max((row.figures.get(f"{task}_pool") or 0 for row in compared), default=0)
        if series and pool > 1:
            panels[label] = (pool, series)
            sentences.append(_moved(label, compared, task))
    if not panels:
        return ""
    charts.rank_chart(run.directory / "ranks.png", panels)
    return page.section(
        "Where the right answer stands",
        *(page.text(sentence) for sentence in sentences if sentence),
        page.chart(
            "ranks.png",
            "Curves: share of queries whose positive is among the first k, against k.",
            "Recall for every k, on a logarithmic scale: higher is better.",
        ),
    )


def _moved(label: str, rows: Sequence[Row], task: str) -> str:
    """One sentence: which way the ranks went in the last stage."""
    before, last = row_with(rows, "before"), row_with(rows, "last")
    if before is None or last is None:
        return ""
    old, new = before.samples(task), last.samples(task)
    pairs = [(old[i]["rank"], new[i]["rank"]) for i in new if i in old]
    up, down = sum(b > a for b, a in pairs), sum(b < a for b, a in pairs)
    won, lost = sum(b > 1 == a for b, a in pairs), sum(b == 1 < a for b, a in pairs)
    return (
        f"{label}, {last.title} against {before.title}: of {len(pairs):,} queries the right answer "
        f"rises in {up}, falls in {down} and stays in {len(pairs) - up - down}; "
        f"{won} win the first place, {lost} lose it."
    )


def _examples(run: Run, rows: Sequence[Row]) -> tuple[str, str | None]:
    """The retrieval examples, and the credit that their pictures ask for."""
    if not any(row.samples(task) for row in rows for task in TASKS):
        return "", None
    try:
        root = source(list(run.recipe.stages.values())[-1].data, run)
        gallery = Gallery(rows, root, run.directory)
        return gallery.sections(), pictures.attribution(gallery.shown)
    except (DataError, UserError) as error:
        why = page.text(f"No examples are shown. {error}", "note")
        return page.section("Retrieval examples", why), None


def _curves(run: Run) -> str:
    logged: dict[str, list[dict[str, Any]]] = {}
    for line in run.metrics():
        logged.setdefault(line["stage"], []).append(line)
    order = [n for n in [*run.recipe.stages, *run.recipe.controls] if n in logged]
    lines = {run.title(name): logged[name] for name in order}
    if not lines or not charts.curves(run.directory / "curves.png", lines):
        return ""
    return page.section(
        "How training went",
        page.chart(
            "curves.png",
            "Small multiples: loss parts, reward, KL, length and shares by step, a row a stage.",
            "By step: raw values thin, a centred mean over a twentieth of the stage thick. Losses "
            "without their weights; reward: mean, and the spread inside a group.",
        ),
    )


def _facts(run: Run) -> str:
    noted = run.directory / "run.json"
    facts: dict[str, Any] = json.loads(noted.read_text("utf-8")) if noted.is_file() else {}
    machine = facts.get("machine") or {}
    pairs = [
        ("started", str(facts.get("started") or "unknown")),
        ("seed", str(run.recipe.seed)),
        ("commit", str(facts.get("commit") or "unknown (installed without a checkout)")),
        ("machine", f"{machine.get('cpus', '?')} CPUs, {machine.get('processor', 'unknown')}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in (facts.get("versions") or {}).items())),
    ]
    known = f"--recipe {run.recipe.name} " if run.recipe.name in RECIPES else ""
    file = run.directory / "recipe.yaml"
    command = f"elva train {known}--config {shlex.quote(str(file))} --output NEW"
    recipe = yaml.safe_dump(to_dict(run.recipe), sort_keys=False)
    return page.section(
        "To repeat it",
        page.code(command),
        page.facts(pairs),
        page.code(recipe, "The resolved recipe"),
    )


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
