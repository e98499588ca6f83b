"""NLI in csv, as sentence embedders train on it: stage 1 of the paper (sec. 4.1)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from elva.data.formats.rows import rows
from elva.data.formats.source import Entry, Example, Source
from elva.data.schema import DataError
from elva.data.strict import Faults, Record

COLUMNS = (("sent0", "sent1", "hard_neg"), ("anchor", "positive", "negative"))


def read(path: Path, faults: Faults) -> Source:
    """A file of `sent0,sent1,hard_neg` or `anchor,positive,negative`, text to text."""
    return Source("nli", 11, "Find a sentence that follows.", _examples(path, faults))


def _examples(path: Path, faults: Faults) -> Iterator[Example]:
    names: tuple[str, str, str] | None = None
    for record in rows(path, (), faults):
        names = names or _names(path, record)
        with faults.row():
            query, positive, negative = (Entry(record.text(n), None, record.where) for n in names)
            yield Example(query, [positive], [negative] if negative.text else [])


def _names(path: Path, record: Record) -> tuple[str, str, str]:
    for names in COLUMNS:
        if all(record.get(name) is not None for name in names):
            return names
    raise DataError(f"{path}:1: no columns {' nor '.join(','.join(n) for n in COLUMNS)}")
