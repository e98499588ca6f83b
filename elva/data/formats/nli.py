"""NLI pairs and triples, as sentence embedders train on them: stage 1 of the paper (sec. 4.1)."""

from collections.abc import Iterator
from pathlib import Path

from elva.data.formats.rows import rows
from elva.data.formats.source import Entry, Example, Request, Source
from elva.data.strict import Record
from elva.errors import DataError

COLUMNS = (("sent0", "sent1", "hard_neg"), ("anchor", "positive", "negative"))
"""Query, answer, and a hard negative, whose column or cell may be missing."""


def read(request: Request) -> Source:
    """A file of `sent0,sent1,hard_neg` or `anchor,positive,negative`, text to text."""
    return Source("nli", 11, "Find a sentence that follows.", _examples(request))


def _examples(request: Request) -> Iterator[Example]:
    names: tuple[str, str, str] | None = None
    known = [name for names in COLUMNS for name in names]
    for record in rows(request.path, (), request.faults, known=known):
        names = names or _names(request.path, record)
        with request.faults.row():
            asked, right, wrong = names
            query, positive = (Entry(record.text(n), None, record.where) for n in (asked, right))
            given = record.texts(wrong) if wrong in record.fields else []
            negatives = [Entry(text, None, record.where) for text in given if text.strip()]
            yield Example(query, [positive], negatives)


def _names(path: Path, record: Record) -> tuple[str, str, str]:
    for names in COLUMNS:
        if all(name in record.fields for name in names[:2]):
            return names
    wanted = " nor ".join(",".join(names[:2]) for names in COLUMNS)
    found = ", ".join(record.fields)
    raise DataError(f"{path}:1: no columns {wanted}; there are {found}")
