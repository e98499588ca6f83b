"""MTEB's parquet mirrors of M-BEIR, `mteb/mbeir_<dataset>_task<k>`: pictures inside, no tar files.

Three configurations as files: `query-*`, `corpus-*` (id, modality, text, image) and `qrels-*`
(query-id, Q0, corpus-id, score). Instructions are not in them: they are read from M-BEIR's own
file where it is beside the mirror, else the name says what to look for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from elva.data.formats.rows import rows
from elva.data.formats.source import Entry, Example, Source
from elva.data.schema import DataError
from elva.data.strict import Faults

DATASETS = (
    "visualnews", "fashion200k", "webqa", "edis", "nights", "oven", "infoseek", "fashioniq",
    "cirr", "mscoco",
)  # fmt: skip
"""M-BEIR's, in the order of their numbers."""

ITEM = ("id", "modality", "text", "image")
QRELS = ("query-id", "corpus-id", "score")


def read(path: Path, faults: Faults) -> Source:
    """A mirror's folder."""
    match = re.search(r"mbeir_([a-z0-9]+)_task\d", path.resolve().name)
    name = match[1] if match else "mteb"
    number = DATASETS.index(name) if name in DATASETS else 15
    corpus = dict(_items(path, "corpus", faults))
    examples = _examples(path, corpus, faults)
    return Source(name, number, "Find what is asked for.", examples, corpus.values())


def _files(path: Path, config: str) -> list[Path]:
    found = sorted([*path.glob(f"{config}-*.parquet"), *path.glob(f"data/{config}-*.parquet")])
    found = found or sorted(path.glob(f"{config}/*.parquet"))
    if not found:
        raise DataError(f"{path}: no {config}-*.parquet")
    return found


def _items(path: Path, config: str, faults: Faults) -> Iterator[tuple[str, Entry]]:
    seen: set[str] = set()
    for file in _files(path, config):
        for record in rows(file, ITEM, faults):
            with faults.row():
                id = record.text("id") or record.fail("id is empty")
                if id in seen:
                    record.fail(f"id {id} again")
                seen.add(id)
                modality = record.modality("modality")
                text = record.text("text") if "text" in modality else None
                image = record.picture("image", path) if "image" in modality else None
                entry = Entry(text, image, record.where, id)
                if entry.modality != modality:
                    record.fail(f"modality is {modality}, but there is {entry.modality}")
                yield id, entry


def _examples(path: Path, corpus: dict[str, Entry], faults: Faults) -> Iterator[Example]:
    right: dict[str, list[str]] = defaultdict(list)
    for file in _files(path, "qrels"):
        for record in rows(file, QRELS, faults):
            with faults.row():
                qid, did = record.text("query-id"), record.text("corpus-id")
                if did not in corpus:
                    record.fail(f"corpus-id {did!r} is not in the corpus")
                if record.get("score") not in (None, 0):
                    right[str(qid)].append(str(did))
    for id, query in _items(path, "query", faults):
        yield Example(query, [corpus[did] for did in right.get(id, ())])
