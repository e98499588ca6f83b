"""Tevatron (Gao et al., arXiv:2203.05765; its multimodal form): queries and a corpus by id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from elva.data.formats.rows import rows, table_file
from elva.data.formats.source import Entry, Example, Source
from elva.data.strict import Faults, Record

QUERY = ("query_id", "query_text", "positive_document_ids")
DOCUMENT = ("docid", "document_text")


def read(path: Path, faults: Faults) -> Source:
    """A folder with `queries` or `train`, and `corpus`, as .jsonl or .parquet.

    Pictures (`query_image`, `document_image`) are files under the folder, or encoded in parquet.
    """
    corpus = dict(_corpus(path, faults))
    return Source(
        "tevatron", 13, "Find what answers it.", _examples(path, corpus, faults), corpus.values()
    )


def _corpus(path: Path, faults: Faults) -> Iterator[tuple[str, Entry]]:
    seen: set[str] = set()
    for record in rows(table_file(path, "corpus"), DOCUMENT, faults):
        with faults.row():
            id = _id(record, "docid")
            if id in seen:
                record.fail(f"docid {id} again")
            seen.add(id)
            yield id, _entry(record, id, "document", path)


def _examples(path: Path, corpus: dict[str, Entry], faults: Faults) -> Iterator[Example]:
    for record in rows(table_file(path, "queries", "train"), QUERY, faults):
        with faults.row():
            query = _entry(record, _id(record, "query_id"), "query", path)
            found = []
            for key in ("positive_document_ids", "negative_document_ids"):
                ids = [] if record.get(key) is None else record.texts(key)
                unknown = next((i for i in ids if i not in corpus), None)
                if unknown is not None:
                    record.fail(f"{key} holds {unknown!r}, which is not in the corpus")
                found.append([corpus[str(i)] for i in ids])
            yield Example(query, found[0], found[1])


def _id(record: Record, key: str) -> str:
    value = record.value(key)
    if not isinstance(value, str | int) or value == "":
        record.fail(f"{key} {value!r} is not an id")
    return str(value)


def _entry(record: Record, id: str, kind: str, path: Path) -> Entry:
    return Entry(
        record.text(f"{kind}_text"), record.picture(f"{kind}_image", path), record.where, id
    )
