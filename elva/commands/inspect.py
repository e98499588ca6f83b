"""`elva data check`, `stats` and `sample`: what a data directory holds, and what is wrong."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from elva.data import Query
from elva.data.mbeir import SPLITS, QuerySet, read_sets
from elva.data.strict import Faults
from elva.draws import permutation
from elva.errors import DataError
from elva.progress import SILENT, Reporter
from elva.report import pictures

EVERY = 1_000_000_000
"""More bad rows than a file has."""


def check(
    root: Path,
    *,
    split: str | None = None,
    tasks: Sequence[str] | None = None,
    decode: bool = False,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Read everything and list what is wrong, instead of stopping at the first.

    Args:
        split: one, or all that are there for None.
        decode: open every picture, not only its header; slow and thorough.

    Returns:
        `bad`: one line a bad row (`file:line: rule`); `missing_pictures` among them; `copies`:
        candidates whose content an earlier one has; and `sets`, as `stats` gives them.

    Raises:
        DataError: no data there at all.
    """
    faults = Faults(EVERY)
    sets = _sets(root, split, tasks, faults)
    before = len(faults.found)
    total = sum(len(one.queries) + len(one.pool) for _, one in sets)
    reporter.start(f"check {root}", total, "items")
    known: set[tuple[str, str]] = set()  # a pool is often that of several sets
    seen: dict[bytes, str] = {}
    copies = 0
    items = chain.from_iterable(chain(one.queries, one.pool) for _, one in sets)
    for done, item in enumerate(items, start=1):
        if (item.id, item.modality) in known:
            continue
        known.add((item.id, item.modality))
        with faults.row():
            if item.image is not None:
                item.load_image() if decode else item.image_format()
            if not isinstance(item, Query):
                first = seen.setdefault(item.content_hash(), item.id)
                copies += first != item.id
        if done % 256 == 0:
            reporter.advance(done)
    reporter.finish("")
    return {
        "bad": faults.found,
        "missing_pictures": sum("no such picture" in line for line in faults.found[before:]),
        "copies": copies,
        "sets": {f"{s} {one.stem}": _row(one) for s, one in sets},
    }


def stats(
    root: Path, *, split: str | None = None, tasks: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Counts of each query file: queries, pool, answers and negatives a query, words, grains."""
    return {f"{s} {one.stem}": _row(one) for s, one in _sets(root, split, tasks, Faults())}


def sample(
    root: Path,
    output: Path,
    *,
    split: str = "test",
    task: str | None = None,
    count: int = 12,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Draw queries with their first answer, and a contact sheet of their pictures.

    Args:
        output: the sheet, a .png.
    """
    sets = read_sets(root, split=split, tasks=None if task is None else [task])
    every = [(one, query) for one in sets for query in one.queries]
    order = permutation((seed, "sample"), len(every))[:count]
    rows, tiles = [], []
    for place in order:
        one, query = every[place]
        answer = one.pool[one.pool.row(query.positives[0])]
        rows.append(
            {
                "set": one.stem, "id": query.id, "query": query.prompted,
                "image": None if query.image is None else str(query.image),
                "answer": answer.text or str(answer.image), "answer_id": answer.id,
            }
        )  # fmt: skip
        for item, words in ((query, f"asks: {query.prompted}"), (answer, f"for: {query.prompted}")):
            if item.image is not None:
                tiles.append((pictures.small(item), item.id, words))
    footer = pictures.attribution(row["answer_id"] for row in rows)
    pictures.sheet(output, f"{root.name}, {split}", tiles, footer)
    return rows


def _sets(
    root: Path, split: str | None, tasks: Sequence[str] | None, faults: Faults
) -> list[tuple[str, QuerySet]]:
    wanted = [split] if split is not None else [s for s in SPLITS if (root / "query" / s).is_dir()]
    if not wanted:
        raise DataError(f"{root}: no query/train, query/val or query/test; not in M-BEIR's layout")
    return [(s, one) for s in wanted
            for one in read_sets(root, split=s, tasks=tasks, faults=faults)]  # fmt: skip


def _row(one: QuerySet) -> dict[str, Any]:
    queries = one.queries
    words = [len(q.text.split()) for q in queries if q.text]
    return {
        "task": one.task,
        "queries": len(queries),
        "pool": len(one.pool),
        "pool_modality": one.pool[0].modality if len(one.pool) else None,
        "answers": fmean(len(q.positives) for q in queries) if queries else 0.0,
        "negatives": fmean(len(q.negatives) for q in queries) if queries else 0.0,
        "words": fmean(words) if words else 0.0,
    }
