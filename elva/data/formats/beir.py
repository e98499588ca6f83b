"""BEIR (Thakur et al., arXiv:2104.08663): a corpus, queries, and what is right a split."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from elva.data import qrels
from elva.data.formats.rows import rows, table_files
from elva.data.formats.source import Entry, Example, Reference, Request, Source
from elva.data.strict import Faults
from elva.errors import DataError

SPLITS = {"train": ("train",), "val": ("dev", "val", "validation"), "test": ("test",)}
"""Ours -> theirs."""


def read(request: Request) -> Source:
    """A folder with `corpus` and `queries` (.jsonl or .parquet) and `qrels/<split>.tsv`.

    The queries of a split are those that its qrels judge; a title comes before its text.
    """
    path, notices = request.path, list[str]()
    if not path.is_dir():
        raise DataError(f"{path}: not a folder with corpus, queries and qrels")
    for table in ("corpus", "queries"):
        table_files(path, table)
    right = relevant(request, SPLITS[request.split])
    queries = (query for query in _entries(request, "queries") if query.id in right)
    examples = asked(queries, right, request.faults, notices)
    corpus = _entries(request, "corpus")
    return Source("beir", 16, "Find what answers it.", examples, corpus=corpus, notices=notices)


def relevant(request: Request, names: tuple[str, ...]) -> dict[str, list[Reference]]:
    """Query id -> its right answers; a query of which none is right has none."""
    folder = request.path / "qrels" if (request.path / "qrels").is_dir() else request.path
    files = table_files(folder, *names)
    judged = qrels.collect(files[0], _judged(files, request.faults), request.faults)
    return {
        qid: [Reference(did, one.where) for did, one in answers.items() if one.is_right]
        for qid, answers in judged.items()
    }


def _judged(files: Sequence[Path], faults: Faults) -> Iterator[tuple[str, str, str, object]]:
    for file in files:
        for record in rows(file, qrels.BEIR, faults):
            with faults.row():
                query, candidate, score = qrels.BEIR
                yield record.where, record.name(query), record.name(candidate), record.value(score)


def _entries(request: Request, table: str) -> Iterator[Entry]:
    seen: set[str] = set()
    for file in table_files(request.path, table):
        for record in rows(file, ("_id", "text"), request.faults):
            with request.faults.row():
                id = record.name("_id")
                if id in seen:
                    record.fail(f"_id {id} again")
                seen.add(id)
                title = record.text("title") if "title" in record.fields else None
                text = f"{title or ''} {record.text('text') or ''}".strip()
                yield Entry(text, None, record.where, id)


def asked(
    queries: Iterable[Entry],
    right: Mapping[str, list[Reference]],
    faults: Faults,
    notices: list[str],
) -> Iterator[Example]:
    """The queries with their right answers; those without are left out, and counted."""
    without, unknown = 0, dict(right)
    for query in queries:
        unknown.pop(str(query.id), None)
        if answers := right.get(str(query.id)):
            yield Example(query, answers)
        else:
            without += 1
    for qid, answers in unknown.items():
        for answer in answers[:1]:
            with faults.row():
                raise DataError(f"{answer.where}: query {qid!r} is not among the queries")
    if without:
        notices.append(f"{without:,} queries without a right answer are left out")
