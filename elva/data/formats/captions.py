"""What people say of their pictures: tables, caption files of known data sets, or notes in files.

The first kind of source that a folder has is read, and said; what other columns know of a picture
stays with it.
"""

import datetime
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from elva.data.formats import titles
from elva.data.formats.named import Named
from elva.data.formats.rows import rows
from elva.data.strict import Faults, Record, lines, parse, read_text
from elva.errors import DataError, counted, printable

FILES = ("file", "file_name", "filename", "image", "image_name", "picture", "path")
WORDS = ("caption", "text", "description", "comment", "title")
"""Columns of a table, the first that is there; of words `captions`, `caption_1` and so on too."""

TABLES = ("captions.csv", "captions.tsv", "captions.jsonl", "captions.parquet", "captions.txt")
_IMAGEFOLDER = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Hugging Face's `imagefolder`: beside the pictures that it names, in any folder."""

_FLICKR30K = re.compile(r"image_name *\| *comment_number *\| *comment *")
"""The header of Flickr30k's `results.csv`, as it is published on Kaggle."""

TOKENS = re.compile(r"([^\t]+)#\d+\t(.*)")
"""Flickr8k's and Flickr30k's own form: `1000268201.jpg#0<TAB>A child ...`."""

_MAX_JSON_BYTES = 512 * 2**20
"""Ours: COCO's captions of its training split are 92 MB, and take 0.9 GB of memory."""

_MAX_NOTE_BYTES = 2**20
"""Ours: of a text beside one picture."""


@dataclass(frozen=True)
class Caption:
    """What somebody said of a picture, and where: `file:line`."""

    text: str
    picture: Path
    where: str


@dataclass(frozen=True)
class Captions:
    """What is known of a folder's pictures.

    Args:
        captions: In the order of their source; none where nobody said anything.
        columns: Picture -> what else is known of it, by column.
        files: What was read.
        source: Their kind, in words; empty where there is none.
        without: Rows that name a picture and say nothing of it.
    """

    captions: list[Caption] = field(default_factory=list)
    columns: dict[Path, dict[str, object]] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    source: str = ""
    without: int = 0

    def notice(self, pictures: int) -> str:
        """A line on where the captions are from, for whoever converts so many pictures."""
        if not self.captions:
            known = f"{self.source} has" if self.source else "there are"
            return f"{known} no captions: each picture asks for itself"
        captioned = len({one.picture for one in self.captions})
        said = counted(len(self.captions), "caption")
        line = f"{said} of {counted(captioned, 'picture')} from {self.source}"
        rest = pictures - captioned
        without = counted(rest, "picture has", "pictures have")
        return f"{line}; {without} none" if rest else line


def read(root: Path, pictures: Sequence[Path], others: Sequence[Path], faults: Faults) -> Captions:
    """What is known of the pictures of a folder.

    Args:
        pictures: Under the root; no other is ever named in an answer.
        others: The other files under the root, of which those that hold captions are read.
        faults: Rows that may be left out, and in which they are listed.

    Returns:
        Captions from the first kind of source that is there: a table `captions.*`, imagefolder's
        `metadata.*`, Flickr's captions, COCO's, texts beside the pictures, the pictures' own
        titles and descriptions.

    Raises:
        DataError: a row that names no picture, as `file:line: rule`; a file of captions that is
            none.
    """
    known = Named(root, pictures)
    for kind in (_tables(TABLES), _tables(_IMAGEFOLDER), _tokens, _flickr30k, _coco, _notes):
        found = kind(known, sorted(others), faults)
        if found is not None:
            return found
    return _own(known)


Kind = Callable[[Named, Sequence[Path], Faults], Captions | None]


# -- tables --------------------------------------------------------------------------------------


def _tables(names: Sequence[str]) -> Kind:
    """The first of some names in each folder."""

    def kind(known: Named, others: Sequence[Path], faults: Faults) -> Captions | None:
        first: dict[Path, Path] = {}
        for path in sorted(
            (p for p in others if p.name in names), key=lambda p: names.index(p.name)
        ):
            first.setdefault(path.parent, path)
        return _all(known, sorted(first.values()), faults, _table) if first else None

    return kind


Row = tuple[Record, list[Path], list[str], dict[str, object]]
"""Pictures, what is said of each, and what else is known of them."""


def _all(
    known: Named,
    files: Sequence[Path],
    faults: Faults,
    read_rows: Callable[[Named, Path, Faults], Iterator[Row]],
) -> Captions:
    """The rows of some files."""
    captions: list[Caption] = []
    extra: dict[Path, dict[str, object]] = {}
    without = 0
    for file in files:
        for record, pictures, said, fields in read_rows(known, file, faults):
            captions += [Caption(one, path, record.where) for path in pictures for one in said]
            without += not said
            for path in pictures:
                extra[path] = {**fields, **extra.get(path, {})}
    more = f" and {len(files) - 1:,} more" if len(files) > 1 else ""
    source = f"{printable(str(files[0].relative_to(known.root)))}{more}"
    kept = {path: fields for path, fields in extra.items() if fields}
    return Captions(captions, kept, tuple(files), source, without)


def _table(known: Named, file: Path, faults: Faults) -> Iterator[Row]:
    if file.suffix == ".txt" and TOKENS.match(next(lines(file), ("", ""))[1]):
        yield from _token_rows(known, file, faults)
        return
    if file.suffix.lower() != ".parquet":
        next(lines(file), None)  # the names of the columns are no row that may be left out
    chosen: tuple[str, list[str]] | None = None
    for record in rows(file, (), faults, known=(*FILES, *WORDS)):
        chosen = chosen or _columns(known, file, record)
        with faults.row():
            names, words = chosen
            paths = record.paths(names) if names in record.fields else []
            if not any(paths):
                record.fail(f"{names} is empty")
            pictures = [known.find(record, name, file.parent) for name in paths if name]
            told = (one for column in words for one in _said(record, column))
            rest = {k: _plain(v) for k, v in record.fields.items() if k not in (names, *words)}
            yield record, pictures, list(dict.fromkeys(told)), rest
    if chosen is None:
        raise DataError(f"{faults.found[-1]}; no row of the file can be read")


def _said(record: Record, column: str) -> list[str]:
    found = record.texts(column) if column in record.fields else []
    return [one for one in found if one.strip()]


def _columns(known: Named, file: Path, record: Record) -> tuple[str, list[str]]:
    """The column of the picture's file, and those of what is said of it.

    The first is known by its name or, in any language, by the picture that it names in the first
    row. A table of imagefolder may have none of the others; a single other column is one.
    """
    folded = {name.casefold(): name for name in reversed(record.fields)}
    names = (
        next((folded[n] for n in FILES if n in folded), None)
        or next((n for f, n in folded.items() if re.fullmatch("(.*_)?file_names?", f)), None)
        or next((n for n, v in record.fields.items() if known.called(str(v), file.parent)), None)
    )
    if names not in FILES and any(known.called(name, file.parent) for name in record.fields):
        raise DataError(f"{file}:1: names a picture; the first line must name the columns")
    others = [name for name in record.fields if name != names]
    words = next((w for stem in WORDS if (w := _numbered(stem, others))), [])
    if names is not None and not words and len(others) == 1:
        words = others
    if names is None or not (words or file.name in _IMAGEFOLDER):
        lacks = FILES[0] if names is None else WORDS[0]
        found = ", ".join(map(repr, record.fields))
        raise DataError(
            f"{file}:1: no column {lacks}; the first line must name them, it has {found}; "
            "rename the file if it holds no captions"
        )
    return names, words


def _numbered(stem: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if re.fullmatch(rf"{stem}s?[ _]?\d*", name.casefold())]


def _plain(value: object) -> object:
    """A cell as JSON has it: parquet knows dates, exact numbers and numbers that are none."""
    if isinstance(value, datetime.date | datetime.time | Decimal):
        return str(value)
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return value.hex() if isinstance(value, bytes) else value


# -- published captions --------------------------------------------------------------------------


def _tokens(known: Named, others: Sequence[Path], faults: Faults) -> Captions | None:
    files = [path for path in others if re.search(r"\.token(\.txt)?$", path.name)]
    return _all(known, files, faults, _token_rows) if files else None


def _token_rows(known: Named, file: Path, faults: Faults) -> Iterator[Row]:
    before, read = len(faults.found), False
    for where, line in lines(file, faults):
        if not line:
            continue
        with faults.row():
            found = TOKENS.fullmatch(line)
            read = read or found is not None
            record = Record(where, {} if found is None else {"file": found[1]})
            name = record.path("file") if found else None
            if found is None or name is None:
                record.fail("not <picture>#<number>, a tab, and a caption")
            said = [found[2]] if found[2].strip() else []
            yield record, [known.find(record, name, file.parent)], said, {}
    if not read and len(faults.found) > before:
        raise DataError(f"{faults.found[-1]}; no row of the file can be read")


def _flickr30k(known: Named, others: Sequence[Path], faults: Faults) -> Captions | None:
    named = [path for path in others if path.name == "results.csv"]
    files = [path for path in named if _FLICKR30K.fullmatch(next(lines(path, faults), ("", ""))[1])]
    return _all(known, files, faults, _table) if files else None


def _coco(known: Named, others: Sequence[Path], faults: Faults) -> Captions | None:
    """COCO's captions of those splits of which the folder has any picture."""
    named = [path for path in others if re.fullmatch(r"captions(_.*)?\.json", path.name)]
    found = [(path, images) for path in named if (images := _coco_images(known, path))]
    if not found:
        return None

    def read_rows(known: Named, file: Path, faults: Faults) -> Iterator[Row]:
        return _coco_rows(known, file, dict(found)[file], faults)

    return _all(known, [path for path, _ in found], faults, read_rows)


def _coco_images(known: Named, file: Path) -> dict[str, list[dict[str, object]]]:
    """`images` and `annotations` of a file; nothing where the folder has none of its images."""
    whole = parse(str(file), read_text(file, _MAX_JSON_BYTES))
    for key, needed in (("images", ("id", "file_name")), ("annotations", ("image_id", "caption"))):
        rows = whole.get(key)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{file}: {key} is not a list of objects, as COCO's is")
        for place, row in enumerate(rows):
            if lacks := next((name for name in needed if name not in row), None):
                raise DataError(f"{file}: {key}[{place}]: {lacks} is missing")
    names = {str(row["file_name"]).rpartition("/")[2] for row in whole["images"]}
    return whole if any(path.name in names for path in known.pictures) else {}


def _coco_rows(
    known: Named, file: Path, whole: dict[str, list[dict[str, object]]], faults: Faults
) -> Iterator[Row]:
    pictures: dict[str, Path] = {}
    for place, row in enumerate(whole["images"]):
        record = Record(f"{file}: images[{place}]", row)
        with faults.row():
            name = record.path("file_name") or record.fail("file_name is empty")
            base = file.parent.parent if file.parent != known.root else known.root
            pictures[record.name("id")] = known.find(record, name, base)
    for place, row in enumerate(whole["annotations"]):
        record = Record(f"{file}: annotations[{place}]", row)
        with faults.row():
            id, said = record.name("image_id"), record.text("caption") or ""
            if id in pictures:
                yield record, [pictures[id]], [said] if said.strip() else [], {}
            elif not faults.found:  # else its image may be one of those that were left out
                record.fail(f"image_id {id} is not among the images")


# -- beside the pictures, and inside -------------------------------------------------------------


def _notes(known: Named, others: Sequence[Path], faults: Faults) -> Captions | None:
    """`a.txt` or `a.png.txt` beside `a.png`, as diffusion models are trained."""
    there = {path for path in others if path.suffix.lower() in (".txt", ".caption")}
    captions, files = [], []
    for picture in known.pictures if there else ():
        beside = (picture.with_suffix(".txt"), picture.with_suffix(".caption"),
                  picture.with_name(f"{picture.name}.txt"))  # fmt: skip
        note = next((path for path in beside if path in there), None)
        if note is None:
            continue
        files.append(note)
        with faults.row():
            said = " ".join(read_text(note, _MAX_NOTE_BYTES).split())
            if said:
                captions.append(Caption(said, picture, f"{note}:1"))
    if not files:
        return None
    source = f"texts beside them ({printable(str(files[0].relative_to(known.root)))}, ...)"
    return Captions(captions, {}, tuple(files), source, len(files) - len(captions))


def _own(known: Named) -> Captions:
    """What the pictures' own files say of them."""
    captions: list[Caption] = []
    extra: dict[Path, dict[str, object]] = {}
    for picture in known.pictures:
        if own := titles.read(picture):
            extra[picture] = {**own}
            captions += [
                Caption(one, picture, printable(str(picture)))
                for one in dict.fromkeys(own.values())
            ]
    source = "titles and descriptions in their files" if captions else ""
    return Captions(captions, extra, (), source)
