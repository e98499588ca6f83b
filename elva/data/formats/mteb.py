"""MTEB's parquet mirrors of M-BEIR, `mteb/mbeir_<dataset>_task<k>`: pictures inside, no tar files.

Three configurations as files: `query-*`, `corpus-*` (id, modality, text, image) and `qrels-*`
(query-id, Q0, corpus-id, score). Ids stay M-BEIR's. Instructions are not in them: they are read
from M-BEIR's own `query_instructions.tsv` where that lies in the mirror, beside it, or in
`instructions/` beside it.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from elva.data.formats.beir import asked, relevant
from elva.data.formats.rows import first_row, rows, table_files
from elva.data.formats.source import Entry, Request, Source
from elva.data.instructions import read_instructions
from elva.errors import DataError

DATASETS = (
    "visualnews", "fashion200k", "webqa", "edis", "nights", "oven", "infoseek", "fashioniq",
    "cirr", "mscoco",
)  # fmt: skip
"""M-BEIR's, in the order of their numbers."""

SISTERS = {"oven": "infoseek", "infoseek": "oven"}
"""Their judgements name answers of both, while each corpus holds its own."""

_ITEM = ("id", "modality", "text", "image")


def read(request: Request) -> Source:
    """A mirror's folder."""
    path = request.path
    match = re.search(r"mbeir_([a-z0-9]+)_task\d", path.resolve().name)
    name = match[1] if match else "mteb"
    number = DATASETS.index(name) if name in DATASETS else 15
    if not path.is_dir():
        raise DataError(f"{path}: not a folder with corpus, query and qrels")
    first = first_row(table_files(path, "corpus")[0])
    right, notices = relevant(request, ("qrels",)), list[str]()
    return Source(
        name,
        number,
        "Find what is asked for.",
        asked(_items(request, "query", "queries"), right, request.faults, notices),
        corpus=_items(request, "corpus"),
        prompts=_prompts(path, number),
        notices=notices,
        keeps_ids=str(first.get("id")).startswith(f"{number}:"),
        sister=DATASETS.index(SISTERS[name]) if name in SISTERS else None,
    )


def _prompts(path: Path, number: int) -> dict[tuple[str, str], str]:
    places = (path, path.parent, path.parent / "instructions")
    files = (place / "query_instructions.tsv" for place in places)
    file = next((file for file in files if file.is_file()), None)
    found = {} if file is None else read_instructions(file)
    return {(q, c): prompts[0] for (n, q, c), prompts in found.items() if n == number}


def _items(request: Request, *names: str) -> Iterator[Entry]:
    seen: set[str] = set()
    for file in table_files(request.path, *names):
        for record in rows(file, _ITEM, request.faults):
            with request.faults.row():
                id = record.name("id")
                if id in seen:
                    record.fail(f"id {id} again")
                seen.add(id)
                modality = record.modality("modality")
                text = record.text("text") if "text" in modality else None
                image = record.picture("image", request.path) if "image" in modality else None
                found = [kind for kind, there in (("image", image), ("text", text)) if there]
                if ",".join(found) != modality:
                    record.fail(f"modality is {modality}, but there is {','.join(found) or 'none'}")
                yield Entry(text, image, record.where, id)
