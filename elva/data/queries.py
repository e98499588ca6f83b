"""The queries of a split as a mapped table: a sequence of `Query` that holds none of them.

A file's answers are split by the pool that is searched: those inside can be found, those outside
are only judged. M-BEIR's OVEN and InfoSeek name each other's candidates.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elva.data import table as tables
from elva.data.schema import (
    DOCUMENTS_PER_DATASET,
    TASK_NAMES,
    TASKS,
    Grain,
    Query,
    id_of,
    modalities,
    normalise,
)
from elva.data.strict import Faults
from elva.errors import DataError

if TYPE_CHECKING:
    from elva.data.pool import Pool

SISTERS = ((5, 6), (6, 5))
"""OVEN and InfoSeek: (dataset of a query, dataset of answers that may lie outside its pool)."""

READ_ROWS = 1024
"""Ours: queries made at a time where all are gone through."""

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("text", pa.string()),
        ("image", pa.string()),
        ("instruction", pa.dictionary(pa.int32(), pa.string())),
        ("task", pa.int8()),
        ("positives", pa.list_(pa.int64())),
        ("outside", pa.list_(pa.int64())),
        ("negatives", pa.list_(pa.int64())),
        ("dropped", pa.int32()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("line", pa.int32()),
    ]
)
"""Ids are hashed; `text` is raw; `dropped` counts the negatives that the pool does not hold."""

KIND = tables.Kind("queries", "qid", SCHEMA, lambda table: table["id"].to_numpy())


class Row(NamedTuple):
    """A query as its file has it; `instruction` counts over all that the data directory has."""

    id: int
    text: str | None
    image: str | None
    instruction: int
    task: int
    positives: list[int]
    negatives: list[int]
    line: int


class Queries(Sequence[Query]):
    """Queries in order, made when they are asked for.

    Args:
        table: Columns of `SCHEMA`.
        root: Where the pictures' paths start.
        rows: [n] int64 rows of the table; all by default.
        grains: Query id -> grains of its text.
    """

    def __init__(
        self,
        table: pa.Table,
        root: Path,
        rows: np.ndarray | None = None,
        grains: Mapping[str, tuple[Grain, ...]] | None = None,
    ) -> None:
        self.table, self.root, self.grains = table, root, grains or {}
        self.rows = np.arange(table.num_rows) if rows is None else rows
        self._cells = tables.Cells(table)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Query: ...
    @overload
    def __getitem__(self, at: slice) -> "Queries": ...
    def __getitem__(self, at: int | slice) -> "Query | Queries":
        if isinstance(at, slice):
            return self.select(np.arange(len(self))[at])
        return self._query(next(self._cells(self.rows[[at]])))

    def __iter__(self) -> Iterator[Query]:
        for start in range(0, len(self), READ_ROWS):
            yield from map(self._query, self._cells(self.rows[start : start + READ_ROWS]))

    def select(self, rows: Sequence[int] | np.ndarray) -> "Queries":
        """These of the queries, in this order."""
        return Queries(self.table, self.root, self.rows[np.asarray(rows, np.int64)], self.grains)

    def with_grains(self, grains: Mapping[str, tuple[Grain, ...]]) -> "Queries":
        """The same queries with grains, by query id."""
        return Queries(self.table, self.root, self.rows, grains)

    def distinct(self) -> "Queries":
        """The first query of each id; M-BEIR's union has those of small sets several times."""
        first = np.sort(np.unique(self.column("id"), return_index=True)[1])
        return self if len(first) == len(self) else self.select(first)

    @property
    def ids(self) -> list[str]:
        """The id of each query."""
        return [id_of(hashed) for hashed in self.column("id").tolist()]

    @property
    def texts(self) -> list[str | None]:
        """The normalised text of each query."""
        raw = self.table["text"].to_pylist()
        return [normalise(raw[row] or "") or None for row in self.rows.tolist()]

    def tasks(self) -> dict[str, int]:
        """Task -> how many queries, in order of first appearance."""
        numbers, first, counts = np.unique(
            self.column("task"), return_index=True, return_counts=True
        )
        order = np.lexsort((first,))
        return {TASK_NAMES[int(numbers[i])]: int(counts[i]) for i in order}

    def rows_of(self, task: str) -> np.ndarray:
        """[n] int64 places of a task's queries, ascending."""
        return np.flatnonzero(self.column("task") == TASKS[task])

    @property
    def datasets(self) -> np.ndarray:
        """[n] int64: each query's dataset, the number before the colon of its id."""
        found: np.ndarray = self.column("id") // DOCUMENTS_PER_DATASET
        return found

    @cached_property
    def pictured(self) -> np.ndarray:
        """[n] int64 places of the queries that have a picture."""
        return np.flatnonzero(self.table["image"].is_valid().to_numpy()[self.rows])

    def column(self, name: str) -> np.ndarray:
        """A column of numbers."""
        found: np.ndarray = self.table[name].to_numpy()[self.rows]
        return found

    def listed(self, name: str) -> np.ndarray:
        """[n] int64: the length of each query's list."""
        found: np.ndarray = pc.list_value_length(self.table[name]).to_numpy()[self.rows]
        return found

    def _query(self, row: dict[str, Any]) -> Query:
        id, task, raw = id_of(row["id"]), TASK_NAMES[row["task"]], row["text"]
        return Query(
            id,
            normalise(raw or "") or None,
            None if row["image"] is None else self.root / row["image"],
            modalities(task)[0],
            instruction=row["instruction"],
            task=task,
            positives=tuple(map(id_of, row["positives"])),
            negatives=tuple(map(id_of, row["negatives"])),
            outside=tuple(map(id_of, row["outside"])),
            grains=self.grains.get(id),
            raw_text=raw,
            where=f"{row['source']}:{row['line']}",
        )


def concatenate(several: Sequence[Queries]) -> Queries:
    """One sequence out of several that share a root; tables are not copied."""
    tables_ = [one.table for one in several]
    starts = np.cumsum([0, *(len(table) for table in tables_)])
    rows = [start + one.rows for start, one in zip(starts, several, strict=False)]
    return Queries(pa.concat_tables(tables_), several[0].root, np.concatenate(rows))


def batches(
    rows: Iterable[Row],
    source: Path,
    instructions: Sequence[str],
    pool_of: Callable[[str], "Pool"],
    known: Sequence[int],
    faults: Faults,
) -> Iterator[pa.RecordBatch]:
    """Record batches of a file's rows, their answers split by the pool that is searched.

    Args:
        pool_of: Task -> the pool that its queries are asked of.
        known: Datasets that have a pool somewhere in the tree.

    Raises:
        DataError: an id that neither the pool holds nor another set's could, as `file:line: rule`.
    """
    for some in tables.in_batches(rows, tables.BATCH_ROWS):
        right = _Lists([row.positives for row in some], some, pool_of, known)
        wrong = _Lists([row.negatives for row in some], some, pool_of, known)
        missing = right.missing | wrong.missing
        for at in sorted(missing):
            with faults.row():
                did = id_of({**wrong.missing, **right.missing}[at])
                raise DataError(f"{source}:{some[at].line}: candidate {did} is not in the pool")
        good = np.setdiff1d(np.arange(len(some)), list(missing))
        yield _batch(some, source, instructions, right, wrong).take(pa.array(good))


class _Lists:
    """The lists of ids of some rows, each id inside its row's pool, outside it, or missing."""

    def __init__(
        self,
        lists: Sequence[list[int]],
        rows: Sequence[Row],
        pool_of: Callable[[str], "Pool"],
        known: Sequence[int],
    ) -> None:
        self.count = len(lists)
        self.ids = np.fromiter(chain.from_iterable(lists), np.int64)
        self.owner = np.repeat(np.arange(self.count), [len(one) for one in lists])
        self.inside = np.zeros(len(self.ids), bool)
        elsewhere = np.zeros(len(self.ids), bool)
        task = np.array([row.task for row in rows])[self.owner]
        asking = np.array([row.id for row in rows])[self.owner] // DOCUMENTS_PER_DATASET
        asked = self.ids // DOCUMENTS_PER_DATASET
        for number in np.unique(task):
            of, pool = task == number, pool_of(TASK_NAMES[int(number)])
            self.inside[of] = pool.find(self.ids[of]) >= 0
            # A pool of this set is here, and lacks it.
            elsewhere[of] = np.isin(asked[of], np.setdiff1d(known, pool.datasets))
        for query, sister in SISTERS:
            elsewhere |= (asking == query) & (asked == sister)
        lost = np.flatnonzero(~self.inside & ~elsewhere)[::-1]
        self.missing = dict(zip(self.owner[lost].tolist(), self.ids[lost].tolist(), strict=True))
        """Row -> the first of its ids that nobody has."""

    def array(self, inside: bool) -> pa.ListArray:
        """The ids that are inside, or those that are not, a list a row."""
        chosen = self.inside == inside
        ends = np.cumsum(np.bincount(self.owner[chosen], minlength=self.count))
        offsets = np.concatenate([[0], ends]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(self.ids[chosen]))

    def outside(self) -> np.ndarray:
        """[rows] int64: how many ids of each row are not inside."""
        return np.bincount(self.owner[~self.inside], minlength=self.count)


def _batch(
    rows: Sequence[Row], source: Path, instructions: Sequence[str], right: _Lists, wrong: _Lists
) -> pa.RecordBatch:
    id, text, image, instruction, task, _, _, line = zip(*rows, strict=True)
    words = pa.DictionaryArray.from_arrays(
        pa.array(instruction, pa.int32()), pa.array(instructions, pa.string())
    )
    named = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(len(rows), np.int32)), pa.array([str(source)])
    )
    return pa.record_batch(
        [
            pa.array(id, pa.int64()), pa.array(text, pa.string()), pa.array(image, pa.string()),
            words, pa.array(task, pa.int8()), right.array(True), right.array(False),
            wrong.array(True), pa.array(wrong.outside(), pa.int32()), named,
            pa.array(line, pa.int32()),
        ],
        schema=SCHEMA,
    )  # fmt: skip
