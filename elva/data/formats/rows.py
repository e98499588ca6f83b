"""Rows of csv, jsonl and parquet files, whoever wrote them; every fault is `file:line: rule`."""

import csv
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from elva.data import strict
from elva.data.strict import Faults, Record, lines, records
from elva.errors import DataError

BATCH_ROWS = 256
"""Rows of parquet at a time: some hold pictures."""

_UNCLOSED = "unexpected end of data"
"""What Python's csv says of a quote that is open at the end."""

_SEPARATORS = ",;\t|"
SUFFIXES = (".jsonl", ".parquet", ".csv", ".tsv")


def rows(
    path: Path, needed: Sequence[str], faults: Faults, *, known: Sequence[str] = ()
) -> Iterator[Record]:
    """Every row as a record, in file order.

    Args:
        path: A .csv, .tsv or .txt file with a header, a .jsonl, or a .parquet file.
        needed: Columns that must be there.
        known: Columns that may be there. A csv header may spell all these in capitals, and the
            separator (comma, semicolon, tab, bar) is the one that finds most of them.

    Raises:
        DataError: no such file, another kind of file, a column that is missing or there twice, a
            damaged or empty file.
    """
    before, empty = len(faults.found), True
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        found = _jsonl(path, needed, faults)
    elif suffix == ".parquet":
        found = _parquet(path, needed)
    elif suffix in (".csv", ".tsv", ".txt"):
        found = _csv(path, needed, known, faults)
    else:
        raise DataError(f"{path}: not a .csv, .tsv, .jsonl or .parquet file")
    for record in found:
        empty = False
        yield record
    if empty and len(faults.found) == before:
        raise DataError(f"{path}: holds no rows")


def first_row(path: Path) -> Record:
    """The first row that can be read; the faults before it are for whoever reads them all."""
    record = next(rows(path, (), Faults(sys.maxsize)), None)
    if record is None:
        raise DataError(f"{path}: holds no row that can be read")
    return record


def table_files(folder: Path, *names: str) -> list[Path]:
    """The files of the table with the first of some names that a folder has.

    One `<name>.jsonl`, .parquet, .csv or .tsv; or all shards `<name>-0000k-of-0000N.parquet`, here
    or in `data/`; or what a folder `<name>/` holds.
    """
    found = next((files for name in names if (files := _table(folder, name))), None)
    if found is None:
        raise DataError(f"{folder}: no {' or '.join(names)} as .jsonl, .parquet or .csv")
    return found


def _table(folder: Path, name: str) -> list[Path]:
    whole = [path for s in SUFFIXES if (path := folder / f"{name}{s}").is_file()]
    if len(whole) > 1:
        raise DataError(f"{folder}: holds {whole[0].name} and {whole[1].name}; leave one of them")
    places = (
        (folder, f"{name}-*.parquet"),
        (folder / "data", f"{name}-*.parquet"),
        (folder / name, "[!.]*.parquet"),
        (folder / name, "[!.]*.jsonl"),
        (folder / name / "data", "[!.]*.parquet"),
    )
    shards = (sorted(place.glob(pattern)) for place, pattern in places)
    return whole or _complete(next(filter(None, shards), []))


def _complete(shards: list[Path]) -> list[Path]:
    """The shards, none of which is missing by their own names."""
    there: dict[tuple[str, int], int] = defaultdict(int)
    for path in shards:
        if match := re.match(r"(.*)-\d+-of-(\d+)", path.name):
            there[match[1], int(match[2])] += 1
    for (name, count), found in there.items():
        if found != count:
            raise DataError(f"{shards[0].parent}: {found} of {count} shards {name}-*.parquet")
    return shards


def _csv(
    path: Path, needed: Sequence[str], known: Sequence[str], faults: Faults
) -> Iterator[Record]:
    # Of the whole process, and only ever raised: Python's own limit is 128 KiB a cell.
    csv.field_size_limit(max(csv.field_size_limit(), strict.MAX_LINE_BYTES))
    names = {name.casefold(): name for name in (*needed, *known)}
    numbered = lines(path, faults)
    first = next((found for found in numbered if found[1]), None)
    if first is not None and (declared := re.fullmatch("sep=(.)", first[1])):
        separator, first = declared[1], next(numbered, None)
    else:
        separator = "," if first is None else _separator(*first, names)
    if first is None:
        return
    header: list[str] | None = None
    for where, cells in _cells(chain([first], numbered), separator, faults):
        if header is None:
            header = [names.get(cell.strip().casefold(), cell.strip()) for cell in cells]
            _check_columns(path, [name for name in header if name], needed, separator)
            continue
        fields = None
        with faults.row():
            fields = _fields(where, header, cells)
        if fields is not None:
            yield Record(where, fields)


def _separator(where: str, line: str, names: dict[str, str]) -> str:
    """The separator under which a header has most known columns, then most columns."""

    def found(separator: str) -> tuple[int, int]:
        cells = next(csv.reader([line], delimiter=separator), [])
        return sum(cell.strip().casefold() in names for cell in cells), len(cells)

    try:
        return max(_SEPARATORS, key=found)
    except csv.Error as error:
        raise DataError(f"{where}: not csv: {error}") from error


def _cells(
    numbered: Iterator[tuple[str, str]], separator: str, faults: Faults
) -> Iterator[tuple[str, list[str]]]:
    """(`file:line` of its first line, cells) of the rows that hold any text."""
    where = ""

    def texts() -> Iterator[str]:
        nonlocal where
        for at, line in numbered:
            where = where or at
            yield f"{line}\n"

    reader = csv.reader(texts(), delimiter=separator, strict=True)
    while True:
        where = ""
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if str(error) == _UNCLOSED:  # whatever rows follow are in it: no one row is bad
                raise DataError(f"{where}: not csv: a quote that is never closed") from error
            with faults.row():
                raise DataError(f"{where}: not csv: {error}") from error
            continue
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield where, cells


def _fields(where: str, header: list[str], cells: list[str]) -> dict[str, object]:
    """Column -> cell; what has no column must be empty, but for an index before the first."""
    width = max(i for i, name in enumerate(header, start=1) if name)
    if len(cells) < width:
        raise DataError(f"{where}: {len(cells)} cells, not {width}")
    named = [*header, *[""] * (len(cells) - len(header))][: len(cells)]  # names of no column end it
    for i, (name, cell) in enumerate(zip(named, cells, strict=True)):
        if i and not name and cell.strip():
            raise DataError(f"{where}: {len(cells)} cells, not {width}: {cell[:80]!r} is too many")
    return {name: cell for name, cell in zip(named, cells, strict=True) if name}


def _jsonl(path: Path, needed: Sequence[str], faults: Faults) -> Iterator[Record]:
    for record in records(path, faults):
        fine = False
        with faults.row():
            for name in needed:
                record.value(name)
            fine = True
        if fine:
            yield record


def _parquet(path: Path, needed: Sequence[str]) -> Iterator[Record]:
    number = 0
    try:
        file = pq.ParquetFile(path)
        _check_columns(path, file.schema_arrow.names, needed)
        for batch in file.iter_batches(BATCH_ROWS):
            for fields in batch.to_pylist():
                number += 1
                yield Record(f"{path}:row {number}", fields)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not readable parquet after row {number}: {reason}") from error


def _check_columns(
    path: Path, found: Sequence[str], needed: Sequence[str], separator: str = ""
) -> None:
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}:1: column {twice!r} twice")
    missing = next((name for name in needed if name not in found), None)
    if missing is not None:
        by = f", separated by {separator!r}" if separator else ""
        raise DataError(f"{path}:1: no column {missing!r}; there are {', '.join(found)}{by}")
