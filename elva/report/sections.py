"""The charts of a run's page, section by section; one that the run has no data for is empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from elva.report import charts, scatter
from elva.report.drawing import LIGHT, Series, svg
from elva.report.figures import MIN_PROBES, TASKS, Row, grain_counts, row_with
from elva.run import Run


class Key(NamedTuple):
    """What a colour of a chart means."""

    words: str
    colour: str  # CSS
    mark: str = "■"


class Panel(NamedTuple):
    """A chart with its heading."""

    title: str
    drawn: Markup


class Section(NamedTuple):
    """Charts beside each other, with what their colours mean, and sentences on them."""

    panels: list[Panel]
    keys: list[Key]
    sentences: list[str]


_MARKS = "●■▲◆▼"
"""`scatter.MARKERS` as characters."""


def grain_distances(rows: Sequence[Row]) -> Markup | None:
    """Mean distance by grain type."""
    probed = [row for row in rows if row.grains]
    if not probed:
        return None
    counts = grain_counts(probed)
    kinds = [kind for kind, count in counts.items() if count >= MIN_PROBES] or list(counts)
    drawn = charts.grain_chart(kinds, {row.series: row.grains for row in probed})
    return svg(drawn, "Bars: mean grain distance by grain type, one colour a stage or control.")


def ranks(rows: Sequence[Row]) -> Section:
    """Recall for every k, by task."""
    panels: list[Panel] = []
    shown: dict[Series, None] = {}
    compared = [row for row in rows if row.role != "earlier"]
    for task, label in TASKS.items():
        series = {
            row.series: [s["rank"] for s in row.samples(task).values()]
            for row in compared
            if row.samples(task)
        }
        pool = max((row.figures.get(f"{task}_pool") or 0 for row in compared), default=0)
        if series and pool > 1:
            alt = f"Curves, {label}: share of queries whose positive is among the first k."
            panels.append(Panel(label, svg(charts.rank_chart(pool, series), alt)))
            shown |= dict.fromkeys(series)
    keys = [*_keys(shown), Key("chance", "var(--chart-muted)", "⋯")]
    return Section(panels, keys if panels else [], [])


def moves(rows: Sequence[Row]) -> Section:
    """Each query's rank before and after the last stage, by task."""
    before, last = row_with(rows, "before"), row_with(rows, "last")
    panels, more = [], []
    for task, label in TASKS.items() if before and last else ():
        assert before is not None and last is not None
        old, new = before.samples(task), last.samples(task)
        pairs = [(old[i]["rank"], new[i]["rank"]) for i in new if i in old]
        if pairs:
            few = scatter.spread(pairs)
            alt = f"Discs, {label}: a query's rank after {last.title} against the one before."
            panels.append(Panel(label, svg(scatter.moves(before.series, last.series, few), alt)))
            more += _left_out(len(pairs), len(few))
    return Section(panels, [], list(dict.fromkeys(more)))


def rewards(rows: Sequence[Row]) -> Section:
    """Each query's margin reward against its rank reward, by task."""
    panels: list[Panel] = []
    shown: dict[Series, None] = {}
    more: list[str] = []
    for task, label in TASKS.items():
        groups = {}
        for row in (row_with(rows, "before"), row_with(rows, "last")):
            known = [] if row is None else [*row.samples(task).values()]
            pairs = [
                (sample["margin_reward"], sample["rank_reward"])
                for sample in known
                if sample.get("margin_reward") is not None and sample.get("rank_reward") is not None
            ]
            if row is not None and pairs:
                groups[row.series] = scatter.spread(pairs)
                more += _left_out(len(pairs), len(groups[row.series]))
        if groups:
            alt = f"Points, {label}: margin reward and rank reward of each query."
            panels.append(Panel(label, svg(scatter.rewards(groups), alt)))
            shown |= dict.fromkeys(groups)
    return Section(panels, _keys(shown), list(dict.fromkeys(more)))


def pushes(rows: Sequence[Row]) -> Section:
    """Who pushes which negative, before and after the last stage."""
    panels, sentences = [], []
    for row in (row_with(rows, "before"), row_with(rows, "last")):
        found = row and row.evaluation.get("pushes")
        if row is None or not found or None in (*found["infonce"], *found["reward"]):
            continue
        shares = {"InfoNCE": found["infonce"], "reward": found["reward"]}
        alt = f"Curves, {row.title}: share of each objective's push by the negative's rank."
        panels.append(Panel(row.title, svg(scatter.pushes(shares), alt)))
        ten = {name: sum(map(abs, values[:10])) for name, values in shares.items()}
        nearer = sum(share for share in shares["reward"] if share < 0)
        pulled = f"; of the latter {-nearer:.0%} pulls negatives nearer" if nearer < -0.005 else ""
        sentences.append(
            f"{row.title}, {TASKS[found['task']]}, mean over {found['queries']:,} queries: the ten "
            f"hardest negatives get {ten['InfoNCE']:.0%} of InfoNCE's push "
            f"(T = {found['temperature']:g}) and {ten['reward']:.0%} of the reward's{pulled}."
        )
    keys = [Key("InfoNCE", "var(--chart-controls-0)"), Key("reward", "var(--chart-last)")]
    return Section(panels, keys if panels else [], sentences)


class _Map(NamedTuple):
    """Candidates in their plane, coloured by the texts of a grain type."""

    kind: str | None
    keys: list[Key]
    panels: list[Panel]


def maps(rows: Sequence[Row]) -> list[_Map]:
    """The planes of the stage before and of the last, a pair for each grain type that colours
    them."""
    known = [row for row in (row_with(rows, "before"), row_with(rows, "last")) if row]
    found_planes = [(row, row.evaluation.get("plane") or {}) for row in known]
    planes = [
        (row, plane) for row, plane in found_planes
        if plane.get("points")
        and all(p["x"] is not None is not p["y"] for p in plane["points"])
    ]  # fmt: skip
    if not planes:
        return []
    found = []
    for kind, texts in (scatter.groups_of(planes[-1][1]["points"]) or {None: []}).items():
        panels = []
        for row, plane in planes:
            first, second = plane["explained"]
            title = f"{row.title}: {first:.0%} + {second:.0%} of the variance"
            alt = f"Points, {row.title}: candidates in the plane of PCA, by {kind or 'nothing'}."
            drawn = scatter.plane(plane["points"], kind, texts)
            panels.append(Panel(title, svg(drawn, alt)))
        colours = ("last", *(f"controls-{i}" for i in range(len(LIGHT.controls))))
        keys = [
            Key(text, f"var(--chart-{name})", mark)
            for text, name, mark in zip(texts, colours, _MARKS, strict=False)
        ]
        rest = [Key("others", "var(--chart-muted)", "●")] if texts else []
        found.append(_Map(kind, [*keys, *rest], panels))
    return found


def curves(run: Run) -> Markup | None:
    """What metrics.jsonl says, a row a stage."""
    logged: dict[str, list[dict[str, float | None]]] = {}
    for line in run.metrics():
        logged.setdefault(line["stage"], []).append(line)
    order = [n for n in [*run.recipe.stages, *run.recipe.controls] if n in logged]
    drawn = charts.curves({run.title(name): logged[name] for name in order})
    alt = "Small multiples: loss parts, reward, KL, length and shares by step, a row a stage."
    return None if drawn is None else svg(drawn, alt)


def _keys(series: Sequence[Series] | dict[Series, None]) -> list[Key]:
    return [Key(one.title, one.variable) for one in series]


def _left_out(of: int, shown: int) -> list[str]:
    return [f"{shown:,} of {of:,} queries are drawn, at equal distances."] if shown < of else []
