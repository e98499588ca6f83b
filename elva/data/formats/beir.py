"""BEIR (Thakur et al., arXiv:2104.08663): a corpus, queries, and what is right a split."""

from collections.abc import Iterator, Sequence
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
    notices: list[str] = []
    examples = _examples(request, notices)
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


def _examples(request: Request, notices: list[str]) -> Iterator[Example]:
    if not request.path.is_dir():
        raise DataError(f"{request.path}: not a folder with corpus, queries and qrels")
    right = relevant(request, SPLITS[request.split])
    without = 0
    for query in _entries(request, "queries"):
        answers = right.pop(str(query.id), None)
        if answers:
            yield Example(query, answers)
        elif answers is not None:
            without += 1
    for qid, answers in right.items():
        for answer in answers[:1]:
            with request.faults.row():
                raise DataError(f"{answer.where}: query {qid!r} is not in queries")
    if without:
        notices.append(f"{without:,} queries without a right answer are left out")
