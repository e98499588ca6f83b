"""A folder of pictures, with captions where there are any: people's own pictures.

With a `captions.csv` (`file`, `caption`, and whatever else is known) each caption asks for its
picture. Without, each picture asks for itself: enough to embed, index and search the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from elva.data.formats.rows import rows
from elva.data.formats.source import Entry, Example, Source
from elva.data.schema import DataError
from elva.data.strict import Faults

CAPTIONS = "captions.csv"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
FILE, CAPTION = ("file", "image", "file_name"), ("caption", "text")


def read(path: Path, faults: Faults) -> Source:
    """The pictures under a folder, in the order of their names."""
    if not path.is_dir():
        raise DataError(f"{path}: not a folder")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise DataError(f"{path}: holds no JPEG, PNG or WebP picture")
    captions = path / CAPTIONS
    if captions.exists():
        examples = _captioned(path, captions, faults)
        shown = (_entry(path, p, {}) for p in files)
        return Source("folder", 14, "Find the picture.", examples, shown)
    alone = (Example(_entry(path, p, {}), [_entry(path, p, {})]) for p in files)
    return Source("folder", 14, "Find the same picture.", alone)


def _captioned(path: Path, captions: Path, faults: Faults) -> Iterator[Example]:
    for record in rows(captions, (), faults):
        with faults.row():
            file = next((n for n in FILE if record.get(n) is not None), None)
            caption = next((n for n in CAPTION if record.get(n) is not None), None)
            if file is None or caption is None:
                raise DataError(f"{captions}:1: no column {FILE[0]} or no column {CAPTION[0]}")
            name = record.path(file) or record.fail(f"{file} is empty")
            extra = {k: v for k, v in record.fields.items() if k not in (file, caption)}
            shown = _entry(path, path / name, extra)
            yield Example(Entry(record.text(caption), None, record.where), [shown])


def _entry(root: Path, path: Path, extra: dict[str, object]) -> Entry:
    name = path.relative_to(root).as_posix()
    return Entry(None, path, str(path), name, extra)
