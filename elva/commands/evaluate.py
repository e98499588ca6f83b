"""`elva evaluate`: a run's models, embeddings by M-BEIR's protocol (paper, sec. 4.1), TREC files.

Embeddings are searched exactly, in one pass over each pool's shards where they lie; what was found
is kept as TREC runs, and the figures come from those alone.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elva.data.extras import read_minimal_pairs
from elva.data.mbeir import QuerySet, read_sets
from elva.data.strict import Faults, parse, read_text
from elva.errors import DataError, RunError
from elva.evaluation import protocol
from elva.evaluation.metrics import CUTOFFS, measure
from elva.evaluation.ranks import rank_among, recall_at_k
from elva.evaluation.sets import SUBMITTED, cutoff, lines, map_cutoffs
from elva.evaluation.submission import submission
from elva.evaluation.trained import evaluate_stage
from elva.evaluation.trec import Answers, read_qrels, read_run, write_qrels, write_run
from elva.files import write_text
from elva.index.embeddings import Embeddings
from elva.mrbench.build import NOTES
from elva.progress import SILENT, Reporter
from elva.run import EVALUATED, Run, evaluated

FIGURES = "figures.json"


def evaluate(
    run: Run, reporter: Reporter, names: Sequence[str] | None = None, *, split: str | None = None
) -> dict[str, dict[str, Any] | None]:
    """Evaluate the named stages (all that are trained, for None); {name: its evaluation}.

    Args:
        split: one of the data of the run's last stage; test for None, or else val.

    Raises:
        UserError, DataError: a stage that is not trained, or nothing to evaluate it on.
    """
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
    data, there = evaluated(run.recipe)
    if split is None and there is None:
        raise DataError(
            f"{data}: must hold queries of {' or '.join(EVALUATED)} to evaluate on, got none"
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
    by_content: bool = False,
    skip_bad: int = 0,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Search every query file of a split and measure what was found.

    Args:
        embeddings: what `elva embed` wrote, of these queries and pools.
        output: gets `<stem>.run.trec` and `<stem>.qrels.txt` of each set and `figures.json`.
        by_content: copies of a right answer are right too, which M-BEIR's protocol has not.
        skip_bad: so many bad rows of the data, left out when it was embedded, are left out again.

    Returns:
        What `figures.json` holds: `sets` (stem -> its figures), `tasks` and `average` (hit@k at
        M-BEIR's k), `ties` (warnings), `no_answer_inside` (a line for each set that has queries
        without a right answer in the pool), `pools`, `by_content`, `skipped` (bad rows), and
        `mrbench`: whether the queries are `elva mrbench build`'s. Of a set whose answers are not
        published there are no figures; where its server takes a file, `submission` names it.

    Raises:
        UserError, DataError: embeddings that are missing, unfinished, of another model or data.
    """
    faults = Faults(skip_bad)
    sets = read_sets(data, tasks=tasks, split=split, pools=pools, faults=faults)
    result: dict[str, Any] = {"split": split, "pools": pools, "by_content": by_content, "sets": {}}
    result |= {"ties": [], "no_answer_inside": [], "skipped": faults.found}
    result["mrbench"] = (data / NOTES).is_file()
    for one in sets:
        reporter.start(f"search {one.stem}", len(one.pool), "rows")
        inside = _inside(one, by_content)
        judged = {q.id: dict.fromkeys((*inside[q.id], *q.outside), 1) for q in one.queries}
        # With as many wrong answers as the largest cut-off no tie at a list's end hides one.
        depth = max(CUTOFFS) + max(map(len, inside.values()), default=0)
        found = _answers(embeddings, one, split, depth, reporter)
        run = output / f"{one.stem}.run.trec"
        write_run(run, found, "elva")
        if not any(judged.values()):
            result["sets"][one.stem] = _unjudged(one, read_run(run), output)
            reporter.finish("")
            continue
        write_qrels(output / f"{one.stem}.qrels.txt", judged)
        figures = measure(read_run(run), judged, map_cutoffs=map_cutoffs(one.stem))
        lost = [qid for qid, dids in inside.items() if judged[qid] and not dids]
        result["sets"][one.stem] = (
            protocol.row(one, figures)
            | {"no_answer_inside": len(lost)}
            | _among(embeddings, data, one, split)
        )
        result["ties"] += [f"{one.stem}: {line}" for line in figures.ties()]
        if lost:
            result["no_answer_inside"].append(_lost(one, lost))
        reporter.finish("")
    result |= protocol.averages(result["sets"])
    write_text(output / FIGURES, json.dumps(result, indent=1) + "\n")
    return result


def _unjudged(one: QuerySet, found: Answers, output: Path) -> dict[str, Any]:
    """What is known of a set whose answers are not published, and what its server takes."""
    row = {"task": one.task, "queries": len(one.queries), "pool": len(one.pool)}
    row |= {"k": cutoff(one.stem), "answers": "not published"}
    if one.stem not in SUBMITTED:
        return row
    path = output / f"{one.stem}.submission.json"
    write_text(path, json.dumps(submission(one, found, SUBMITTED[one.stem])) + "\n")
    return row | {"submission": str(path)}


def beside_paper(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The paper's figures of its sets, beside those of some evaluations.

    Args:
        files: directories that `evaluate_embeddings` wrote, or their `figures.json`.

    Returns:
        As `protocol.beside_paper`; a file's name is its path as it was given.

    Raises:
        DataError: no such file, of another protocol, or of none of the paper's sets.
    """
    return protocol.beside_paper({str(path): _figures(path) for path in files})


def _figures(path: Path) -> dict[str, Any]:
    file = path / FIGURES if path.is_dir() else path
    found = parse(str(file), read_text(file))
    sets = found.get("sets")
    if not isinstance(sets, dict) or not all(isinstance(row, dict) for row in sets.values()):
        raise DataError(f"{file}: sets must be an object of sets, as elva evaluate writes it")
    for key, own in (("pools", "local"), ("by_content", False)):
        if found.get(key) != own:
            raise DataError(
                f"{file}: {key} must be {own!r} to stand beside the paper's figures, got "
                f"{found.get(key)!r}; evaluate without --{key.replace('_', '-')}"
            )
    known = [line for line in lines() if line.stem in sets]
    if not known:
        raise DataError(f"{file}: must have a set that the paper reports, got {', '.join(sets)}")
    if found.get("split") != "test" and not set(sets) <= set(SUBMITTED):
        raise DataError(f"{file}: must be of split test, got {found.get('split')!r}")
    for line in known:
        value = sets[line.stem].get(line.figure)
        if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
            raise DataError(
                f"{file}: {line.stem}: {line.figure} must be from 0 to 1, got {value!r}"
            )
    return found


def evaluate_files(run: Path, qrels: Path) -> dict[str, Any]:
    """Measure a TREC run against qrels.

    Raises:
        DataError: a file that is none, or qrels in which nothing is right.
    """
    figures = measure(read_run(run), read_qrels(qrels))
    return {
        "queries": len(figures.per_query),
        "unanswered": len(figures.unanswered),
        "unjudged": len(figures.unjudged),
        "ties": figures.ties(),
        **figures.mean,
    }


def _inside(one: QuerySet, by_content: bool) -> dict[str, list[str]]:
    """Query -> what is right for it and in the pool, with all copies where content decides."""
    copies = _copies(one) if by_content else {}
    return {
        query.id: list(
            dict.fromkeys(did for right in query.positives for did in copies.get(right, [right]))
        )
        for query in one.queries
    }


def _copies(one: QuerySet) -> dict[str, list[str]]:
    """Right answer -> all candidates of its content, of those that have a copy."""
    content = one.pool.identities(np.arange(len(one.pool)))
    right = sorted({one.pool.row(did) for query in one.queries for did in query.positives})
    rows = np.flatnonzero(np.isin(content, content[right]))
    alike: dict[int, list[str]] = {}
    for row in rows.tolist():
        alike.setdefault(int(content[row]), []).append(one.pool[row].id)
    groups = (alike[int(content[row])] for row in right)
    return {one.pool[row].id: dids for row, dids in zip(right, groups, strict=True) if dids[1:]}


def _lost(one: QuerySet, qids: Sequence[str]) -> str:
    return (
        f"{one.stem}: {len(qids):,} of {len(one.queries):,} queries have no right answer in "
        f"{one.pool_name}, {qids[0]} first; they count as misses"
    )


def _answers(
    embeddings: Path, one: QuerySet, split: str, depth: int, reporter: Reporter
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    asked = Embeddings.open(embeddings / f"mbeir_{one.stem}_{split}")
    shown = Embeddings.open(embeddings / one.pool_name)
    shown.check_model(asked)
    qids, query = asked.queries()
    found, dids = shown.nearest(query, depth, reporter.advance)
    for i, qid in enumerate(qids):
        rows = found.rows[i].tolist()
        yield qid, list(zip([dids[r] for r in rows], found.scores[i].tolist(), strict=True))


def _among(embeddings: Path, data: Path, one: QuerySet, split: str) -> dict[str, Any]:
    """hit@1 among each query's own candidates, where the data lists them: minimal pairs, and
    MMEB's test sets."""
    listed = read_minimal_pairs(data / "minimal_pairs.jsonl", one.queries, {one.task: one.pool})
    if not listed:
        return {}
    right = {q.id: q.positives for q in one.queries}
    shown = Embeddings.open(embeddings / one.pool_name)
    qids, query = Embeddings.open(embeddings / f"mbeir_{one.stem}_{split}").queries()
    wanted = {did for some in listed.values() for did in some}
    rows = {did: row for row, did in enumerate(shown.ids) if did in wanted}
    place = {did: at for at, did in enumerate(rows)}
    own = [[place[did] for did in listed.get(qid, ()) if did in place] for qid in qids]
    asked = [i for i, some in enumerate(own) if len(some) > 1]
    if not asked:
        return {}
    # Of its right answers those among its own: others are no part of the choice.
    positives = [
        [place[did] for did in listed[qids[i]] if did in place and did in right[qids[i]]]
        for i in asked
    ]
    bank = shown.rows([*rows.values()])
    ranks = rank_among(query[asked], bank, positives, [own[i] for i in asked])
    return {"hit_at_1_among_its_own": recall_at_k(ranks, 1), "own_queries": len(asked)}
