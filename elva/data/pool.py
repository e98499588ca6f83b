"""Pools of candidates, and a split's queries with theirs.

A pool is an Arrow table with a sorted array of its ids beside it, because a dict of dicts does not
hold M-BEIR's 5.6 M candidates. A large pool file is read once, strictly, into a table on disk that
is memory-mapped from then on.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elva.data.schema import Grain, Item, Query, hashed_id
from elva.data.strict import Faults
from elva.errors import DataError
from elva.files import cache_directory, replacing

MAPPED_FROM_BYTES = 32 << 20
"""Ours: a pool file from here on is worth a table on disk; reading a smaller one takes a second."""

VERSION = 2
"""Of the tables on disk; raise it when the same file would give another one."""

BATCH_ROWS = 65_536

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
    """

    def __init__(self, table: pa.Table, root: Path, order: np.ndarray | None = None) -> None:
        self.table = table.cast(SCHEMA)
        self.root = root
        if order is not None:
            self.__dict__["_order"] = order

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> Item:
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        id, text, image, modality, source, line = (
            self.table[name][row].as_py() for name in SCHEMA.names[:6]
        )
        path = None if image is None else self.root / image
        return Item(id, text, path, modality, where=f"{source}:{line}")

    def __iter__(self) -> Iterator[Item]:
        return (self[row] for row in range(len(self)))

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

    def identities(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64, a number a row; equal numbers are the same answer, whatever its id."""
        hashes = [self[int(row)].content_hash()[:8] for row in rows]
        return np.array([int.from_bytes(h, "little", signed=True) for h in hashes], np.int64)

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

    @cached_property
    def _order(self) -> np.ndarray:
        return sorted_keys(self.table)

    def _find(self, id: str) -> int | None:
        keys, rows = self._order
        try:
            key = hashed_id(id)
        except ValueError:
            return None
        at = int(np.searchsorted(keys, key))
        return int(rows[at]) if at < len(keys) and keys[at] == key else None


def sorted_keys(table: pa.Table) -> np.ndarray:
    """[2, n] int64 of a table's ids: hashed, ascending, and the row of each."""
    if not table.num_rows:
        return np.zeros((2, 0), np.int64)
    parts = pc.split_pattern(table["id"], ":", max_splits=1)
    dataset, number = (pc.list_element(parts, i).cast(pa.int64()) for i in (0, 1))
    keys = pc.add(pc.multiply(dataset, 10_000_000), number).to_numpy()
    order = np.argsort(keys, kind="stable")
    return np.stack([keys[order], order])


def concatenate(pools: Sequence[Pool]) -> Pool:
    """One pool out of several that share a root."""
    if len(pools) == 1:
        return pools[0]
    table = pa.concat_tables([pool.table for pool in pools]).unify_dictionaries()
    return Pool(table, pools[0].root)


def distinct(pool: Pool) -> Pool:
    """The pool with the first row of each id."""
    keys, rows = sorted_keys(pool.table)
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    return pool if first.all() else Pool(pool.table.take(np.sort(rows[first])), pool.root)


def of_rows(rows: Iterable[Row], source: Path, root: Path, faults: Faults) -> Pool:
    """A pool in memory."""
    batches = list(_batches(rows, source))
    pool = Pool(pa.Table.from_batches(batches, SCHEMA).combine_chunks(), root)
    for item in _repeated(pool):
        with faults.row():
            raise DataError(f"{item.where}: did {item.id} again")
    return distinct(pool)


def of_file(source: Path, root: Path, rows: Callable[[], Iterable[Row]], faults: Faults) -> Pool:
    """The pool of a file: in memory if it is small, else mapped from a table in the cache.

    Args:
        rows: reads the file; called where the table is not there yet, or of another file.
        faults: where some are allowed nothing is mapped, so that they are found every time.

    Raises:
        DataError: what `rows` raises, or an id that comes twice.
    """
    about = source.stat()
    if about.st_size < MAPPED_FROM_BYTES or faults.allowed:
        return of_rows(rows(), source, root, faults)
    key = f"{VERSION} {source.absolute()} {about.st_size} {about.st_mtime_ns}"
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    place = cache_directory() / "pools" / f"{name}.arrow"
    order = place.with_suffix(".npy")
    if not (place.exists() and order.exists()):
        _write(place, _batches(rows(), source))
        pool = Pool(_mapped(place), root)
        for item in _repeated(pool):
            place.unlink()
            raise DataError(f"{item.where}: did {item.id} again")
        with replacing(order) as sink, os.fdopen(os.dup(sink.descriptor), "wb") as file:
            np.save(file, pool._order)
    return Pool(_mapped(place), root, np.load(order, mmap_mode="r"))


def _write(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    with (
        replacing(path) as sink,
        os.fdopen(os.dup(sink.descriptor), "wb") as file,
        pa.ipc.new_file(file, SCHEMA) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _batches(rows: Iterable[Row], source: Path) -> Iterator[pa.RecordBatch]:
    """Record batches of rows, each small enough to be held as Python objects."""
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if len(held) == BATCH_ROWS:
            yield _batch(held, source)
            held = []
    if held:
        yield _batch(held, source)


def _batch(rows: Sequence[Row], source: Path) -> pa.RecordBatch:
    id, text, image, modality, line, extra = zip(*rows, strict=True)
    named = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(len(rows), np.int32)), pa.array([str(source)])
    )
    columns = [id, text, image, modality]
    arrays = [pa.array(column, pa.string()) for column in columns]
    last = [pa.array(line, pa.int32()), pa.array(extra, pa.string())]
    return pa.record_batch([*arrays, named, *last], schema=SCHEMA)


def _repeated(pool: Pool) -> Iterator[Item]:
    """Rows whose id an earlier row has."""
    keys, rows = pool._order
    for row in np.sort(rows[1:][keys[1:] == keys[:-1]]).tolist():
        yield pool[row]


@dataclass(frozen=True)
class Dataset:
    """Queries of one split with the pools of their tasks.

    Args:
        root: Folder it was read from.
        split: train, val or test.
        queries: In file order.
        pools: Task -> pool.
        grains: Candidate id -> grains of its text, where the corpus has them.
        minimal_pairs: Query id -> ids of all candidates of the same entity.
    """

    root: Path
    split: str
    queries: list[Query]
    pools: Mapping[str, Pool]
    grains: Mapping[str, tuple[Grain, ...]] = field(default_factory=dict)
    minimal_pairs: Mapping[str, list[str]] = field(default_factory=dict)

    def pool(self, task: str) -> Pool:
        """The task's candidates. In the train split it holds no held-out row."""
        return self.pools[task]

    def texts(self) -> Iterator[str]:
        """Every text of the split, queries with their instruction; what a tokenizer learns."""
        for query in self.queries:
            yield query.prompted
        for pool in self.pools.values():
            yield from pool.texts()
