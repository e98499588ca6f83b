"""`elva mrbench`: queries of two and more grains, judged, sampled, and reviewed by hand.

Liu et al., ELVA, arXiv:2606.20280, sec. 4: 1 k queries out of M-BEIR (COCO t->i, COCO i->t,
NIGHTS, CIRR), picked by a judge and checked by hand. Their list is not public: what this builds is
a rebuilt MRBench, whose figures are not to be set beside the paper's as if equal.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elva.checkpoint import write_directory
from elva.commands.mine import LINKED
from elva.data import DataError, Grain, Query
from elva.data.mbeir import QuerySet, query_file, read_sets
from elva.data.strict import Faults, lines
from elva.errors import UserError
from elva.files import write_text
from elva.model.rollout import uniforms
from elva.mrbench.judges import Judge
from elva.progress import Reporter
from elva.report.pictures import attribution
from elva.report.render import render

SOURCES = ("mscoco_task0", "mscoco_task3", "nights_task4", "cirr_task7")
"""The paper's; where a data directory has none of them, all of its sets are taken."""

PER_SET = 250
SPARE = 2
"""Ours: so many times the sample is judged, that the sample may be spread over grain types."""

BATCH = 32
"""Ours: queries judged before the log is written out."""

JUDGED, REVIEW, PAGE, NOTES = "judged.jsonl", "review.tsv", "review.html", "mrbench.json"
DECISIONS = ("keep", "drop", "")


@dataclass(frozen=True)
class Judged:
    """A query, the words that were judged, and its grains."""

    stem: str
    query: Query
    words: str
    grains: tuple[Grain, ...]

    @property
    def kinds(self) -> str:
        return " + ".join(sorted({g.type for g in self.grains}))


def build(
    data: Path,
    output: Path,
    judge: Judge,
    *,
    split: str = "test",
    sets: Sequence[str] | None = None,
    per_set: int = PER_SET,
    seed: int = 0,
    resume: bool = False,
    skip_bad: int = 0,
    describe: Callable[[Query], str] | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Judge, sample, and write a data directory in M-BEIR's layout with a review beside it.

    Args:
        output: gets query files, qrels, `grains.jsonl`, links to the pools and pictures,
            `judged.jsonl` (every answer of the judge, so that a killed run goes on with
            `resume`), `review.tsv` and `review.html`.
        sets: which; the paper's four where the data has them, else all.
        per_set: queries to keep of each set.
        describe: words for a query that is a picture; the judge's own for None.

    Returns:
        Counts of each set: judged, without words, of one grain, kept; and grains by type.
    """
    if per_set < 1:
        raise UserError(f"mrbench: per_set must be at least 1, got {per_set}; ask for {PER_SET}")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: must not exist yet; choose another --output")
    found = _sets(data, split, sets)
    log = output.with_name(output.name + f".{JUDGED}")
    if log.exists() and not resume:
        raise UserError(f"{log}: is of a run that was not finished; pass --resume or delete it")
    counts: dict[str, Any] = {}
    kept: list[Judged] = []
    faults = Faults(skip_bad)
    asker = _Asker(judge, describe, faults)
    for one in found:
        rows, tally = _judge(one, asker, per_set * SPARE, seed, log, reporter)
        sample = _stratified(rows, per_set, seed)
        counts[one.stem] = {**tally, "kept": len(sample)}
        kept += sample
    if not kept:
        raise UserError(
            f"mrbench: {data} must have queries of two or more grains, got none by judge "
            f"{judge.name}; try another judge"
        )
    notes = {
        "rebuilt": "not the paper's own list, which is not public",
        "judge": judge.name, "seed": seed, "split": split, "sets": counts,
        "types": dict(Counter(g.type for row in kept for g in row.grains)),
        "bad": faults.found,
    }  # fmt: skip

    def fill(partial: Path) -> None:
        _write_data(partial, data, split, kept, notes)
        if log.exists():
            shutil.copyfile(log, partial / JUDGED)

    if output.exists():
        output.rmdir()
    write_directory(output, fill)
    log.unlink(missing_ok=True)
    return notes


def review(directory: Path, decisions: Path | None = None) -> dict[str, int]:
    """Take decisions, and write the review again.

    Args:
        decisions: a `review.tsv` as the page saves it or a person edits it (`keep`, `drop` or
            nothing in its first column); the directory's own for None. Dropped queries leave the
            query files, qrels and grains; they come back if a later review keeps them.

    Returns:
        How many are kept, dropped and undecided.

    Raises:
        UserError, DataError: no mrbench directory, a row that is none, an unknown query.
    """
    source = directory / "mrbench_all"
    if not source.is_dir():
        raise UserError(f"{directory}: must be what elva mrbench build wrote; build one")
    rows = _read_review(directory / REVIEW)
    if decisions is not None:
        taken = _read_review(decisions)
        unknown = next((q for q in taken if q not in rows), None)
        if unknown is not None:
            raise DataError(f"{decisions}: query {unknown} is not in {directory / REVIEW}")
        rows = {q: [taken[q][0] if q in taken else row[0], *row[1:]] for q, row in rows.items()}
    dropped = {q for q, row in rows.items() if row[0] == "drop"}
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        kept = [line for line in path.read_text("utf-8").splitlines(keepends=True)
                if _qid(line) not in dropped]  # fmt: skip
        write_text(directory / path.relative_to(source), "".join(kept))
    _write_review(directory, rows.values())
    tally = Counter(row[0] or "undecided" for row in rows.values())
    return {name: tally[name] for name in ("keep", "drop", "undecided")}


# -- judging ---------------------------------------------------------------------------------------


def _sets(data: Path, split: str, sets: Sequence[str] | None) -> list[QuerySet]:
    if sets:
        return read_sets(data, tasks=sets, split=split)
    found = read_sets(data, split=split)
    return [s for s in found if s.stem in SOURCES] or found


def _judge(
    one: QuerySet,
    asker: _Asker,
    wanted: int,
    seed: int,
    log: Path,
    reporter: Reporter | None,
) -> tuple[list[Judged], dict[str, int]]:
    """Queries of two or more grains, in an order drawn by the seed, until there are enough."""
    known = _answers(log)
    order = uniforms((seed, "mrbench", one.stem), (len(one.queries),)).argsort().tolist()
    rows: list[Judged] = []
    tally = Counter({"judged": 0, "without_words": 0, "one_grain": 0})
    if reporter is not None:
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
            if reporter is not None:
                reporter.advance(min(len(rows), wanted))
            if len(rows) >= wanted:
                break
    if reporter is not None:
        reporter.finish("")
    return rows[:wanted], dict(tally)


@dataclass(frozen=True)
class _Asker:
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
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                found[row["qid"]] = {"words": row["words"], "grains": row["grains"]}
            except (ValueError, KeyError, TypeError):
                continue
    return found


def _stratified(rows: Sequence[Judged], wanted: int, seed: int) -> list[Judged]:
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


# -- files -----------------------------------------------------------------------------------------


def _write_data(
    partial: Path, data: Path, split: str, kept: Sequence[Judged], notes: Mapping[str, Any]
) -> None:
    whole = partial / "mrbench_all"
    for stem in dict.fromkeys(row.stem for row in kept):
        ids = {row.query.id for row in kept if row.stem == stem}
        qrels = Path("qrels") / split / f"mbeir_{stem}_{split}_qrels.txt"
        for path in (query_file(data, stem, split), data / qrels):
            if path.exists():
                text = "".join(line for _, line in lines(path) if _qid(line) in ids)
                write_text(whole / path.relative_to(data), text)
    write_text(whole / "grains.jsonl", "".join(_grain_line(row) for row in kept))
    shutil.copytree(whole, partial, dirs_exist_ok=True)
    for name in LINKED:
        if (data / name).exists() and name != "grains.jsonl":
            (partial / name).symlink_to((data / name).absolute())
    write_text(partial / NOTES, json.dumps(notes, indent=1) + "\n")
    _write_review(partial, (_review_row(row, data) for row in kept))


def _grain_line(row: Judged) -> str:
    grains = [{"text": g.text, "type": g.type, "span": list(g.span)} for g in row.grains]
    # Words that the query itself does not hold are a description of its picture.
    described = {} if row.query.text == row.words else {"description": row.words}
    fields = {"qid": row.query.id, "grains": grains, **described}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _qid(line: str) -> str:
    """The query that a line of a query file, grains or qrels belongs to."""
    if line.startswith("{"):
        return str(json.loads(line).get("qid"))
    return line.split(maxsplit=1)[0] if line.strip() else ""


def _review_row(row: Judged, data: Path) -> list[str]:
    grains = "; ".join(f"{g.text} ({g.type})" for g in row.grains)
    image = row.query.image.relative_to(data) if isinstance(row.query.image, Path) else ""
    return ["", row.query.id, row.stem, row.words, grains, str(image)]


def _write_review(directory: Path, rows: Iterable[Sequence[str]]) -> None:
    listed = [[" ".join(cell.split()) for cell in row] for row in rows]
    header = ["decision", "qid", "set", "words", "grains", "image"]
    text = "\n".join("\t".join(row) for row in [header, *listed]) + "\n"
    write_text(directory / REVIEW, text)
    title = f"MRBench, rebuilt: {directory.name.removesuffix('.partial')}"
    credit = attribution(row[1] for row in listed) or ""
    page = render("review.html.j2", title=title, rows=listed, credit=credit)
    write_text(directory / PAGE, page)


def _read_review(path: Path) -> dict[str, list[str]]:
    """qid -> the row, decision first."""
    rows: dict[str, list[str]] = {}
    for number, (where, line) in enumerate(lines(path)):
        cells = line.rstrip("\r\n").split("\t")
        if number == 0:
            continue
        if len(cells) < 2 or cells[0].strip() not in DECISIONS:
            raise DataError(f"{where}: must start with keep, drop or nothing, then a qid")
        rows[cells[1]] = [cells[0].strip(), *cells[1:]]
    return rows
