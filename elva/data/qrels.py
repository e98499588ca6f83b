"""Qrels as M-BEIR has them, and whether they agree with the query file."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from elva.data import table as tables
from elva.data.pool import Pool
from elva.data.schema import hashed_id
from elva.data.strict import Faults, columns, lines
from elva.errors import DataError


def _read(path: Path) -> dict[tuple[str, str], str]:
    """(query, candidate) -> `file:line`, of the lines with a relevance above zero."""
    relevant: dict[tuple[str, str], str] = {}
    for where, line in lines(path):
        fields = columns(line)
        if not fields:
            continue
        if len(fields) not in (4, 5):
            raise DataError(f"{where}: {len(fields)} columns, not qid 0 did relevance task_id")
        try:
            for id in (fields[0], fields[2]):
                hashed_id(id)
            relevance = int(fields[3])
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        if relevance > 0:
            relevant[fields[0], fields[2]] = where
    return relevant


def check(path: Path, kept: tables.Kept, pool: Pool, faults: Faults) -> None:
    """Every relevant pair of the qrels must be one of the queries' own, inside the pool or not."""
    relevant = _read(path)
    if not relevant:
        return
    qids, dids = (np.array([hashed_id(pair[i]) for pair in relevant]) for i in (0, 1))
    rows = tables.find(kept.order, qids)
    answers, owner = _answers(kept)
    every = np.unique(np.concatenate([answers, dids]))
    own = owner * len(every) + np.searchsorted(every, answers)
    asked = rows * len(every) + np.searchsorted(every, dids)
    wrong = np.flatnonzero((rows < 0) | ~np.isin(asked, own))
    held = pool.find(dids[wrong]) >= 0
    found = list(relevant.items())
    for place, is_held in zip(wrong.tolist(), held.tolist(), strict=True):
        (qid, did), where = found[place]
        with faults.row():
            if rows[place] < 0:
                if faults.found:  # it may be one of those that were left out
                    continue
                raise DataError(f"{where}: query {qid} is not in the query file")
            if not is_held:
                raise DataError(f"{where}: candidate {did} is not in the pool")
            raise DataError(f"{where}: {did} is not a positive of query {qid}")


def _answers(kept: tables.Kept) -> tuple[np.ndarray, np.ndarray]:
    """[n] hashed ids of all right answers, inside the pool and outside, and their rows."""
    ids, rows = [], []
    for name in ("positives", "outside"):
        column = kept.table[name]
        ids.append(pc.list_flatten(column).to_numpy())
        rows.append(np.repeat(np.arange(len(column)), pc.list_value_length(column).to_numpy()))
    return np.concatenate(ids), np.concatenate(rows)
