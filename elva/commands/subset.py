"""`elva data subset`: a drawn part of a data directory's queries, as a data directory.

Query files and qrels are cut; pools, instructions and pictures are links to the whole.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elva.data.layout import LINKED, SPLITS, qrels_file
from elva.data.mbeir import QuerySet, read_sets
from elva.data.queries import concatenate
from elva.data.sample import Per, subset_rows
from elva.data.schema import hashed_id
from elva.data.strict import columns, lines, write_lines
from elva.errors import UserError
from elva.files import write_directory

NOTES = "subset.json"


def subset(
    data: Path,
    output: Path,
    *,
    share: float | None = None,
    count: int | None = None,
    per: Per = "dataset",
    split: str | None = None,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, int]]:
    """Write a data directory of drawn queries.

    Args:
        output: an absent directory.
        share, count, per, seed: as `elva.data.sample.subset_rows` takes them.
        split: one, or all that are there for None.

    Returns:
        split -> set -> queries drawn.

    Raises:
        UserError, DataError: an argument, or the data.
    """
    if output.exists():
        raise UserError(f"{output}: must not exist yet; choose another --output")
    found: dict[str, dict[str, int]] = {}

    def fill(partial: Path) -> None:
        for s in [split] if split is not None else _splits(data):
            sets = read_sets(data, split=s, tasks=tasks)
            found[s] = _cut(data, partial, s, sets, subset_rows(
                concatenate([one.queries for one in sets]), share, per, seed, count=count
            ))  # fmt: skip
        for name in LINKED:
            if (data / name).exists():
                os.symlink((data / name).absolute(), partial / name)
        drawn = {"share": share, "count": count, "per": per, "seed": seed, "queries": found}
        notes: dict[str, Any] = {"data": str(data.absolute()), **drawn}
        (partial / NOTES).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")

    write_directory(output, fill)
    return found


def _splits(data: Path) -> list[str]:
    there = [s for s in SPLITS if any((data / "query" / f).is_dir() for f in (s, f"union_{s}"))]
    if not there:
        raise UserError(f"{data}: must have query/train, val or test; name a data directory")
    return there


def _cut(
    data: Path, partial: Path, split: str, sets: Sequence[QuerySet], rows: np.ndarray
) -> dict[str, int]:
    """Write the chosen lines of every file; set -> queries."""
    starts = np.cumsum([0, *(len(one.queries) for one in sets)])
    chosen: dict[Path, set[int]] = {}
    counts = {}
    for one, start in zip(sets, starts.tolist(), strict=False):
        inside = rows[(rows >= start) & (rows < start + len(one.queries))] - start
        some = one.queries.select(inside)
        if not len(some):
            continue
        counts[one.stem] = len(some)
        chosen.setdefault(one.path, set()).update(some.column("line").tolist())
        _cut_qrels(data, partial, one.stem, split, set(some.column("id").tolist()))
    for path, kept in chosen.items():
        numbered = enumerate((line for _, line in lines(path)), start=1)
        text = (line for number, line in numbered if number in kept)
        write_lines(partial / path.relative_to(data), text)
    return counts


def _cut_qrels(data: Path, partial: Path, stem: str, split: str, asked: set[int]) -> None:
    path = qrels_file(data, stem, split)
    if path.exists():
        text = (line for _, line in lines(path))
        kept = [line for line in text if (ids := columns(line)) and hashed_id(ids[0]) in asked]
        if kept:
            write_lines(qrels_file(partial, stem, split), kept)
