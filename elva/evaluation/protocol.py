"""`elva evaluate --embeddings`: M-BEIR's protocol (paper, sec. 4.1) on what `elva embed` wrote.

Every query file is searched exactly, in one pass over its pool's shards where they lie; what was
found is kept as TREC runs, and the figures come from those alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rich.table import Table

from elva.data.extras import read_minimal_pairs
from elva.data.mbeir import QuerySet, read_sets
from elva.data.strict import Faults
from elva.evaluation.metrics import Figures, is_first, measure
from elva.evaluation.trec import Qrels, read_qrels, read_run, write_qrels, write_run
from elva.files import write_text
from elva.index import exact
from elva.index.embeddings import Embeddings
from elva.progress import Reporter

DEPTH = 150
"""Answers kept of each query: more than the largest cut-off and M-BEIR's positives together."""

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


def evaluate_embeddings(
    embeddings: Path,
    data: Path,
    output: Path,
    *,
    split: str = "test",
    tasks: Sequence[str] | None = None,
    pools: Literal["local", "global"] = "local",
    skip_bad: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Search every query file of a split and measure what was found.

    Args:
        embeddings: what `elva embed` wrote, of these queries and pools.
        output: gets `<stem>.run.trec` and `<stem>.qrels.txt` of each set and `figures.json`.
        skip_bad: so many bad rows of the data, left out when it was embedded, are left out again.

    Returns:
        What `figures.json` holds: `sets` (stem -> its figures), `tasks` and `average` (hit@k at
        M-BEIR's k), `ties` (warnings), `pools`, `skipped` (bad rows).

    Raises:
        UserError, DataError: embeddings that are missing, unfinished, of another model or data.
    """
    faults = Faults(skip_bad)
    sets = read_sets(data, tasks=tasks, split=split, pools=pools, faults=faults)
    result: dict[str, Any] = {"split": split, "pools": pools, "sets": {}, "ties": []}
    result["skipped"] = faults.found
    for one in sets:
        run = output / f"{one.stem}.run.trec"
        judged: Qrels = {q.id: dict.fromkeys(q.positives, 1) for q in one.queries}
        if reporter is not None:
            reporter.start(f"search {one.stem}", len(one.pool), "rows")
        write_run(run, _answers(embeddings, one, split, reporter), "elva")
        write_qrels(output / f"{one.stem}.qrels.txt", judged)
        figures = measure(read_run(run), judged)
        result["sets"][one.stem] = _row(one, figures) | _among(embeddings, data, one, split)
        result["ties"] += [f"{one.stem}: {line}" for line in figures.ties()]
        if reporter is not None:
            reporter.finish("")
    result |= _averages(result["sets"])
    write_text(output / "figures.json", json.dumps(result, indent=1) + "\n")
    return result


def evaluate_files(run: Path, qrels: Path) -> dict[str, Any]:
    """Measure a TREC run against qrels."""
    figures = measure(read_run(run), read_qrels(qrels))
    return {
        "queries": len(figures.per_query),
        "unanswered": len(figures.unanswered),
        "unjudged": len(figures.unjudged),
        "ties": figures.ties(),
        **figures.mean,
    }


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


def _answers(
    embeddings: Path, one: QuerySet, split: str, reporter: Reporter | None
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    asked = Embeddings.open(embeddings / f"mbeir_{one.stem}_{split}")
    shown = Embeddings.open(embeddings / one.pool_name)
    shown.check_model(asked)
    qids, query = asked.queries()
    found, dids = shown.nearest(query, DEPTH, None if reporter is None else reporter.advance)
    for i, qid in enumerate(qids):
        rows = found.rows[i].tolist()
        yield qid, list(zip([dids[r] for r in rows], found.scores[i].tolist(), strict=True))


def _among(embeddings: Path, data: Path, one: QuerySet, split: str) -> dict[str, Any]:
    """hit@1 among each query's own candidates, where the data lists them: minimal pairs, and
    MMEB's test sets."""
    listed = read_minimal_pairs(data / "minimal_pairs.jsonl", one.queries, {one.task: one.pool})
    right = {q.id: q.positives for q in one.queries}
    shown = Embeddings.open(embeddings / one.pool_name)
    qids, query = Embeddings.open(embeddings / f"mbeir_{one.stem}_{split}").queries()
    place = {did: row for row, did in enumerate(shown.ids)}
    hits = []
    for i, qid in enumerate(qids):
        dids = [did for did in listed.get(qid, ()) if did in place]
        if len(dids) > 1:
            rows = shown.rows([place[did] for did in dids])
            found = exact.top(query[i : i + 1], rows, len(dids))
            answers = zip(found.rows[0].tolist(), found.scores[0].tolist(), strict=True)
            hits.append(is_first({dids[r]: score for r, score in answers}, right[qid]))
    return {"hit_at_1_among_its_own": fmean(hits), "own_queries": len(hits)} if hits else {}


def _row(one: QuerySet, figures: Figures) -> dict[str, Any]:
    return {
        "task": one.task,
        "queries": len(figures.per_query),
        "pool": len(one.pool),
        "unanswered": len(figures.unanswered),
        "k": cutoff(one.stem),
        **figures.mean,
    }


def _averages(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means of hit@k over the sets of each task, and over all sets."""
    hits = {stem: row[f"hit_at_{row['k']}"] for stem, row in sets.items()}
    tasks: dict[str, list[float]] = {}
    for stem, row in sets.items():
        tasks.setdefault(row["task"], []).append(hits[stem])
    return {"tasks": {t: fmean(v) for t, v in tasks.items()}, "average": fmean(hits.values())}
