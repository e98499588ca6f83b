"""MMEB (Jiang et al., VLM2Vec, arXiv:2410.05160): its training rows and its test rows.

A query says itself what to look for, so the instruction is empty. `<|image_1|>` marks where
VLM2Vec puts the picture; here it comes first by the chat template, so the mark is taken away.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from elva.data.formats.rows import rows
from elva.data.formats.source import Entry, Example, Source
from elva.data.strict import Faults, Record

PLACEHOLDER = "<|image_1|>"
TRAIN = ("qry", "qry_image_path", "pos_text", "pos_image_path")
TEST = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


def read(path: Path, faults: Faults) -> Source:
    """A file of training rows (one negative or none), pictures beside it."""
    return Source("mmeb", 12, "", _train(path, faults))


def read_test(path: Path, faults: Faults) -> Source:
    """A file of test rows: of each query's own candidates the first is right."""
    return Source("mmeb", 12, "", _test(path, faults))


def _train(path: Path, faults: Faults) -> Iterator[Example]:
    for record in rows(path, TRAIN, faults):
        with faults.row():
            query = _entry(record, record.text("qry"), record.path("qry_image_path"), path)
            positive = _entry(record, record.text("pos_text"), record.path("pos_image_path"), path)
            negatives = []
            if record.get("neg_text") or record.get("neg_image_path"):
                image = record.path("neg_image_path") if record.get("neg_image_path") else None
                text = record.text("neg_text") if record.get("neg_text") else None
                negatives = [_entry(record, text, image, path)]
            yield Example(query, [positive], negatives)


def _test(path: Path, faults: Faults) -> Iterator[Example]:
    for record in rows(path, TEST, faults):
        with faults.row():
            asked = _joined(record.get("qry_inst"), record.text("qry_text"))
            query = _entry(record, asked, record.path("qry_img_path"), path)
            texts, images = record.texts("tgt_text"), record.paths("tgt_img_path")
            if len(texts) != len(images) or not texts:
                record.fail("tgt_text and tgt_img_path are not lists of one length")
            shown = [
                _entry(record, _joined(record.get("tgt_inst"), text), image, path)
                for text, image in zip(texts, images, strict=True)
            ]
            yield Example(query, shown[:1], candidates=shown)


def _joined(instruction: object, text: str | None) -> str:
    said = instruction if isinstance(instruction, str) else ""
    return f"{said.strip()} {text or ''}".strip()


def _entry(record: Record, text: str | None, image: str | None, path: Path) -> Entry:
    said = (text or "").replace(PLACEHOLDER, "").strip()
    return Entry(said or None, None if image is None else path.parent / image, record.where)
