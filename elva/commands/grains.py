"""`elva grains`: which grains of its queries a model does not see.

Liu et al., ELVA, arXiv:2606.20280, sec. 3.2, definition 2: mask one grain, compare the embeddings.
The mean over types alone misleads (a model that had collapsed onto entities showed a higher one),
so every type stands by itself, the least of them too, and minimal-pair Recall@1 beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.table import Table

from elva.data import Dataset, Query, load
from elva.errors import UserError
from elva.evaluation.grains import Probe, by_type, least, probe
from elva.evaluation.metrics import is_first
from elva.files import write_text
from elva.index import exact
from elva.model.encoder import Encoder
from elva.progress import Reporter
from elva.report import charts

DELTA = 0.05
"""Ours: below it a grain counts as not seen; the paper's delta is not printed."""

MIN_PROBES = 5
"""Types with fewer stand in the table, not in the pictures."""

FIGURES, MEANS, HISTOGRAM = "grains.json", "grain-distance.png", "grain-histogram.png"


def grains(
    models: Sequence[tuple[str, Encoder]],
    data: Path,
    output: Path,
    *,
    split: str = "test",
    task: str = "t2i",
    limit: int | None = None,
    delta: float = DELTA,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Probe one or more models, such as a checkpoint before and after.

    Args:
        models: (title, model), in the order in which they are to be shown.
        data: a directory in M-BEIR's layout with `grains.jsonl`.
        output: gets `grains.json` and two pictures.
        limit: at most so many queries; all for None.
        delta: below it a grain counts as not seen.

    Returns:
        What `grains.json` holds: for each model `mean`, `least` (over types), `types` (mean and
        count), `blind` (the share of queries with a grain not seen), `minimal_pair_recall_at_1`,
        `queries` (each one's least seen grain, the most blind first) and every `probe`.

    Raises:
        UserError, DataError: no query of the task has two grains.
    """
    dataset = load(data, split=split, tasks=[task])
    queries = [q for q in dataset.queries if q.grains and len(q.grains) > 1][:limit]
    if not queries:
        raise UserError(
            f"grains: {data} must have queries with two or more grains, got none for {task}; "
            "build them with elva mrbench build"
        )
    found: dict[str, Any] = {"split": split, "task": task, "delta": delta, "models": {}}
    for title, encoder in models:

        def encode(items: Sequence[Any], encoder: Encoder = encoder) -> torch.Tensor:
            return encoder(items, None if reporter is None else reporter.advance).embeddings

        if reporter is not None:
            reporter.start(f"{title}: grains", None, "items")
        asked = encode(queries)
        probes = probe(queries, asked, encode)
        figures = _figures(probes, delta)
        figures["minimal_pair_recall_at_1"] = _pairs(dataset, queries, asked, encode)
        found["models"][title] = figures
        if reporter is not None:
            reporter.finish("")
    write_text(output / FIGURES, json.dumps(found, indent=1) + "\n")
    _draw(output, found["models"])
    return found


def table(found: Mapping[str, Any]) -> Table:
    """A row a model: the mean, the least type, every type, minimal pairs."""
    models = found["models"]
    kinds = _kinds(models)
    shown = Table(title=f"cosine distance without one grain, {found['task']} {found['split']}")
    shown.add_column("model")
    for name in ("mean", "least", f"blind (< {found['delta']})", "pairs R@1", *kinds):
        shown.add_column(name, justify="right")
    for title, row in models.items():
        pairs = row["minimal_pair_recall_at_1"]
        shown.add_row(
            title, f"{row['mean']:.3f}", f"{row['least']['type']} {row['least']['mean']:.3f}",
            f"{row['blind']:.3f}", "" if pairs is None else f"{pairs:.3f}",
            *(f"{row['types'][k]['mean']:.3f}" if k in row["types"] else "" for k in kinds),
        )  # fmt: skip
    return shown


def _figures(probes: Sequence[Probe], delta: float) -> dict[str, Any]:
    types = {
        kind: {"mean": fmean(values), "count": len(values)}
        for kind, values in sorted(by_type(probes).items())
    }
    weakest = min(types, key=lambda kind: float(types[kind]["mean"]))
    lowest = least(probes)
    return {
        "mean": fmean(p.distance for p in probes),
        "least": {"type": weakest, "mean": types[weakest]["mean"]},
        "types": types,
        "blind": fmean(float(p.distance < delta) for p in lowest),
        "queries": [asdict(p) for p in lowest],
        "probes": [asdict(p) for p in probes],
    }


def _pairs(
    dataset: Dataset, queries: Sequence[Query], asked: torch.Tensor, encode: Any
) -> float | None:
    """R@1 among the candidates of the query's own entity; ties count against the model."""
    wanted = {i: dataset.minimal_pairs.get(q.id, ()) for i, q in enumerate(queries)}
    wanted = {i: ids for i, ids in wanted.items() if len(ids) > 1}
    if not wanted:
        return None
    pool = dataset.pool(queries[0].task)
    ids = list(dict.fromkeys(id for some in wanted.values() for id in some))
    place = {id: row for row, id in enumerate(ids)}
    shown = encode([pool[pool.row(id)] for id in ids])
    hits = []
    for i, some in wanted.items():
        found = exact.top(asked[i : i + 1], shown[[place[id] for id in some]], len(some))
        answers = zip(found.rows[0].tolist(), found.scores[0].tolist(), strict=True)
        hits.append(is_first({some[r]: score for r, score in answers}, queries[i].positives))
    return fmean(hits)


def _kinds(models: Mapping[str, Any]) -> list[str]:
    """Grain types, the most frequent first."""
    counts: dict[str, int] = {}
    for row in models.values():
        for kind, one in row["types"].items():
            counts[kind] = max(counts.get(kind, 0), one["count"])
    return sorted(counts, key=lambda kind: (-counts[kind], kind))


def _draw(output: Path, models: Mapping[str, Any]) -> None:
    roles = ["last"] if len(models) == 1 else ["before", "last", *["control"] * len(models)]
    groups = {}
    for place, (title, row) in enumerate(models.items()):
        by_kind: dict[str, list[float]] = {}
        for one in row["probes"]:
            by_kind.setdefault(one["type"], []).append(one["distance"])
        groups[charts.Series(title, roles[place], max(0, place - 2))] = by_kind
    kinds = _kinds(models)
    common = [k for k in kinds if max(len(g.get(k, ())) for g in groups.values()) >= MIN_PROBES]
    drawn = (common or kinds)[:8]
    charts.grain_chart(output / MEANS, drawn, groups)
    charts.grain_histogram(output / HISTOGRAM, drawn[:6], groups)
