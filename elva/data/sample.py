"""Drawn parts of the data: a share of queries, and pictures tried before they are needed."""

from collections.abc import Iterable
from typing import Literal

import numpy as np

from elva.data.pool import Pool
from elva.data.queries import Queries
from elva.data.schema import TASKS
from elva.draws import permutation
from elva.errors import DataError, UserError

Per = Literal["dataset", "task", "set"]
"""Of what a share is drawn: of each dataset (the number before the colon of a query's id), of each
task, or of both together: M-BEIR's sets, `webqa_task1`."""


def subset_rows(
    queries: Queries,
    share: float | None = None,
    per: Per = "dataset",
    seed: int = 0,
    *,
    count: int | None = None,
) -> np.ndarray:
    """[n] int64 places of drawn queries, ascending: of each group its share, at least one query.

    Args:
        share: Above 0, at most 1.
        count: So many of each group instead, or all where it has fewer.

    Raises:
        UserError: not one of `share` and `count`, or one out of its range.
    """
    if (share is None) == (count is None):
        raise UserError("subset: must be given one of share and count; give one")
    if share is not None and not 0 < share <= 1:
        raise UserError(f"subset: share must be above 0 and at most 1, got {share}; use 0.01")
    if count is not None and count < 1:
        raise UserError(f"subset: count must be at least 1, got {count}; use 100")
    groups = _groups(queries, per)
    chosen = [np.zeros(0, np.int64)]
    for group in np.unique(groups).tolist():
        rows = np.flatnonzero(groups == group)
        wanted = count if share is None else max(1, round(share * len(rows)))
        order = permutation((seed, "subset", per, group), len(rows))
        chosen.append(rows[order[:wanted]])
    return np.sort(np.concatenate(chosen))


def _groups(queries: Queries, per: Per) -> np.ndarray:
    groups = {
        "dataset": lambda: queries.datasets,
        "task": lambda: queries.column("task").astype(np.int64),
        "set": lambda: queries.datasets * (max(TASKS.values()) + 1) + queries.column("task"),
    }
    if per not in groups:
        raise UserError(f"subset: per must be one of {', '.join(groups)}, got {per!r}")
    found: np.ndarray = groups[per]()
    return found


def unreadable(parts: Iterable[Queries | Pool], count: int, seed: int) -> list[str]:
    """A line for each picture that cannot be read, of `count` drawn ones, decoded whole.

    Args:
        parts: Queries and pools; one that comes several times is one.
    """
    distinct = list({id(part): part for part in parts}.values())
    ends = np.cumsum([len(part.pictured) for part in distinct])
    total = int(ends[-1]) if len(ends) else 0
    found = []
    for place in permutation((seed, "unreadable"), total)[:count]:
        which = int(np.searchsorted(ends, place, side="right"))
        rows = distinct[which].pictured
        item = distinct[which][int(rows[place - int(ends[which])])]  # counted from the part's end
        try:
            item.load_image()
        except DataError as error:
            found.append(str(error))
    return found
