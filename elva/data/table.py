"""Tables of text files: read strictly once; a large one is mapped from the cache from then on.

A table lies beside the sorted hashed ids of its rows. It is keyed by the file (path, size, time of
change), by all that its rows were checked against, and by `VERSION`.
"""

import hashlib
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from elva.data.schema import id_of
from elva.data.strict import Faults
from elva.errors import DataError
from elva.files import cache_directory, replacing

_T = TypeVar("_T")

if sys.platform != "win32":
    import fcntl

MAPPED_FROM_BYTES = 32 << 20
"""Ours: a file from here on is worth a table on disk; reading a smaller one takes a second."""

VERSION = 4
"""Of the tables on disk; raise it when the same file would give another one, or its rows other
identities."""

BATCH_ROWS = 32_768
"""Ours: rows held as Python objects at a time."""


FEW = 8
"""Ours: so many rows are read faster cell by cell than as a part of their batch."""


@dataclass(frozen=True)
class Kind:
    """A kind of table.

    Args:
        folder: of the cache.
        key: What its files call an id: `did`, `qid`.
        hashed: The hashed ids of a table, [n] int64.
    """

    folder: str
    key: str
    schema: pa.Schema
    hashed: Callable[[pa.Table], np.ndarray]


@dataclass(frozen=True)
class Kept:
    """A table with `line` among its columns, and its order.

    Args:
        order: [2, n] int64, hashed ids ascending and their rows.
        place: Where it is mapped from; None in memory.
    """

    table: pa.Table
    order: np.ndarray
    place: Path | None


class Cells:
    """Rows of a table as dicts, wherever its batches lie.

    Args:
        names: The columns; all by default.
    """

    def __init__(self, table: pa.Table, names: Sequence[str] | None = None) -> None:
        # `take` on a chunked table would copy all of it first.
        self._batches = (table if names is None else table.select(names)).to_batches()
        self._ends = list(accumulate(len(batch) for batch in self._batches))

    def __call__(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        if len(rows) <= FEW:
            yield from map(self._one, rows.tolist())
            return
        held = np.searchsorted(self._ends, rows, side="right")
        for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(held)) + 1):
            batch, start = self._batch(int(held[run[0]]))
            yield from batch.take(pa.array(rows[run] - start)).to_pylist()

    def _one(self, row: int) -> dict[str, Any]:
        batch, start = self._batch(bisect_right(self._ends, row))
        columns = zip(batch.schema.names, batch.columns, strict=True)
        return {name: column[row - start].as_py() for name, column in columns}

    def _batch(self, place: int) -> tuple[pa.RecordBatch, int]:
        """A batch and the row that it begins with."""
        batch = self._batches[place]
        return batch, self._ends[place] - len(batch)


def of_file(
    kind: Kind,
    source: Path,
    against: Sequence[str],
    batches: Callable[[], Iterable[pa.RecordBatch]],
    faults: Faults,
    *,
    repeats: bool = False,
    check: Callable[[Kept], None] | None = None,
) -> Kept:
    """The table of a file, in memory if it is small, else mapped.

    Args:
        against: What else its rows depend on, see `stamp`.
        batches: Reads the file; called where the table is not there yet.
        faults: Where some are allowed nothing is mapped, so that they are found every time.
        repeats: Whether an id may come twice.
        check: What else must hold of the table; called once for a mapped one.

    Raises:
        DataError: what `batches` and `check` raise, or an id that comes twice.
    """
    if source.stat().st_size < MAPPED_FROM_BYTES or faults.allowed:
        table = pa.Table.from_batches(batches(), kind.schema).combine_chunks()
        kept = _distinct(kind, table, source, faults, repeats)
        if check is not None:
            check(kept)
        return kept
    place = _place(kind.folder, [stamp(source), *against])
    order = place.with_suffix(".npy")
    if not (place.exists() and order.exists()):
        with _locked(place):
            if not (place.exists() and order.exists()):
                _write(place, kind.schema, batches())
                try:
                    made = _distinct(kind, _mapped(place), source, faults, repeats)
                    if check is not None:
                        check(made)
                except DataError:
                    place.unlink()
                    raise
                with replacing(order) as sink, os.fdopen(os.dup(sink.descriptor), "wb") as file:
                    np.save(file, made.order)
    return Kept(_mapped(place), np.asarray(np.load(order, mmap_mode="r")), place)


def joined_place(folder: str, places: Sequence[Path | None]) -> Path | None:
    """Where files of a table made of others may be kept; None where one is in memory."""
    if any(place is None for place in places):
        return None
    return _place(folder, [str(place) for place in places])


def stamp(path: Path) -> str:
    """What a file is, as far as its path, size and time of change tell."""
    about = path.stat()
    return f"{path.absolute()} {about.st_size} {about.st_mtime_ns}"


def sorted_keys(keys: np.ndarray) -> np.ndarray:
    """[2, n] int64: keys ascending, and the row of each."""
    rows = np.argsort(keys, kind="stable")
    return np.stack([keys[rows], rows]).astype(np.int64)


def find(order: np.ndarray, hashed: np.ndarray) -> np.ndarray:
    """[n] int64 rows of hashed ids, the first of each; -1 where the order has none."""
    keys, rows = order
    if not len(keys):
        return np.full(len(hashed), -1)
    at = np.minimum(np.searchsorted(keys, hashed), len(keys) - 1)
    return np.where(keys[at] == hashed, rows[at], -1)


def first_of_each(order: np.ndarray) -> np.ndarray:
    """[n] bool over an order: whether no earlier row has the id."""
    keys = order[0]
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    return first


def in_batches(rows: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Rows in lists of at most `size`; those before a fault too: they may have an earlier one."""
    held: list[_T] = []
    try:
        for row in rows:
            held.append(row)
            if len(held) == size:
                yield held
                held = []
    except DataError:
        if held:
            yield held
        raise
    if held:
        yield held


def _distinct(kind: Kind, table: pa.Table, source: Path, faults: Faults, repeats: bool) -> Kept:
    """The table with the first row of each id, the others being faults."""
    order = sorted_keys(kind.hashed(table))
    first = first_of_each(order)
    if repeats or first.all():
        return Kept(table, order, None)
    lines, hashed = table["line"], kind.hashed(table)
    again = np.sort(order[1][~first])
    for row, before in zip(again.tolist(), find(order, hashed[again]).tolist(), strict=True):
        with faults.row():
            raise DataError(
                f"{source}:{lines[row]}: {kind.key} {id_of(int(hashed[row]))} again, "
                f"first in {source}:{lines[before]}"
            )
    kept = table.take(np.sort(order[1][first])).combine_chunks()
    return Kept(kept, sorted_keys(kind.hashed(kept)), None)


def _place(folder: str, parts: Sequence[str]) -> Path:
    key = "\n".join([str(VERSION), *parts])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return cache_directory() / folder / f"{name}.arrow"


def _write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with (
        replacing(path) as sink,
        os.fdopen(os.dup(sink.descriptor), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process at a time, until it ends.

    Differs on Windows, which has no flock: two may both write, and one of them fails.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.with_suffix(".lock"), "wb") as stream:
        if sys.platform != "win32":
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
