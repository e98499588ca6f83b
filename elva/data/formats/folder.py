"""A folder of pictures, with captions where there are any: people's own pictures.

With a table of captions (`file`, `caption`, and whatever else is known) each caption asks for its
pictures. Without, each picture asks for itself: enough to embed, index and search the folder.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elva.data.formats.rows import rows
from elva.data.formats.source import Entry, Example, Request, Source, shown
from elva.data.strict import Faults, Record
from elva.errors import DataError

CAPTIONS = ("captions.csv", "captions.jsonl", "captions.txt", "metadata.csv", "metadata.jsonl")
"""Ours, Flickr8k's, imagefolder's; the first that is there is read."""

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"}
THUMBNAILS = {"@eaDir", "__MACOSX"}
"""What a server and an archive leave beside pictures, besides hidden files."""

FILE, CAPTION = ("file", "image", "file_name", "filename"), ("caption", "text")


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
    tables = [path / name for name in CAPTIONS if (path / name).is_file()]
    left_out = _left_out(found, tables[:1])
    if not found.pictures:
        raise DataError("; ".join([f"{path}: holds no JPEG, PNG or WebP picture", *left_out]))
    entries = (_entry(path, p, {}, shown(p)) for p in found.pictures)
    if not tables:
        alone = (Example(entry, [entry]) for entry in entries)
        return Source("folder", 14, "Find the same picture.", alone, notices=left_out)
    examples = _captioned(path, tables[0], found.pictures, request.faults)
    return Source(
        "folder", 14, "Find the picture.", examples, entries, one_query=True, notices=left_out
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
    others = [path for path in found.others if path not in tables]
    captions = [path for path in others if path.name in CAPTIONS]
    endings = Counter(_ending(path) for path in others if path not in captions)
    parts = [f"{count:,} {ending}" for ending, count in sorted(endings.items())]
    reasons = [f"{', '.join(parts)} (only JPEG, PNG and WebP are read)"] if parts else []
    if captions:
        more = f" and {len(captions) - 3:,} more" if len(captions) > 3 else ""
        named = ", ".join(shown(path) for path in captions[:3]) + more
        used = tables[0].name if tables else "a folder's own table"
        reasons.append(f"{named} (only {used} is read)")
    if found.hidden:
        reasons.append(f"{found.hidden:,} hidden (names with a dot, thumbnails)")
    return [f"left out: {'; '.join(reasons)}"] if reasons else []


def _ending(path: Path) -> str:
    if not _is_text(path.name):
        return "with names that are not UTF-8"
    return path.suffix.lower() or "without an ending"


def _captioned(
    path: Path, captions: Path, pictures: Sequence[Path], faults: Faults
) -> Iterator[Example]:
    places: dict[str, list[Path]] = defaultdict(list)
    for picture in pictures:
        places[picture.name].append(picture)
    columns: tuple[str, str] | None = None
    for record in rows(captions, (), faults, known=(*FILE, *CAPTION)):
        columns = columns or _columns(captions, record)
        with faults.row():
            name = record.path(columns[0]) or record.fail(f"{columns[0]} is empty")
            picture = _picture(record, path, name, places)
            extra = {k: v for k, v in record.fields.items() if k not in columns}
            caption = Entry(record.text(columns[1]), None, record.where)
            yield Example(caption, [_entry(path, picture, extra, record.where)])


def _columns(captions: Path, record: Record) -> tuple[str, str]:
    """The columns of the picture's file and of its caption."""
    file, caption = (
        next((n for n in some if n in record.fields), None) for some in (FILE, CAPTION)
    )
    if file is None or caption is None:
        found = ", ".join(record.fields)
        raise DataError(
            f"{captions}:1: no column {FILE[0]} or no column {CAPTION[0]}; there are {found}"
        )
    return file, caption


def _picture(record: Record, root: Path, name: str, places: Mapping[str, Sequence[Path]]) -> Path:
    """The file of a name: its path under the folder, or the only file below that is called so."""
    if (root / name).is_file():
        return root / name
    found = places.get(name, [])
    if len(found) == 1:
        return found[0]
    rule = f"{name} lies in several folders" if found else f"no such picture: {name}"
    raise DataError(f"{record.where}: {rule}")


def _entry(root: Path, path: Path, extra: dict[str, object], where: str) -> Entry:
    return Entry(None, path, where, path.relative_to(root).as_posix(), extra)
