"""The sample: queries judged in a drawn order, spread over grain types, and written as data."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elva.data import Grain, Query
from elva.data.layout import LINKED, qrels_file, query_file
from elva.data.mbeir import QuerySet, read_sets
from elva.data.strict import Faults, lines
from elva.draws import permutation
from elva.files import write_text
from elva.mrbench.judges import Judge
from elva.mrbench.review import Judged, qid_of, review_row, write_review
from elva.progress import Reporter

SOURCES = ("mscoco_task0", "mscoco_task3", "nights_task4", "cirr_task7")
"""The paper's; where a data directory has none of them, all of its sets are taken."""

PER_SET = 250
SPARE = 2
"""Ours: so many times the sample is judged, that the sample may be spread over grain types."""

BATCH = 32
"""Ours: queries judged before the log is written out."""

NOTES = "mrbench.json"


def sets_of(data: Path, split: str, sets: Sequence[str] | None) -> list[QuerySet]:
    """The named sets; the paper's where the data has them, else all."""
    if sets:
        return read_sets(data, tasks=sets, split=split)
    found = read_sets(data, split=split)
    return [s for s in found if s.stem in SOURCES] or found


def judge_set(
    one: QuerySet, asker: Asker, wanted: int, seed: int, log: Path, reporter: Reporter
) -> tuple[list[Judged], dict[str, int]]:
    """Queries of two or more grains, in an order drawn by the seed, until there are enough."""
    known = _answers(log)
    order = permutation((seed, "mrbench", one.stem), len(one.queries))
    rows: list[Judged] = []
    tally = Counter({"judged": 0, "without_words": 0, "one_grain": 0})
    reporter.start(f"judge {one.stem}", min(wanted, len(order)), "queries")
    with ThreadPoolExecutor(asker.judge.at_once) as pool, open(log, "a", encoding="utf-8") as file:
        for start in range(0, len(order), BATCH):
            chosen = [one.queries[i] for i in order[start : start + BATCH]]
            fresh = [q for q in chosen if q.id not in known]
            for query, answer in zip(fresh, pool.map(asker, fresh), strict=True):
                known[query.id] = answer
                file.write(json.dumps({"qid": query.id, **answer}, ensure_ascii=False) + "\n")
            file.flush()
            for query in chosen:
                tally["judged"] += 1
                words, found = known[query.id]["words"], known[query.id]["grains"]
                grains = tuple(Grain(g["text"], g["type"], tuple(g["span"])) for g in found)
                if words is None:
                    tally["without_words"] += 1
                elif len(grains) < 2:
                    tally["one_grain"] += 1
                else:
                    rows.append(Judged(one.stem, query, words, grains))
            reporter.advance(min(len(rows), wanted))
            if len(rows) >= wanted:
                break
    reporter.finish("")
    return rows[:wanted], dict(tally)


@dataclass(frozen=True)
class Asker:
    """What is asked of each query."""

    judge: Judge
    describe: Callable[[Query], str] | None
    faults: Faults

    def __call__(self, query: Query) -> dict[str, Any]:
        words, grains = None, []
        with self.faults.row():
            words = query.text or (self.describe or self.judge.describe)(query)
            grains = self.judge.grains(words) if words else []
        return {"words": words, "grains": [vars(g) for g in grains]}


def _answers(log: Path) -> dict[str, dict[str, Any]]:
    """What was judged before; a line torn by a kill is left out."""
    found = {}
    if log.exists():
        for _, line in lines(log, Faults(sys.maxsize)):
            try:
                row = json.loads(line)
                found[row["qid"]] = {"words": row["words"], "grains": row["grains"]}
            except (ValueError, KeyError, TypeError):
                continue
    return found


def stratified(rows: Sequence[Judged], wanted: int) -> list[Judged]:
    """Spread over the combinations of grain types as evenly as they allow."""
    strata: dict[str, list[Judged]] = {}
    for row in rows:
        strata.setdefault(row.kinds, []).append(row)
    chosen: list[Judged] = []
    while len(chosen) < wanted and any(strata.values()):
        for kinds in sorted(strata):
            if strata[kinds] and len(chosen) < wanted:
                chosen.append(strata[kinds].pop(0))
    return sorted(chosen, key=lambda r: r.query.id)


def write_data(
    partial: Path, data: Path, split: str, kept: Sequence[Judged], notes: Mapping[str, Any]
) -> None:
    """Query files, qrels and grains of the kept queries, links to the rest, and the review."""
    whole = partial / "mrbench_all"
    for stem in dict.fromkeys(row.stem for row in kept):
        asked = [row.query for row in kept if row.stem == stem]
        ids = {query.id for query in asked}
        source = Path(asked[0].where.rpartition(":")[0])  # its rows may be of other tasks too
        judged = qrels_file(data, stem, split)
        for path, copy in (
            (source, query_file(whole, stem, split)), (judged, qrels_file(whole, stem, split)),
        ):  # fmt: skip
            if path.exists():
                read = lines(path, Faults(sys.maxsize))  # its faults are known
                of_these = [line for _, line in read if qid_of(line) in ids]
                if of_these:
                    write_text(copy, "".join(f"{line}\n" for line in of_these))
    write_text(whole / "grains.jsonl", "".join(_grain_line(row) for row in kept))
    shutil.copytree(whole, partial, dirs_exist_ok=True)
    for name in LINKED:
        if (data / name).exists() and name != "grains.jsonl":
            (partial / name).symlink_to((data / name).absolute())
    write_text(partial / NOTES, json.dumps(notes, indent=1) + "\n")
    write_review(partial, (review_row(row, data) for row in kept))


def _grain_line(row: Judged) -> str:
    grains = [{"text": g.text, "type": g.type, "span": list(g.span)} for g in row.grains]
    # Words that the query itself does not hold are a description of its picture.
    described = {} if row.query.text == row.words else {"description": row.words}
    fields = {"qid": row.query.id, "grains": grains, **described}
    return json.dumps(fields, ensure_ascii=False) + "\n"
