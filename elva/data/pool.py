"""Pools of candidates, and a split's queries with theirs.

A pool is an Arrow table with a sorted array of its ids beside it, because a dict of dicts does not
hold M-BEIR's 5.6 M candidates.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elva.data import table as tables
from elva.data.identity import Identities
from elva.data.queries import READ_ROWS, Queries
from elva.data.schema import DOCUMENTS_PER_DATASET, Grain, Item, hashed_id
from elva.data.strict import Faults

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("image", pa.string()),
        ("modality", pa.string()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("line", pa.int32()),
        ("extra", pa.string()),
    ]
)

Row = tuple[str, str | None, str | None, str, int, str | None]
"""id, text, image relative to the root, modality, line, and `src_content`."""


class Pool:
    """The candidates of a task: row -> `Item`, id -> row.

    Args:
        table: Columns id, text, image (relative to `root`), modality, source, line, extra.
        root: Where the pictures' paths start.
        order: [2, n] int64, hashed ids ascending and their rows; computed where it is not given.
        place: Where the table is mapped from; None in memory.
    """

    def __init__(
        self,
        table: pa.Table,
        root: Path,
        order: np.ndarray | None = None,
        place: Path | None = None,
    ) -> None:
        self.table = table.cast(SCHEMA)
        self.root = root
        self.place = place
        if order is not None:
            self.__dict__["_order"] = order

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> Item:
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self._items([row % len(self)])[0]

    def _items(self, rows: Sequence[int]) -> list[Item]:
        return [
            Item(
                cells["id"],
                cells["text"],
                None if cells["image"] is None else self.root / cells["image"],
                cells["modality"],
                where=f"{cells['source']}:{cells['line']}",
            )
            for cells in self._cells(np.asarray(rows, np.int64))
        ]

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), READ_ROWS):
            yield from self._items(range(start, min(start + READ_ROWS, len(self))))

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and self._find(id) is not None

    @cached_property
    def ids(self) -> list[str]:
        """All ids, in row order."""
        ids: list[str] = self.table["id"].to_pylist()
        return ids

    def row(self, id: str) -> int:
        """The row of an id; KeyError if it is not in the pool."""
        row = self._find(id)
        if row is None:
            raise KeyError(id)
        return row

    def extra(self, row: int) -> dict[str, str | int | float]:
        """What is known of a candidate beside its content: the words and numbers that its
        `src_content` holds as a JSON object."""
        text = self.table["extra"][row].as_py()
        try:
            fields = json.loads(text) if text else {}
        except ValueError:
            return {}
        if not isinstance(fields, dict):
            return {}
        plain = (str, int, float)
        return {k: v for k, v in fields.items() if isinstance(v, plain) and v == v}

    def texts(self) -> Iterator[str]:
        """The texts of the candidates that have one."""
        for batch in self.table.select(["text"]).to_batches():
            yield from (text for text in batch["text"].to_pylist() if text is not None)

    def find(self, hashed: np.ndarray) -> np.ndarray:
        """[n] int64 rows of hashed ids, -1 where the pool has none."""
        return tables.find(self._order, hashed)

    def identities(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n] int64: equal numbers are the same answer, whatever the ids (`Item.content_hash`).

        Raises:
            DataError: a picture among the rows that cannot be read.
        """
        return self._identities.of(np.asarray(rows, np.int64), self._items)

    @cached_property
    def pictured(self) -> np.ndarray:
        """[n] int64 rows of the candidates that have a picture."""
        return np.flatnonzero(self.table["image"].is_valid().to_numpy())

    @cached_property
    def datasets(self) -> np.ndarray:
        """The numbers of the datasets whose candidates are here, ascending."""
        return np.unique(self._order[0] // DOCUMENTS_PER_DATASET)

    @cached_property
    def _cells(self) -> tables.Cells:
        return tables.Cells(self.table, SCHEMA.names[:6])

    @cached_property
    def _identities(self) -> Identities:
        place = None if self.place is None else self.place.with_suffix(".identities")
        return Identities(len(self), place)

    @cached_property
    def _order(self) -> np.ndarray:
        return tables.sorted_keys(_hashed(self.table))

    def _find(self, id: str) -> int | None:
        try:
            row = int(self.find(np.array([hashed_id(id)]))[0])
        except ValueError:
            return None
        return None if row < 0 else row


def concatenate(pools: Sequence[Pool]) -> Pool:
    """One pool out of several that share a root: the first row of each id."""
    pools = list({id(pool): pool for pool in pools}.values())
    if len(pools) == 1:
        return pools[0]
    root = pools[0].root
    table = pa.concat_tables([pool.table for pool in pools]).unify_dictionaries()
    starts = np.cumsum([0, *(len(pool) for pool in pools)])
    keys = np.empty(len(table), np.int64)
    for start, pool in zip(starts, pools, strict=False):
        ascending, rows = pool._order
        keys[start + rows] = ascending
    order = tables.sorted_keys(keys)
    first = tables.first_of_each(order)
    if first.all():
        place = tables.joined_place(KIND.folder, [pool.place for pool in pools])
        return Pool(table, root, order, place)
    return Pool(table.take(np.sort(order[1][first])), root)


def of_file(source: Path, root: Path, rows: Callable[[], Iterable[Row]], faults: Faults) -> Pool:
    """The pool of a file: in memory if it is small, else mapped from a table in the cache.

    Args:
        rows: reads the file; called where the table is not there yet, or of another file.
        faults: where some are allowed nothing is mapped, so that they are found every time.

    Raises:
        DataError: what `rows` raises, or an id that comes twice.
    """

    def batches() -> Iterator[pa.RecordBatch]:
        return (_batch(some, source) for some in tables.in_batches(rows(), tables.BATCH_ROWS))

    kept = tables.of_file(KIND, source, (), batches, faults)
    return Pool(kept.table, root, kept.order, kept.place)


def _hashed(table: pa.Table) -> np.ndarray:
    """[n] int64 of a table's ids."""
    if not table.num_rows:
        return np.zeros(0, np.int64)
    parts = pc.split_pattern(table["id"], ":", max_splits=1)
    dataset, number = (pc.list_element(parts, i).cast(pa.int64()) for i in (0, 1))
    hashed: np.ndarray = pc.add(pc.multiply(dataset, DOCUMENTS_PER_DATASET), number).to_numpy()
    return hashed


KIND = tables.Kind("pools", "did", SCHEMA, _hashed)


def _batch(rows: Sequence[Row], source: Path) -> pa.RecordBatch:
    id, text, image, modality, line, extra = zip(*rows, strict=True)
    named = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(len(rows), np.int32)), pa.array([str(source)])
    )
    columns = [id, text, image, modality]
    arrays = [pa.array(column, pa.string()) for column in columns]
    last = [pa.array(line, pa.int32()), pa.array(extra, pa.string())]
    return pa.record_batch([*arrays, named, *last], schema=SCHEMA)


@dataclass(frozen=True)
class Dataset:
    """Queries of one split with the pools of their tasks.

    Args:
        root: Folder it was read from.
        split: train, val or test.
        queries: Set by set, in file order.
        pools: Task -> pool.
        grains: Candidate id -> grains of its text, where the corpus has them.
        minimal_pairs: Query id -> ids of all candidates of the same entity.
        notices: What a person should know of the data, a line each.
    """

    root: Path
    split: str
    queries: Queries
    pools: Mapping[str, Pool]
    grains: Mapping[str, tuple[Grain, ...]] = field(default_factory=dict)
    minimal_pairs: Mapping[str, list[str]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def pool(self, task: str) -> Pool:
        """The task's candidates. In the train split it holds no held-out row."""
        return self.pools[task]

    def texts(self) -> Iterator[str]:
        """Every text of the split, queries with their instruction; what a tokenizer learns."""
        for query in self.queries:
            yield query.prompted
        for pool in self.pools.values():
            yield from pool.texts()
