"""MMEB (Jiang et al., VLM2Vec, arXiv:2410.05160): its training rows and its test rows.

A query says itself what to look for, so the instruction is empty. `<|image_1|>` marks where
VLM2Vec puts the picture; here it comes first by the chat template, so the mark is taken away.
Every other word of a text stays.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from elva.data.formats.rows import rows, table_files
from elva.data.formats.source import Entry, Example, Request, Source
from elva.data.strict import Record

_PLACEHOLDER = "<|image_1|>"
COLUMNS = {
    "original": ("qry", "qry_image_path", "pos_text", "pos_image_path"),
    "test": ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path"),
}
"""Of the files by their names."""


def read(request: Request) -> Source:
    """Training rows: a file, a subset's folder (`original-0000k-of-0000N.parquet`), or a folder of
    subsets, each of which becomes a set of its name. Pictures' paths start at `images`, the file's
    folder, or the one above it."""
    return Source("mmeb", 12, "", _examples(request, "original", _train))


def read_test(request: Request) -> Source:
    """Test rows, likewise: of each query's own candidates the first is right."""
    return Source("mmeb", 12, "", _examples(request, "test", _test))


def files(path: Path, name: str) -> list[Path]:
    """The tables called `name`, "original" or "test", of a subset's folder or of a folder of
    subsets; a file alone."""
    if not path.is_dir():
        return [path]
    subsets = sorted(folder for folder in path.iterdir() if any(folder.glob(f"{name}*.*")))
    if any(path.glob(f"{name}*.*")) or not subsets:
        return table_files(path, name)
    return [file for folder in subsets for file in table_files(folder, name)]


def _examples(request: Request, name: str, row: Callable[..., Example]) -> Iterator[Example]:
    for file in files(request.path, name):
        roots = (file.parent, file.parent.parent) if request.images is None else (request.images,)
        subset = re.sub(r"\W+", "_", file.absolute().parent.name) if request.path.is_dir() else ""
        for record in rows(file, COLUMNS[name], request.faults):
            with request.faults.row():
                yield replace(row(record, roots), subset=subset)


def _train(record: Record, roots: Sequence[Path]) -> Example:
    query = _entry(record, record.text("qry"), record.path("qry_image_path"), roots)
    positive = _entry(record, record.text("pos_text"), record.path("pos_image_path"), roots)
    texts = record.texts("neg_text") if "neg_text" in record.fields else []
    images = record.paths("neg_image_path") if "neg_image_path" in record.fields else []
    if len(texts) != len(images) and any(texts) and any(images):
        record.fail("neg_text and neg_image_path are not lists of one length")
    pairs = [pair for pair in zip_longest(texts, images) if any(pair)]
    return Example(query, [positive], [_entry(record, *pair, roots) for pair in pairs])


def _test(record: Record, roots: Sequence[Path]) -> Example:
    asked = _joined(record.get("qry_inst"), record.text("qry_text"))
    query = _entry(record, asked, record.path("qry_img_path"), roots)
    texts, images = record.texts("tgt_text"), record.paths("tgt_img_path")
    if len(texts) != len(images) or not texts:
        record.fail("tgt_text and tgt_img_path are not lists of one length")
    shown = [
        _entry(record, _joined(record.get("tgt_inst"), text), image, roots)
        for text, image in zip(texts, images, strict=True)
    ]
    return Example(query, shown[:1], candidates=shown)


def _joined(instruction: object, text: str | None) -> str:
    said = instruction if isinstance(instruction, str) else ""
    return f"{said.strip()} {text or ''}".strip()


def _entry(record: Record, text: str | None, image: str | None, roots: Sequence[Path]) -> Entry:
    said = (text or "").replace(_PLACEHOLDER, "").strip()
    return Entry(said or None, None if image is None else _find(record, image, roots), record.where)


def _find(record: Record, image: str, roots: Sequence[Path]) -> Path:
    found = next((root / image for root in roots if (root / image).is_file()), None)
    if found is None:
        where = " or ".join(map(str, roots))
        record.fail(f"no such picture: {image} in {where}; images names where its path starts")
    return found
