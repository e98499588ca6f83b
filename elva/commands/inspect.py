"""`elva data check`, `stats` and `sample`: what a data directory holds, and what is wrong."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from elva.data import Item, Pool, Queries
from elva.data.identity import DECODERS
from elva.data.layout import SPLITS, QueryFile, find, pool_files
from elva.data.mbeir import QuerySet, read_sets
from elva.data.pool import concatenate
from elva.data.strict import Faults
from elva.draws import permutation
from elva.errors import DataError, counted
from elva.progress import SILENT, Reporter
from elva.report import pictures

_EVERY = 1_000_000_000
"""More bad rows than a file has."""

AT_ONCE = 1024
"""Ours: pictures opened between two looks at the bar."""


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
        `bad`: one line a bad row (`file:line: rule`) or query file without a pool;
        `missing_pictures` among them; `copies`: candidates whose content an earlier one has,
        pictures compared where they are decoded; `missing_folders` of pictures; `notices`; and
        `sets`, as `stats` gives them.

    Raises:
        DataError: no data there at all.
    """
    faults = Faults(_EVERY)
    sets = _whole(root, split, tasks) or _sets(root, split, tasks, faults)
    faults.found.sort(key=_place)
    before = len(faults.found)
    parts = {id(part): part for _, one in sets for part in (one.queries, one.pool)}.values()
    reporter.start(f"check {root}", sum(len(part.pictured) for part in parts), "pictures")
    unreadable = set(_pictures(list(parts), decode, faults, reporter))
    reporter.finish("")
    pools = [part for part in parts if isinstance(part, Pool)]
    return {
        "bad": faults.found,
        "missing_pictures": sum("no such picture" in line for line in faults.found[before:]),
        "copies": _copies(pools, decode, unreadable),
        "missing_folders": _missing_folders(root, list(parts)),
        "notices": [line for _, one in sets for line in one.notices],
        "sets": {f"{s} {one.stem}": _row(one) for s, one in sets},
    }


def stats(
    root: Path, *, split: str | None = None, tasks: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Counts of each query file: queries, pool, answers and negatives a query, words, notices."""
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
    answered = [np.flatnonzero(one.queries.listed("positives")) for one in sets]
    ends = np.cumsum([len(rows) for rows in answered])
    rows, tiles = [], []
    for place in permutation((seed, "sample"), int(ends[-1]))[:count]:
        which = int(np.searchsorted(ends, place, side="right"))
        one = sets[which]
        query = one.queries[int(answered[which][place - int(ends[which])])]
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


def write_sheet(root: Path, split: str, output: Path, title: str) -> None:
    """Draw a contact sheet of a data directory's candidates, each under what the data calls it:
    all of them, or as many as a sheet holds, spread over their order.

    Args:
        output: the sheet, a .png.
    """
    pools = {one.pool_name: one.pool for one in read_sets(root, split=split)}
    places = [(pool, int(row)) for pool in pools.values() for row in pool.pictured]
    if not places:
        raise DataError(f"{root}: holds no candidates with pictures, of which a sheet could be")
    count = min(len(places), pictures.SHEET_TILES)
    chosen = [places[i * len(places) // count] for i in range(count)]
    named = pictures.names(root)
    tiles = []
    for pool, row in chosen:
        item = pool[row]
        name = pool.extra(row).get("file") or named.get(item.id) or item.text or item.id
        tiles.append((pictures.small(item), "", str(name)))
    shown = "" if count == len(places) else f"{count} of "
    footer = pictures.attribution(pool[row].id for pool, row in chosen)
    pictures.sheet(output, f"{title}: {shown}{counted(len(places), 'picture')}", tiles, footer)


def splits(root: Path, split: str | None) -> list[str]:
    """The named split, or those that a data directory has; DataError where it has none."""
    if split is not None:
        return [split]
    query = root / "query"
    found = [s for s in SPLITS if (query / s).is_dir() or (query / f"union_{s}").is_dir()]
    if not found:
        raise DataError(f"{root}: no query/train, query/val or query/test; not in M-BEIR's layout")
    return found


def _whole(
    root: Path, split: str | None, tasks: Sequence[str] | None
) -> list[tuple[str, QuerySet]] | None:
    """The sets of data without a fault, mapped; None of other data."""
    try:
        return _sets(root, split, tasks, Faults())
    except DataError:
        return None


def _sets(
    root: Path, split: str | None, tasks: Sequence[str] | None, faults: Faults
) -> list[tuple[str, QuerySet]]:
    found = []
    for s in splits(root, split):
        files = list(_with_pools(root, s, faults))
        sets = read_sets(root, split=s, tasks=tasks, files=files, faults=faults) if files else []
        found += [(s, one) for one in sets]
    return found


def _with_pools(root: Path, split: str, faults: Faults) -> Iterator[QueryFile]:
    for file in find(root, split)[0]:
        with faults.row():
            pool_files(root, file, split)
            yield file


def _pictures(
    parts: Sequence[Queries | Pool], decode: bool, faults: Faults, reporter: Reporter
) -> Iterator[str]:
    """The ids of the items whose picture cannot be read; each item is opened once."""

    def opened(item: Item) -> DataError | None:
        try:
            item.load_image() if decode else item.image_format()
        except DataError as error:
            return error
        return None

    known: set[int] = set()  # a candidate often lies in several pools
    done = 0
    with ThreadPoolExecutor(DECODERS) as pool:
        for part in parts:
            for start in range(0, len(part.pictured), AT_ONCE):
                rows = part.pictured[start : start + AT_ONCE].tolist()
                items = [part[row] for row in rows]
                fresh = [i for i in items if hash((i.id, i.image)) not in known]
                known.update(hash((i.id, i.image)) for i in fresh)
                for item, error in zip(fresh, pool.map(opened, fresh), strict=True):
                    if error is not None:
                        yield item.id
                        with faults.row():
                            raise error
                done += len(rows)
                reporter.advance(done)


def _place(line: str) -> tuple[str, int]:
    """The file and line that a fault begins with."""
    found = re.match(r"(.*?):(\d+): ", line)
    return (found[1], int(found[2])) if found else (line, 0)


def _copies(pools: Sequence[Pool], decode: bool, unreadable: set[str]) -> int:
    """Candidates whose content an earlier one has; of those with pictures only if decoded."""
    if not pools:
        return 0
    whole = concatenate(pools)
    rows = np.arange(len(whole))
    if not decode:
        rows = np.setdiff1d(rows, whole.pictured)
    bad = [whole.row(id) for id in unreadable if id in whole] if decode else []
    numbers = whole.identities(np.setdiff1d(rows, bad))
    return len(numbers) - len(np.unique(numbers))


def _missing_folders(root: Path, parts: Sequence[Queries | Pool]) -> list[str]:
    """A line for each folder of pictures that the data name and the tree has not."""
    lines = []
    counts: dict[str, int] = {}
    for part in {id(part.table): part for part in parts}.values():
        named = pc.drop_null(part.table["image"])
        folders = pc.replace_substring_regex(named, "^([^/]*/[^/]*)/.*$", r"\1")
        for found in pc.value_counts(folders).to_pylist():
            counts[found["values"]] = counts.get(found["values"], 0) + found["counts"]
    for folder, count in sorted(counts.items()):
        if "/" in folder and not (root / folder).exists():
            lines.append(f"{folder}: not there, {count:,} pictures lie in it")
    return lines


def _row(one: QuerySet) -> dict[str, Any]:
    queries = one.queries
    split = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(queries.table["text"]))
    kinds = pc.unique(one.pool.table["modality"]).to_pylist()
    words = pc.list_value_length(split).to_numpy()[queries.rows]
    return {
        "task": one.task,
        "queries": len(queries),
        "pool": len(one.pool),
        "pool_modality": (kinds[0] if len(kinds) == 1 else "several") if kinds else None,
        "answers": _mean(queries.listed("positives")),
        "outside": _mean(queries.listed("outside")),
        "negatives": _mean(queries.listed("negatives")),
        "words": _mean(words[~np.isnan(words)]),
        "notices": list(one.notices),
    }


def _mean(counts: np.ndarray) -> float:
    return float(counts.mean()) if len(counts) else 0.0
