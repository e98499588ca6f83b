"""Rows of csv, jsonl and parquet files, whoever wrote them; every fault is `file:line: rule`."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from elva.data.schema import DataError
from elva.data.strict import Faults, Record, lines, records

BATCH_ROWS = 256
"""Rows of parquet at a time: some hold pictures."""


def rows(path: Path, needed: Sequence[str], faults: Faults) -> Iterator[Record]:
    """Every row as a record, in file order.

    Args:
        path: A .csv with a header, .jsonl, or .parquet file.
        needed: Columns that must be there.

    Raises:
        DataError: no such file, another kind of file, a column that is missing or there twice, a
            damaged or empty file.
    """
    readers = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: not a .csv, .jsonl or .parquet file")
    empty = True
    for record in reader(path, needed, faults):
        empty = False
        yield record
    if empty:
        raise DataError(f"{path}: holds no rows")


def table_file(folder: Path, *names: str) -> Path:
    """The first of some names, as .jsonl, .parquet or .csv, that a folder has."""
    for name in names:
        for suffix in (".jsonl", ".parquet", ".csv"):
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    raise DataError(f"{folder}: no {' or '.join(names)} as .jsonl, .parquet or .csv")


def _csv(path: Path, needed: Sequence[str], faults: Faults) -> Iterator[Record]:
    numbered = lines(path)
    at = {"where": f"{path}:1"}

    def texts() -> Iterator[str]:
        for where, line in numbered:
            at["where"] = where
            yield line

    reader = csv.reader(texts(), strict=True)
    header: list[str] | None = None
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{at['where']}: not csv: {error}") from error
        if cells is None:
            return
        if header is None:
            header = [cell.strip().lstrip("\ufeff") for cell in cells]
            _check_columns(path, header, needed)
            continue
        with faults.row():
            if cells and len(cells) != len(header):
                raise DataError(f"{at['where']}: {len(cells)} cells, not {len(header)}")
        if len(cells) == len(header):
            yield Record(at["where"], dict(zip(header, cells, strict=True)))


def _jsonl(path: Path, needed: Sequence[str], faults: Faults) -> Iterator[Record]:
    for record in records(path, faults):
        fine = False
        with faults.row():
            for name in needed:
                record.value(name)
            fine = True
        if fine:
            yield record


def _parquet(path: Path, needed: Sequence[str], faults: Faults) -> Iterator[Record]:
    number = 0
    try:
        file = pq.ParquetFile(path)
        _check_columns(path, file.schema_arrow.names, needed)
        for batch in file.iter_batches(BATCH_ROWS):
            for fields in batch.to_pylist():
                number += 1
                yield Record(f"{path}:row {number}", fields)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not readable parquet after row {number}: {reason}") from error


def _check_columns(path: Path, found: Sequence[str], needed: Sequence[str]) -> None:
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}:1: column {twice!r} twice")
    for name in needed:
        if name not in found:
            raise DataError(f"{path}:1: no column {name!r}; there are {', '.join(found)}")
