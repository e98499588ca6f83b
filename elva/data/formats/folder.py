"""A folder of pictures, with captions where there are any: people's own pictures.

Where somebody captioned them (`captions.py`), each caption asks for its pictures. Else each picture
asks for itself: enough to embed, index and search the folder.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elva.data.formats import captions
from elva.data.formats.source import Entry, Example, Request, Source, shown
from elva.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"}
THUMBNAILS = {"@eaDir", "__MACOSX"}
"""What a server and an archive leave beside pictures, besides hidden files."""


@dataclass
class _Found:
    """The files of a folder: pictures in the order of their names, and what is no picture."""

    pictures: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    hidden: int = 0


def read(request: Request) -> Source:
    """The pictures under a folder, in the order of their names."""
    path = request.path
    if not path.is_dir():
        raise DataError(f"{path}: not a folder")
    found = _files(path)
    told = captions.read(path, found.pictures, found.others, request.faults)
    left_out = _left_out(found, told.files)
    if not found.pictures:
        raise DataError("; ".join([f"{path}: holds no JPEG, PNG or WebP picture", *left_out]))
    notices = [told.notice(len(found.pictures)), *left_out]
    known = {p: told.columns.get(p, {}) for p in found.pictures}
    entries = (_entry(path, p, extra, shown(p)) for p, extra in known.items())
    if not told.captions:
        alone = (Example(entry, [entry]) for entry in entries)
        return Source("folder", 14, "Find the same picture.", alone, notices=notices)
    examples = (
        Example(Entry(one.text, None, one.where),
                [_entry(path, one.picture, known[one.picture], one.where)])
        for one in told.captions
    )  # fmt: skip
    return Source(
        "folder", 14, "Find the picture.", examples, entries, one_query=True, notices=notices
    )


def _files(root: Path) -> _Found:
    found = _Found()
    for folder, folders, names in os.walk(root):
        kept = [name for name in folders if not (name.startswith(".") or name in THUMBNAILS)]
        hidden = [Path(folder, name) for name in folders if name not in kept]
        found.hidden += sum(len(files) for top in hidden for _, _, files in os.walk(top))
        folders[:] = kept
        for name in names:
            if name.startswith("."):
                found.hidden += 1
            elif Path(name).suffix.lower() in SUFFIXES and _is_text(name):
                found.pictures.append(Path(folder, name))
            else:
                found.others.append(Path(folder, name))
    found.pictures.sort()
    return found


def _is_text(name: str) -> bool:
    """Whether a file's name is UTF-8: others cannot be written into a line of JSON."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _left_out(found: _Found, tables: Sequence[Path]) -> list[str]:
    """One line of what the folder holds and the data will not, by ending and with its reason."""
    read = set(tables)
    endings = Counter(_ending(path) for path in found.others if path not in read)
    parts = [f"{count:,} {ending}" for ending, count in sorted(endings.items())]
    reasons = [f"{', '.join(parts)} (only JPEG, PNG and WebP are read)"] if parts else []
    if found.hidden:
        reasons.append(f"{found.hidden:,} hidden (names with a dot, thumbnails)")
    return [f"left out: {'; '.join(reasons)}"] if reasons else []


def _ending(path: Path) -> str:
    if not _is_text(path.name):
        return "with names that are not UTF-8"
    return path.suffix.lower() or "without an ending"


def _entry(root: Path, path: Path, extra: dict[str, object], where: str) -> Entry:
    return Entry(None, path, where, path.relative_to(root).as_posix(), extra)
