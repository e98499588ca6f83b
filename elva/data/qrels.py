"""Judgements: which candidates are right for a query. One rule, whichever file they stand in.

A relevance is a whole number; above 0 is right, and 0 and less is judged and wrong. A pair may be
judged twice alike, not twice otherwise. Judgements of which none is right measure nothing.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from elva.data import table as tables
from elva.data.pool import Pool
from elva.data.schema import hashed_id
from elva.data.strict import Faults, columns, lines
from elva.errors import DataError

BEIR = ("query-id", "corpus-id", "score")
"""The columns of BEIR's and MTEB's qrels."""


class _Judgement(NamedTuple):
    """A relevance, and the `file:line` that says it."""

    relevance: int
    where: str

    @property
    def is_right(self) -> bool:
        return self.relevance > 0


Judgements = Mapping[str, Mapping[str, _Judgement]]
"""Query -> candidate -> judgement."""


def read(path: Path, faults: Faults | None = None) -> dict[str, dict[str, _Judgement]]:
    """Qrels of four columns (TREC's), five (M-BEIR's), or three under BEIR's header.

    Raises:
        DataError: a line that is no judgement, as `file:line: rule`; see `collect`.
    """
    faults = faults or Faults()
    return collect(path, _rows(path, faults), faults)


def collect(
    path: Path, rows: Iterable[tuple[str, str, str, object]], faults: Faults
) -> dict[str, dict[str, _Judgement]]:
    """The judgements of (`file:line`, query, candidate, relevance), in their order.

    Args:
        path: What they are read from, for errors that are of no line.
        rows: Relevance as a number or as a file spells one.

    Raises:
        DataError: no whole number, a pair judged otherwise before; none at all, or none right.
    """
    found: dict[str, dict[str, _Judgement]] = {}
    any_right = False
    for where, qid, did, value in rows:
        with faults.row():
            one = _Judgement(_relevance(where, value), where)
            known = found.setdefault(qid, {}).setdefault(did, one)
            if known.relevance != one.relevance:
                raise DataError(
                    f"{where}: candidate {did} was judged otherwise before, at {known.where}"
                )
            any_right = any_right or one.is_right
    if not found:
        raise DataError(f"{path}: holds no judgements")
    if not any_right:
        raise DataError(f"{path}: judges no candidate right: no relevance is above 0")
    return found


def _relevance(where: str, value: object) -> int:
    """`2`, `-1`, `1.0`: parquet's columns of numbers are often floats."""
    is_number = isinstance(value, str | int | float) and not isinstance(value, bool)
    if not (is_number and re.fullmatch(r"[+-]?[0-9]{1,9}(\.0*)?", str(value))):
        raise DataError(f"{where}: relevance {str(value)[:80]!r} is no whole number")
    return int(str(value).partition(".")[0])


def _rows(path: Path, faults: Faults) -> Iterator[tuple[str, str, str, str]]:
    widths: tuple[int, ...] = (4, 5)
    first = True
    for where, line in lines(path, faults):
        fields = columns(line)
        if not fields:
            continue
        if first and [field.casefold() for field in fields] == list(BEIR):
            widths, first = (3,), False
            continue
        first = False
        with faults.row():
            if len(fields) not in widths:
                forms = "qid 0 did relevance [task], nor BEIR's under query-id corpus-id score"
                raise DataError(f"{where}: {len(fields)} columns, not {forms}")
            qid, did, value = fields if widths == (3,) else (fields[0], *fields[2:4])
            yield where, qid, did, value


def check(path: Path, kept: tables.Kept, pool: Pool, faults: Faults) -> None:
    """Every right pair of the qrels must be one of the queries' own, inside the pool or not."""
    judged: Judgements = {}
    with faults.row():
        judged = read(path, faults)
    found = [
        (qid, did, one.where)
        for qid, answers in judged.items()
        for did, one in answers.items()
        if one.is_right and _is_named(qid, did, one.where, faults)
    ]
    if not found:
        return
    qids, dids = (np.array([hashed_id(pair[i]) for pair in found]) for i in (0, 1))
    rows = tables.find(kept.order, qids)
    answers, owner = _answers(kept)
    every = np.unique(np.concatenate([answers, dids]))
    own = owner * len(every) + np.searchsorted(every, answers)
    asked = rows * len(every) + np.searchsorted(every, dids)
    wrong = np.flatnonzero((rows < 0) | ~np.isin(asked, own))
    held = pool.find(dids[wrong]) >= 0
    for place, is_held in zip(wrong.tolist(), held.tolist(), strict=True):
        qid, did, where = found[place]
        with faults.row():
            if rows[place] < 0:
                if faults.found:  # it may be one of those that were left out
                    continue
                raise DataError(f"{where}: query {qid} is not in the query file")
            if not is_held:
                raise DataError(f"{where}: candidate {did} is not in the pool")
            raise DataError(f"{where}: {did} is not a positive of query {qid}")


def _is_named(qid: str, did: str, where: str, faults: Faults) -> bool:
    """Whether both are ids of M-BEIR's form."""
    named = False
    with faults.row():
        try:
            named = hashed_id(qid) >= 0 and hashed_id(did) >= 0
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
    return named


def _answers(kept: tables.Kept) -> tuple[np.ndarray, np.ndarray]:
    """[n] hashed ids of all right answers, inside the pool and outside, and their rows."""
    ids, rows = [], []
    for name in ("positives", "outside"):
        column = kept.table[name]
        ids.append(pc.list_flatten(column).to_numpy())
        rows.append(np.repeat(np.arange(len(column)), pc.list_value_length(column).to_numpy()))
    return np.concatenate(ids), np.concatenate(rows)
