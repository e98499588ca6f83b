"""Tevatron (Gao et al., arXiv:2203.05765; its multimodal form): queries and a corpus by id.

Its code reads a document's `text` and `image`, its README says `document_text` and
`document_image`; both are read. In its older form the passages stand in the rows.
"""

from collections.abc import Iterator
from pathlib import Path

from elva.data.formats.rows import first_row, rows, table_files
from elva.data.formats.source import Entry, Example, Reference, Request, Source
from elva.data.strict import Record

TEXT, _IMAGE = ("document_text", "text"), ("document_image", "image")
_PASSAGES = ("positive_passages", "negative_passages")
IDS = ("positive_document_ids", "negative_document_ids")


def read(request: Request) -> Source:
    """A folder with `queries` or `train`, and `corpus`: .jsonl, .parquet, or shards of parquet.

    Pictures are files under the folder (or `images`), or encoded in parquet.
    """
    path = request.path
    files = table_files(path, "queries", "train") if path.is_dir() else [path]
    alone = _PASSAGES[0] in first_row(files[0]).fields
    corpus = () if alone else _corpus(request)
    return Source("tevatron", 13, "Find what answers it.", _examples(request, files), corpus=corpus)


def _root(request: Request) -> Path:
    return request.path if request.path.is_dir() else request.path.parent


def _corpus(request: Request) -> Iterator[Entry]:
    seen: set[str] = set()
    for file in table_files(_root(request), "corpus"):
        for record in rows(file, ("docid",), request.faults):
            with request.faults.row():
                id = record.name("docid")
                if id in seen:
                    record.fail(f"docid {id} again")
                seen.add(id)
                text, image = (_first(record, names) for names in (TEXT, _IMAGE))
                yield _entry(request, record, id, text, image)


def _examples(request: Request, files: list[Path]) -> Iterator[Example]:
    for file in files:
        for record in rows(file, ("query_id",), request.faults):
            with request.faults.row():
                text = _first(record, ("query_text", "query"))
                query = _entry(request, record, record.name("query_id"), text, "query_image")
                if _PASSAGES[0] in record.fields:
                    positives, negatives = (_passages(record, key) for key in _PASSAGES)
                    yield Example(query, positives, negatives)
                    continue
                named = (
                    record.names(IDS[0]),
                    record.names(IDS[1]) if IDS[1] in record.fields else [],
                )
                right, wrong = ([Reference(id, record.where) for id in ids] for ids in named)
                yield Example(query, right, wrong)


def _passages(record: Record, key: str) -> list[Entry]:
    """The passages of a row; their ids are kept but not believed, their content says which."""
    found = record.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        record.fail(f"{key} is not a list of passages")
    passages = []
    for fields in found:
        one = Record(record.where, fields)
        extra = {"id": one.name("docid")} if "docid" in fields else {}
        passages.append(Entry(_text(one, "text"), None, one.where, extra=extra))
    return passages


def _entry(request: Request, record: Record, id: str, text: str, image: str) -> Entry:
    root = request.images or _root(request)
    return Entry(_text(record, text), record.picture(image, root), record.where, id)


def _text(record: Record, key: str) -> str:
    """Title and text, as Tevatron joins them."""
    parts = (record.text(name) or "" for name in ("title", key) if name in record.fields)
    return " ".join(parts).strip()


def _first(record: Record, names: tuple[str, ...]) -> str:
    """The first of some columns that a row has, or the first of them all."""
    return next((name for name in names if name in record.fields), names[0])
