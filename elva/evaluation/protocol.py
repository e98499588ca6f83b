"""M-BEIR's protocol (paper, sec. 4.1): its sets, their cut-offs, means, and published figures."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from rich.table import Table

from elva.data.mbeir import QuerySet
from elva.evaluation.metrics import Figures

SUBTASKS = {
    "visualnews_task0": "VN t→i", "mscoco_task0": "COCO t→i", "fashion200k_task0": "F200K t→i",
    "webqa_task1": "WebQA t→t", "edis_task2": "EDIS", "webqa_task2": "WebQA t→it",
    "visualnews_task3": "VN i→t", "mscoco_task3": "COCO i→t", "fashion200k_task3": "F200K i→t",
    "nights_task4": "NIGHTS", "oven_task6": "OVEN it→t", "infoseek_task6": "InfoS it→t",
    "fashioniq_task7": "FIQ", "cirr_task7": "CIRR", "oven_task8": "OVEN it→it",
    "infoseek_task8": "InfoS it→it",
}  # fmt: skip
"""M-BEIR's sixteen test sets, in the paper's order."""

PUBLISHED = {
    "LamRA-Ret-2B": (30.8, 78.8, 23.1, 82.5, 54.3, 77.8, 31.2, 88.5, 27.1, 28.7, 51.1, 44.2, 28.9,
                     47.7, 72.3, 60.8),
    "ELVA-2B": (35.6, 80.3, 25.0, 88.0, 56.1, 80.5, 33.4, 90.2, 25.9, 29.3, 52.0, 47.4, 30.9, 50.0,
                72.8, 61.3),
    "LamRA-Ret-7B": (41.6, 81.5, 28.7, 86.0, 62.6, 81.2, 39.6, 90.6, 30.4, 32.1, 54.1, 52.1, 33.2,
                     53.1, 76.2, 63.3),
    "ELVA-7B": (43.5, 83.0, 29.2, 91.0, 63.5, 83.1, 41.7, 92.2, 32.1, 32.8, 56.0, 55.5, 34.6, 55.4,
                77.5, 67.1),
}  # fmt: skip
"""hit@k on local pools, in points, as Liu et al., ELVA, arXiv:2606.20280 report them."""


def cutoff(stem: str) -> int:
    """M-BEIR's k: 10 for the fashion sets, 5 otherwise."""
    return 10 if stem.startswith(("fashion200k", "fashioniq")) else 5


def table(result: Mapping[str, Any]) -> Table:
    """Every set's figures, in points, and where it is one of M-BEIR's the paper's beside them."""
    found = result["sets"]
    known = any(stem in SUBTASKS for stem in found) and result["pools"] == "local"
    models = ["ELVA-2B", "ELVA-7B"] if known else []
    shown = Table(title=f"{result['split']}, {result['pools']} pools")
    shown.add_column("set")
    for name in ("queries", "pool", "hit@k", "recall@k", "MRR", "nDCG@10", "own hit@1", *models):
        shown.add_column(name, justify="right")
    places = list(SUBTASKS)
    for stem, row in found.items():
        k = row["k"]
        values = [100 * row[n] for n in (f"hit_at_{k}", f"recall_at_{k}", "mrr", "ndcg_at_10")]
        beside = [
            f"{PUBLISHED[m][places.index(stem)]:.1f}" if stem in SUBTASKS else "" for m in models
        ]
        shown.add_row(
            f"{SUBTASKS.get(stem, stem)} (k = {k})", f"{row['queries']:,}", f"{row['pool']:,}",
            *(f"{v:.1f}" for v in values), _points(row.get("hit_at_1_among_its_own")), *beside,
        )  # fmt: skip
    whole = set(SUBTASKS) <= set(found)
    beside = [f"{fmean(PUBLISHED[m]):.1f}" if whole else "" for m in models]
    shown.add_section()
    shown.add_row("average", "", "", f"{100 * result['average']:.1f}", "", "", "", "", *beside)
    return shown


def _points(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def row(one: QuerySet, figures: Figures) -> dict[str, Any]:
    """A set's figures."""
    return {
        "task": one.task,
        "queries": len(figures.per_query),
        "pool": len(one.pool),
        "unanswered": len(figures.unanswered),
        "k": cutoff(one.stem),
        **figures.mean,
    }


def averages(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means of hit@k over the sets of each task, and over all sets."""
    hits = {stem: row[f"hit_at_{row['k']}"] for stem, row in sets.items()}
    tasks: dict[str, list[float]] = {}
    for stem, row in sets.items():
        tasks.setdefault(row["task"], []).append(hits[stem])
    return {"tasks": {t: fmean(v) for t, v in tasks.items()}, "average": fmean(hits.values())}
