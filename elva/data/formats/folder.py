"""A folder of pictures, with captions where there are any: people's own pictures.

Where somebody captioned them (`captions.py`), each caption asks for its pictures. Else each picture
asks for itself: enough to embed, index and search the folder. A picture keeps its own name, its
path under the folder, and a number by that name.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from elva.data import pictures
from elva.data.formats import captions
from elva.data.formats.scan import PictureFile, Scan, lines, scan
from elva.data.formats.source import Entry, Example, Request, Source
from elva.data.identity import DECODERS
from elva.data.schema import COLUMNS
from elva.data.strict import HINT, Faults
from elva.errors import DataError, PictureFault, counted, printable

PROMPTS = {
    ("text", "image"): "Find the picture.",
    ("image", "image"): "Find the same picture.",
    ("image,text", "image"): "Find the picture that is so changed.",
}
"""(query, candidate modality) -> how a folder is asked."""

NUMBERS = range(1_000_000, 100_000_000)
"""Ours: the numbers of folders among M-BEIR's datasets."""

LEFT_OUT = ("large", "HEIF", "AVIF")
"""Kinds of pictures that are counted where they are not read; damaged ones are bad rows."""

AT_ONCE = 256
"""Ours: pictures decoded between two looks at the bar and the first fault."""


@dataclass
class _Seen:
    """Pictures that were decoded: those that can be read, and what each shows."""

    pictures: list[PictureFile] = field(default_factory=list)
    looks: dict[bytes | str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """What lies in a folder, as far as names, headers and captions say.

    Args:
        pictures: What can be shown, as far as the files' headers say.
        left_out: Why other files are left out -> their names.
        known: Name -> captions and what else is known of a picture.
        notices: Lines for whoever is to know.
    """

    pictures: list[PictureFile]
    left_out: dict[str, list[str]]
    known: dict[str, dict[str, object]]
    notices: list[str]


def contents(root: Path, faults: Faults) -> Contents:
    """Look into a folder; nothing is decoded.

    Args:
        faults: Rows of captions that may be left out, and in which they are listed.

    Raises:
        DataError: no folder, no picture in it, or captions that are not as their format has them.
    """
    found, told = _found(root, faults)
    shown = [picture for picture in found.pictures if _has_header(picture, found)]
    known = {path.relative_to(root).as_posix(): about for path, about in _known_of(told).items()}
    notices = [*([told.notice(len(shown))] if told.captions else []), *lines(found.left_out)]
    if not shown:
        raise DataError(
            "; ".join([f"{printable(str(root))}: holds no picture that is read", *notices])
        )
    return Contents(shown, found.left_out, known, notices)


def read(request: Request) -> Source:
    """The pictures under a folder, in the order of their names, each decoded once."""
    root = request.path
    found, told = _found(root, request.faults)
    seen = _seen(found, request)
    copies = _copies(seen)
    notices = [told.notice(len(seen.pictures))] if seen.pictures else []
    notices += _without(told, seen)
    if copies and request.duplicates == "drop":
        found.leave_out("duplicates", *sorted(copies))
    elif copies:
        shown = counted(len(copies), "picture shows", "pictures show")
        kept = ("is kept", "it") if len(copies) == 1 else ("are kept", "them")
        notices.append(
            f"{shown} what another one shows, and {kept[0]}; --duplicates drop leaves {kept[1]} out"
        )
    renamed = sorted({n for columns in told.columns.values() for n in columns} & COLUMNS)
    notices += [f"column {name} is kept as source_{name}: an index has its own" for name in renamed]
    dropped = copies if request.duplicates == "drop" else {}
    notices += lines({why: names for why, names in found.left_out.items() if why != "damaged"})
    if not seen.pictures:
        raise DataError(
            "; ".join([f"{printable(str(root))}: holds no picture that can be read", *notices])
        )
    return _source(root, told, seen, dropped, notices, found.left_out)


def headers(request: Request) -> Source:
    """As `read`, but only headers are looked at: copies are not told apart, and a picture that is
    damaged beyond its header is met by whoever decodes it."""
    found, told = _found(request.path, request.faults)
    seen = _Seen([picture for picture in found.pictures if _has_header(picture, found)])
    if not seen.pictures:
        raise DataError(f"{printable(str(request.path))}: holds no picture that is read")
    return _source(request.path, told, seen, {}, _without(told, seen), found.left_out)


def _has_header(picture: PictureFile, found: Scan) -> bool:
    """Whether a picture may be shown, as far as its header says; if not, it is left out."""
    try:
        pictures.size(picture.path)
    except PictureFault as fault:
        if fault.kind in LEFT_OUT:
            found.leave_out(fault.kind, picture.name)
            return False
    return True  # a damaged one too: whoever decodes it counts it


def _found(root: Path, faults: Faults) -> tuple[Scan, captions.Captions]:
    """What lies in a folder, and what of it says something of its pictures."""
    found = scan(root)
    files = [picture.path for picture in found.pictures]
    told = captions.read(root, files, [root / name for name in found.others], faults)
    read = {file.relative_to(root).as_posix() for file in told.files}
    found.leave_out("formats", *(name for name in found.others if name not in read))
    return found, told


def dataset_number(root: Path) -> int:
    """The number of a folder among M-BEIR's datasets, by where it lies."""
    digest = hashlib.sha256(os.fsencode(root.resolve())).digest()
    return NUMBERS[int.from_bytes(digest[:8], "big") % len(NUMBERS)]


def _known_of(told: captions.Captions) -> dict[Path, dict[str, object]]:
    """Picture -> what is known of it beside what it shows: its captions, and a table's columns."""
    said: dict[Path, list[str]] = defaultdict(list)
    for one in told.captions:
        said[one.picture].append(one.text)
    known: dict[Path, dict[str, object]] = {p: {"caption": " / ".join(t)} for p, t in said.items()}
    for picture, columns in told.columns.items():
        known[picture] = {**known.get(picture, {}), **columns}
    return known


def _source(
    root: Path,
    told: captions.Captions,
    seen: _Seen,
    dropped: Mapping[str, str],
    notices: list[str],
    left_out: Mapping[str, Sequence[str]],
) -> Source:
    known = _known_of(told)
    names = {picture.path: picture.name for picture in seen.pictures}
    kept = {path: dropped.get(name, name) for path, name in names.items()}
    entries = {
        picture.name: Entry(None, picture.path, printable(str(picture.path)), None,
                            known.get(picture.path, {}), picture.name)
        for picture in seen.pictures if picture.name not in dropped
    }  # fmt: skip
    examples: Iterator[Example]
    if told.captions:
        examples = (
            Example(Entry(one.text, None, one.where), [entries[kept[one.picture]]])
            for one in told.captions
            if one.picture in kept
        )
        candidates: Sequence[Entry] = [*entries.values()]
    else:
        examples = (Example(entry, [entry]) for entry in entries.values())
        candidates = []
    return Source(
        "folder", dataset_number(root), "", examples, candidates, prompts=PROMPTS,
        one_query=bool(told.captions), notices=notices, looks=seen.looks, left_out=left_out,
    )  # fmt: skip


def _seen(found: Scan, request: Request) -> _Seen:
    """Those pictures that can be shown; the others are left out, damaged ones as far as allowed."""
    seen = _Seen()
    total = len(found.pictures)
    request.reporter.start(f"look at {printable(str(request.path))}", total, "pictures")
    with ThreadPoolExecutor(DECODERS) as pool:
        for start in range(0, total, AT_ONCE):
            some = found.pictures[start : start + AT_ONCE]
            for picture, look in zip(some, pool.map(_look, some), strict=True):
                if isinstance(look, bytes):
                    seen.pictures.append(picture)
                    seen.looks[picture.name] = look
                    continue
                kind = look.__cause__.kind if isinstance(look.__cause__, PictureFault) else ""
                if kind in LEFT_OUT:
                    found.leave_out(kind, picture.name)
                    continue
                with request.faults.row(HINT):
                    raise look
                found.leave_out("damaged", picture.name)
            request.reporter.advance(start + len(some))
    request.reporter.finish("")
    return seen


def _look(picture: PictureFile) -> bytes | DataError:
    """What a picture shows, or why it cannot be shown."""
    try:
        return picture.item().content_hash()
    except DataError as error:
        return error


def _copies(seen: _Seen) -> dict[str, str]:
    """Name -> the first name of what shows the same."""
    first: dict[bytes, str] = {}
    for picture in seen.pictures:
        first.setdefault(seen.looks[picture.name], picture.name)
    named = {picture.name: first[seen.looks[picture.name]] for picture in seen.pictures}
    return {name: other for name, other in named.items() if other != name}


def _without(told: captions.Captions, seen: _Seen) -> list[str]:
    """A line on captions whose picture is left out."""
    there = {picture.path for picture in seen.pictures}
    count = sum(one.picture not in there for one in told.captions)
    said = counted(count, "caption is left out with its picture",
                   "captions are left out with their pictures")  # fmt: skip
    return [said] if count else []
