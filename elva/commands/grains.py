"""`elva grains`: which grains of its queries a model does not see.

Liu et al., ELVA, arXiv:2606.20280, sec. 3.2, definition 2: mask one grain, compare the embeddings.
The mean over types alone misleads (a model that had collapsed onto entities showed a higher one),
so every type stands by itself, the least of them too, and minimal-pair Recall@1 beside them.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from elva.data import load
from elva.data.schema import modalities
from elva.errors import UserError
from elva.evaluation.grains import figures as measure
from elva.evaluation.grains import minimal_pair_recall, probe
from elva.files import write_text
from elva.model.encoder import Encoder
from elva.progress import SILENT, Reporter
from elva.report import charts
from elva.report.drawing import Series, write_png

_DELTA = 0.05
"""Ours: below it a grain counts as not seen; the paper's delta is not printed."""

MIN_PROBES = 5
"""Types with fewer stand in the table, not in the pictures."""

FIGURES, _MEANS, _HISTOGRAM = "grains.json", "grain-distance.png", "grain-histogram.png"


def grains(
    models: Sequence[tuple[str, Encoder]],
    data: Path,
    output: Path,
    *,
    split: str = "test",
    task: str = "t2i",
    limit: int | None = None,
    delta: float = _DELTA,
    reporter: Reporter = SILENT,
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
        count), `blind` (the share of queries with a grain not seen), `minimal_pair_recall_at_1`
        (None where there are no such pairs, or the model does not read the candidates),
        `queries` (each one's least seen grain, the most blind first) and every `probe`.

    Raises:
        UserError, DataError: no query of the task has two grains.
    """
    dataset = load(data, split=split, tasks=[task])
    queries = list(islice((q for q in dataset.queries if q.grains and len(q.grains) > 1), limit))
    if not queries:
        raise UserError(
            f"grains: {data} must have queries with two or more grains, got none for {task}; "
            "build them with elva mrbench build"
        )
    found: dict[str, Any] = {"split": split, "task": task, "delta": delta, "models": {}}
    for title, encoder in models:

        def encode(items: Sequence[Any], encoder: Encoder = encoder) -> torch.Tensor:
            return encoder(items, reporter.advance).embeddings

        reporter.start(f"{title}: grains", None, "items")
        asked = encode(queries)
        probes = probe(queries, asked, encode)
        figures = measure(probes, delta)
        shown = modalities(queries[0].task)[1] in encoder.modalities
        figures["minimal_pair_recall_at_1"] = (
            minimal_pair_recall(dataset, queries, asked, encode) if shown else None
        )
        found["models"][title] = figures
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
        groups[Series(title, roles[place], max(0, place - 2))] = by_kind
    kinds = _kinds(models)
    common = [k for k in kinds if max(len(g.get(k, ())) for g in groups.values()) >= MIN_PROBES]
    drawn = (common or kinds)[:8]
    write_png(output / _MEANS, charts.grain_chart(drawn, groups))
    write_png(output / _HISTOGRAM, charts.grain_histogram(drawn[:6], groups))
