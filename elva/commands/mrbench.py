"""`elva mrbench`: queries of two and more grains, judged, sampled, and reviewed by hand.

Liu et al., ELVA, arXiv:2606.20280, sec. 4: 1 k queries out of M-BEIR (COCO t->i, COCO i->t,
NIGHTS, CIRR), picked by a judge and checked by hand. Their list is not public: what this builds is
a rebuilt MRBench, whose figures are not to be set beside the paper's as if equal.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elva.data import Query
from elva.data.strict import Faults, lines
from elva.errors import DataError, UserError
from elva.files import write_directory, write_text
from elva.mrbench.build import PER_SET, SPARE, Asker, judge_set, sets_of, stratified, write_data
from elva.mrbench.judges import Judge
from elva.mrbench.review import JUDGED, REVIEW, Judged, qid_of, read_review, write_review
from elva.progress import SILENT, Reporter


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
    reporter: Reporter = SILENT,
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
    found = sets_of(data, split, sets)
    log = output.with_name(output.name + f".{JUDGED}")
    if log.exists() and not resume:
        raise UserError(f"{log}: is of a run that was not finished; pass --resume or delete it")
    counts: dict[str, Any] = {}
    kept: list[Judged] = []
    faults = Faults(skip_bad)
    asker = Asker(judge, describe, faults)
    for one in found:
        rows, tally = judge_set(one, asker, per_set * SPARE, seed, log, reporter)
        sample = stratified(rows, per_set)
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
        write_data(partial, data, split, kept, notes)
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
    rows = read_review(directory / REVIEW)
    if decisions is not None:
        taken = read_review(decisions)
        unknown = next((q for q in taken if q not in rows), None)
        if unknown is not None:
            raise DataError(f"{decisions}: query {unknown} is not in {directory / REVIEW}")
        rows = {q: [taken[q][0] if q in taken else row[0], *row[1:]] for q, row in rows.items()}
    dropped = {q for q, row in rows.items() if row[0] == "drop"}
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        kept = [line for _, line in lines(path) if qid_of(line) not in dropped]
        write_text(directory / path.relative_to(source), "".join(f"{line}\n" for line in kept))
    write_review(directory, rows.values())
    tally = Counter(row[0] or "undecided" for row in rows.values())
    return {name: tally[name] for name in ("keep", "drop", "undecided")}
