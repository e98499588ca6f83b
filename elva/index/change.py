"""How an index changes on disk: its segments first, then one manifest in the place of another."""

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from elva.errors import IndexFault
from elva.files import PARTIAL, replacing, sync_directory
from elva.index import codes, manifest, segment
from elva.index.codes import SegmentCodes
from elva.index.manifest import SEGMENTS, Entry, Manifest
from elva.index.segment import Segment
from elva.progress import SILENT, Reporter

MOST_CODED = 65_536
"""Columns of rows that `elva_kernels.row_codes` takes."""


@contextmanager
def building(directory: Path, empty: Manifest, overwrite: bool) -> Iterator[Manifest]:
    """The manifest to start from, of an index that nobody else writes meanwhile."""
    check_place(directory, overwrite)  # before anything is made there
    with manifest.writing(directory, make=True):
        check_place(directory, overwrite)  # nothing changes from here on
        generation = 0
        with suppress(IndexFault):  # none, or a damaged one, which is replaced
            generation = manifest.read(directory).generation + 1
        yield replace(empty, generation=generation)


def check_place(directory: Path, overwrite: bool) -> None:
    """Refuse a place where no index can be built."""
    ours = {SEGMENTS, manifest.LOCK, manifest.FILE + PARTIAL}  # what a killed one may have left
    try:
        names = {path.name for path in directory.iterdir()}
    except FileNotFoundError:
        return  # it will be made
    if manifest.exists(directory):
        if not overwrite:
            raise IndexFault(
                f"{directory}: must not hold an index yet; pass --overwrite, or elva index add"
            )
    elif names - ours:
        raise IndexFault(f"{directory}: must be empty or an index; choose another directory")


def written(
    directory: Path,
    chunks: Iterable[Tensor],
    table: pa.Table | pa.RecordBatchReader,
    base: Manifest,
    coded: bool,
    reporter: Reporter = SILENT,
) -> Entry:
    """Write a segment into an index's directory; it counts once a manifest names it.

    Args:
        coded: with codes of its rows.
    """
    path = directory / SEGMENTS / f"{uuid.uuid4().hex}.elva"
    segment.write(path, chunks, table, dim=base.dim, dtype=base.dtype, model=base.model)
    one = Segment(path)
    if coded:
        reporter.start(f"{directory}: code rows", one.rows, "rows")
    return entry_of(one, coded, reporter)


def linked(
    directory: Path, parts: Sequence[Segment], coded: bool, reporter: Reporter = SILENT
) -> tuple[Entry, ...]:
    """Put segments that are elsewhere into the directory, by links where the file system can."""
    if coded:
        reporter.start(f"{directory}: code rows", sum(one.rows for one in parts), "rows")
    entries, done = [], 0
    for one in parts:
        there = Segment(_linked(directory, one))
        entries.append(entry_of(there, coded, reporter, done))
        done += one.rows
    return tuple(entries)


def _linked(directory: Path, one: Segment) -> Path:
    path = directory / SEGMENTS / f"{uuid.uuid4().hex}.elva"
    try:
        os.link(one.path, path)
        sync_directory(path.parent)
    except OSError:  # another file system, or one without links
        _copy(one, path)
    return path


def entry_of(one: Segment, coded: bool, reporter: Reporter = SILENT, done: int = 0) -> Entry:
    """What a manifest says of a segment that lies in the index; its codes are written if wanted.

    Args:
        done: rows of other segments that the reporter has been told of.
    """
    bare = Entry(one.path.name, one.rows, one.header_sum)
    if not coded or one.dim > MOST_CODED:
        return bare
    unnamed = one.path.with_suffix(f".new{codes.SUFFIX}")
    made = replace(bare, codes=codes.write(one, unnamed, reporter, done).header_sum)
    os.replace(unnamed, one.path.with_name(made.codes_file))
    sync_directory(one.path.parent)
    return made


def _copy(one: Segment, path: Path) -> None:
    with replacing(path) as sink:
        sink.write(one.content)


def verify(
    place: Path, files: Sequence[Segment | SegmentCodes], reporter: Reporter = SILENT
) -> None:
    """Compare every byte of files with its checksum; IndexFault where one differs."""
    total, done = sum(one.size for one in files), 0
    reporter.start(f"{place}: verify", max(1, total >> 20), "MB")

    def advance(more: int) -> None:
        nonlocal done
        done += more
        reporter.advance(done >> 20)

    for one in files:
        one.verify(advance)


def check_parts(
    parts: Sequence[Segment], base: Manifest, place: Path, reporter: Reporter = SILENT
) -> pa.ChunkedArray:
    """The ids of segments that fit an index and each other, every byte compared.

    Raises:
        IndexFault: another model, width or dtype, a damaged byte, an id twice, fields apart.
    """
    for one in parts:
        check_fits(one, base)
    verify(place, parts, reporter)
    tables = [one.table for one in parts]
    check_fields(tables)
    ids = pa.chunked_array([c for t in tables for c in t["id"].chunks], pa.string())
    _check_unique(ids)
    return ids


def check_fits(one: Segment, base: Manifest) -> None:
    """Refuse a segment of another model, width or dtype."""
    if (one.dim, one.dtype) != (base.dim, base.dtype) or not one.model.matches(base.model):
        raise IndexFault(
            f"{one.path}: must be {base.dtype} x {base.dim} of {base.model.name}, got {one.dtype} "
            f"x {one.dim} of {one.model.name}; embed both with one model"
        )


def check_fields(tables: Sequence[pa.Table]) -> None:
    """Refuse what would not be one table: values of one field that no type holds."""
    for name, reason in conflicts(tables).items():
        raise IndexFault(
            f"index: field {name} must have one type in all of an index, got {reason}; convert "
            "it or give it another name"
        )


def conflicts(tables: Sequence[pa.Table]) -> dict[str, str]:
    """field -> why its columns are no one column, of those that are not."""
    found = {}
    for name in dict.fromkeys(name for table in tables for name in table.schema.names):
        columns = [table.select([name]) for table in tables if name in table.schema.names]
        if all(column.schema == columns[0].schema for column in columns):
            continue
        try:
            pa.concat_tables(columns, promote_options="permissive")
        except pa.ArrowException:
            kinds = dict.fromkeys(str(column.schema.field(0).type) for column in columns)
            found[name] = " and ".join(kinds)
    return found


def in_use(tables: Sequence[pa.Table], entries: Sequence[Entry]) -> list[pa.Table]:
    """Segments' tables; where a field's types differ, without it where no item that can be found
    has a value of it."""
    apart, found = conflicts(tables), []
    for table, entry in zip(tables, entries, strict=True):
        alive = entry.alive()
        live = table if alive is None else table.filter(pa.array(alive)) if apart else table
        unused = [n for n in apart if n in live.schema.names and live[n].null_count == len(live)]
        found.append(table.drop_columns(unused))
    return found


def merged(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables under each other; without the fields that are no one column."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:
        apart = conflicts(tables)
        kept = [t.select([n for n in t.schema.names if n not in apart]) for t in tables]
        return pa.concat_tables(kept, promote_options="permissive")


def table_of(ids: Sequence[str], columns: Mapping[str, Sequence[Any]] | None) -> pa.Table:
    """Ids and metadata as a table; IndexFault where they do not fit each other."""
    if columns and "id" in columns:
        raise IndexFault("index: columns must have names beside id, got id; rename it")
    try:
        table = pa.table({"id": pa.array(ids, pa.string()), **(columns or {})})
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise IndexFault(f"index: ids and columns must be as long and text; {reason}") from None
    if table["id"].null_count:
        raise IndexFault("index: ids must be text, got null; give every item an id")
    _check_unique(table["id"])
    return table


def _check_unique(ids: pa.ChunkedArray) -> None:
    """Refuse an id that comes twice."""
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    twice = next(c["values"].as_py() for c in counts if c["counts"].as_py() > 1)
    raise IndexFault(f"index: ids must be unique, got {twice!r} twice; drop one")


def peek(chunks: Iterable[Tensor]) -> tuple[Tensor, Iterable[Tensor]]:
    """The first chunk, and all of them; IndexFault where there is none."""
    rest = iter(chunks)
    with suppress(StopIteration):
        first = next(rest)
        if isinstance(first, Tensor) and first.ndim == 2 and first.shape[1]:
            return first, chain([first], rest)
    raise IndexFault("index: embeddings must be [n, D] with D of at least 1; run elva embed")
