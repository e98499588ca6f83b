"""BEIR (Thakur et al., arXiv:2104.08663): a corpus, queries, and what is right a split."""

from collections import defaultdict
from collections.abc import Iterator

from elva.data.formats.rows import rows, table_files
from elva.data.formats.source import Entry, Example, Reference, Request, Source
from elva.data.strict import Record
from elva.errors import DataError

SPLITS = {"train": ("train",), "val": ("dev", "val", "validation"), "test": ("test",)}
"""Ours -> theirs."""

QRELS = ("query-id", "corpus-id", "score")


def read(request: Request) -> Source:
    """A folder with `corpus` and `queries` (.jsonl or .parquet) and `qrels/<split>.tsv`.

    The queries of a split are those that its qrels judge; a title comes before its text.
    """
    notices: list[str] = []
    examples = _examples(request, notices)
    corpus = _entries(request, "corpus")
    return Source("beir", 16, "Find what answers it.", examples, corpus=corpus, notices=notices)


def relevant(
    request: Request, names: tuple[str, ...], needed: tuple[str, ...] = QRELS
) -> dict[str, list[Reference]]:
    """Query id -> its answers; a score above 0 is right, and queries without one have none."""
    folder = request.path / "qrels" if (request.path / "qrels").is_dir() else request.path
    right: dict[str, list[Reference]] = defaultdict(list)
    for file in table_files(folder, *names):
        for record in rows(file, needed, request.faults):
            with request.faults.row():
                qid, did = record.name("query-id"), record.name("corpus-id")
                found = right[qid]
                if _score(record) > 0:
                    found.append(Reference(did, record.where))
    return right


def _score(record: Record) -> float:
    value = record.value("score")
    try:
        if not isinstance(value, str | int | float):
            raise ValueError
        return float(value)
    except ValueError:
        record.fail(f"score {value!r} is no number")


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
