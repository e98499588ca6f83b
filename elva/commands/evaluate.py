"""`elva evaluate`: a run's models, embeddings by M-BEIR's protocol (paper, sec. 4.1), TREC files.

Embeddings are searched exactly, in one pass over each pool's shards where they lie; what was found
is kept as TREC runs, and the figures come from those alone.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from elva.data.extras import read_minimal_pairs
from elva.data.mbeir import QuerySet, read_sets
from elva.data.strict import Faults
from elva.errors import DataError, RunError
from elva.evaluation import protocol
from elva.evaluation.metrics import measure
from elva.evaluation.ranks import leads_its_own
from elva.evaluation.trained import evaluate_stage
from elva.evaluation.trec import Qrels, read_qrels, read_run, write_qrels, write_run
from elva.files import write_text
from elva.index.embeddings import Embeddings
from elva.progress import SILENT, Reporter
from elva.run import Run

DEPTH = 150
"""Answers kept of each query: more than the largest cut-off and M-BEIR's positives together."""


def evaluate(
    run: Run, reporter: Reporter, names: Sequence[str] | None = None, *, split: str = "test"
) -> dict[str, dict[str, Any]]:
    """Evaluate the named stages (all that are trained, for None); {name: its evaluation}."""
    wanted = list(names) if names is not None else run.trained
    if not wanted:
        raise RunError(
            f"{run.directory}: must hold a trained stage; finish it with elva train --resume"
        )
    for name in wanted:
        if not run.is_trained(name):
            raise RunError(
                f"{run.directory}: stage {name!r} must be trained first; "
                f"trained so far: {', '.join(run.trained) or 'none'}"
            )
    return {name: evaluate_stage(run, name, reporter, split=split) for name in wanted}


def evaluate_embeddings(
    embeddings: Path,
    data: Path,
    output: Path,
    *,
    split: str = "test",
    tasks: Sequence[str] | None = None,
    pools: Literal["local", "global"] = "local",
    skip_bad: int = 0,
    reporter: Reporter = SILENT,
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
        reporter.start(f"search {one.stem}", len(one.pool), "rows")
        write_run(run, _answers(embeddings, one, split, reporter), "elva")
        write_qrels(output / f"{one.stem}.qrels.txt", judged)
        figures = measure(read_run(run), judged)
        result["sets"][one.stem] = protocol.row(one, figures) | _among(embeddings, data, one, split)
        result["ties"] += [f"{one.stem}: {line}" for line in figures.ties()]
        reporter.finish("")
    result |= protocol.averages(result["sets"])
    write_text(output / "figures.json", json.dumps(result, indent=1) + "\n")
    return result


def evaluate_files(run: Path, qrels: Path) -> dict[str, Any]:
    """Measure a TREC run against qrels; a DataError where nothing in them is right."""
    figures = measure(read_run(run), read_qrels(qrels))
    if not figures.per_query:
        raise DataError(f"{qrels}: judges no candidate right; a relevance above 0 does")
    return {
        "queries": len(figures.per_query),
        "unanswered": len(figures.unanswered),
        "unjudged": len(figures.unjudged),
        "ties": figures.ties(),
        **figures.mean,
    }


def _answers(
    embeddings: Path, one: QuerySet, split: str, reporter: Reporter
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    asked = Embeddings.open(embeddings / f"mbeir_{one.stem}_{split}")
    shown = Embeddings.open(embeddings / one.pool_name)
    shown.check_model(asked)
    qids, query = asked.queries()
    found, dids = shown.nearest(query, DEPTH, reporter.advance)
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
            hits.append(leads_its_own(query[i : i + 1], dids, rows, right[qid]))
    return {"hit_at_1_among_its_own": fmean(hits), "own_queries": len(hits)} if hits else {}
