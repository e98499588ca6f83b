"""Lines and JSON of text files: written plainly, read as if nobody vouched for them.

Every fault is `file:line: rule`.
"""

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, AnyStr, BinaryIO, NoReturn

from elva.data.schema import hashed_id
from elva.errors import DataError, counted

# Ours: the longest M-BEIR line is a few MiB; beyond this a file is not what it says it is.
MAX_LINE_BYTES = 64 * 2**20

_HEAD_BYTES = 65_536
"""Ours: of a file, by which its encoding and line end are known."""

_MAX_PATH_BYTES = 3000
"""Ours: Linux's limit is 4,096 with the root, and 255 for each part; beyond it `stat` fails."""


HINT = "; --skip-bad leaves out as many"
"""The end of a line on a picture that cannot be read, where none may be left out."""


class Faults:
    """Bad rows that are left out and listed, as many as are allowed.

    Args:
        allowed: How many; one more is raised.
    """

    def __init__(self, allowed: int = 0) -> None:
        self.allowed = allowed
        self.found: list[str] = []

    @contextmanager
    def row(self, hint: str = "") -> Iterator[None]:
        """Leave out the row that is read in this block if it is bad.

        Args:
            hint: the end of its line where it is raised and none is allowed.
        """
        try:
            yield
        except DataError as error:
            if len(self.found) >= self.allowed:
                if not self.allowed:
                    if not hint:
                        raise
                    raise DataError(f"{error}{hint}") from error
                count = len(self.found)
                were = counted(count, "bad row was", "bad rows were")
                raise DataError(f"{error}; {were} allowed, this is number {count + 1}") from error
            self.found.append(str(error))


class Record:
    """One JSON object of a file; its accessors check what they return.

    Args:
        where: `file:line`.
        fields: The object.
    """

    def __init__(self, where: str, fields: dict[str, object]) -> None:
        self.where = where
        self.fields = fields

    def fail(self, rule: str) -> NoReturn:
        """Raise the DataError for this line."""
        raise DataError(f"{self.where}: {rule}")

    def value(self, key: str) -> object:
        """A field that must be there."""
        if key not in self.fields:
            self.fail(f"{key} is missing")
        return self.fields[key]

    def text(self, key: str) -> str | None:
        """A string or null."""
        value = self.value(key)
        if value is not None and not isinstance(value, str):
            self.fail(f"{key} is not a string or null")
        return value

    def id(self, key: str) -> str:
        """`<dataset>:<number>`."""
        return self._id(key, self.value(key))

    def ids(self, key: str) -> tuple[str, ...]:
        """A list of ids, each a string or an object with a `did`."""
        values = self.value(key)
        if not isinstance(values, list):
            self.fail(f"{key} is not a list")
        return tuple(
            self._id(key, value.get("did") if isinstance(value, dict) else value)
            for value in values
        )

    def modality(self, key: str) -> str:
        """`text`, `image` or `image,text`, whatever the order in the file."""
        value = self.text(key)
        modality = modality_of(value or "")
        if modality is None:
            self.fail(f"{key} {value!r} is not text, image or image,text")
        return modality

    def path(self, key: str) -> str | None:
        """A relative path that stays under its root, or null.

        Checked as words only: a symbolic link inside the root is its owner's decision (picture
        folders of this size are often linked from another disk).
        """
        return self._path(key, self.text(key))

    def paths(self, key: str) -> list[str | None]:
        """A list of such paths; see `texts`."""
        return [self._path(key, value) for value in self.texts(key)]

    def texts(self, key: str) -> list[str]:
        """A list of strings, where null is ""; one string is a list of one, null an empty one."""
        value = self.value(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        found = [v or "" for v in values if isinstance(v, str | None)]
        if len(found) < len(values):
            self.fail(f"{key} is not a list of strings")
        return found

    def name(self, key: str) -> str:
        """A source's own id, which may be any string or whole number but not empty."""
        return self._name(key, self.value(key))

    def names(self, key: str) -> list[str]:
        """A list of such ids; null is an empty one."""
        values = self.value(key)
        if not isinstance(values, list | None):
            self.fail(f"{key} is not a list of ids")
        return [self._name(key, value) for value in values or ()]

    def picture(self, key: str, root: Path) -> Path | bytes | None:
        """A path under the root, or parquet's encoded bytes; None where there is neither."""
        value = self.get(key)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if not value:
            return None
        if not isinstance(value, str):
            self.fail(f"{key} is not a path or a picture")
        path = self._path(key, value)
        return None if path is None else root / path

    def _path(self, key: str, value: str | None) -> str | None:
        if not value:
            return None
        parts = re.split(r"[/\\]", value)
        if "://" in value or value.startswith("data:"):
            self.fail(f"{key} {value!r} is a URL; only files under the root are read")
        if not parts[0] or ":" in parts[0]:
            self.fail(f"{key} {value!r} is absolute; only files under the root are read")
        if ".." in parts:
            self.fail(f"{key} {value!r} leaves the root")
        if "\0" in value:
            self.fail(f"{key} holds a null character")
        if len(value.encode()) > _MAX_PATH_BYTES or max(len(p.encode()) for p in parts) > 255:
            self.fail(f"{key} {value!r} is longer than a file's name may be")
        return value

    def get(self, key: str) -> object:
        """A field that may be missing."""
        return self.fields.get(key)

    def _name(self, key: str, value: object) -> str:
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            self.fail(f"{key} {value!r} is not an id")
        return str(value)

    def _id(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            self.fail(f"{key} holds {value!r}, not an id")
        try:
            hashed_id(value)
        except ValueError as error:
            self.fail(f"{key}: {error}")
        return value


def modality_of(value: str) -> str | None:
    """The canonical spelling of a set of modalities, or None if it is none."""
    found = {part.strip() for part in value.split(",")}
    if found == {"image", "text"}:
        return "image,text"
    return value.strip() if found in ({"image"}, {"text"}) else None


def lines(path: Path, faults: Faults | None = None) -> Iterator[tuple[str, str]]:
    """(`file:line`, text without its line end) of every line of a text file; all that ELVA reads go
    through here: strict UTF-8, or UTF-16 by its mark; capped length; no byte order mark; lines end
    as on any system; empty lines at the end are none, and others are "".

    Raises:
        DataError: not readable, too long, or in another encoding, as `file:line: rule`.
    """
    faults, empty = faults or Faults(), range(0)
    try:
        with open(path, "rb") as stream:
            encoding, end = _form(path, stream)
            usual = (encoding, end) == ("utf-8", "\n")
            read = _texts if usual else partial(_other_texts, encoding=encoding, end=end)
            for number, line in read(path, stream, faults):
                if not line.strip(" \t\r\n"):
                    empty = range(empty.start or number, number + 1)
                    continue
                yield from ((f"{path}:{passed}", "") for passed in empty)
                empty = range(0)
                yield f"{path}:{number}", line.rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def read_text(path: Path, limit: int = MAX_LINE_BYTES) -> str:
    """The whole of a text file of so many bytes at most, in the encodings of `lines`.

    Raises:
        DataError: as `lines`, or larger.
    """
    try:
        with open(path, "rb") as stream:
            encoding, _ = _form(path, stream)
            content = stream.read(limit + 1)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if len(content) > limit:
        raise DataError(f"{path}: is larger than {limit:,} bytes, which are read at most")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].count(b"\n")
        raise DataError(f"{path}:{line}: {_undecoded(error, encoding.upper())}") from error


def columns(line: str) -> list[str]:
    """What spaces and tabs separate; nothing else does: ids may hold every other character."""
    return [field for field in re.split("[ \t]+", line) if field]


def records(path: Path, faults: Faults | None = None) -> Iterator[Record]:
    """The JSON objects of a file, one a line; no duplicate keys, no NaN or Infinity."""
    faults = faults or Faults()
    for where, line in lines(path, faults):
        record = None
        with faults.row():
            if not line:  # a row may be missing
                raise DataError(f"{where}: not JSON: an empty line")
            record = Record(where, parse(where, line))
        if record is not None:
            yield record


def write_lines(path: Path, rows: Iterable[str]) -> None:
    """Write a file of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(f"{row}\n" for row in rows)


def dump(row: Mapping[str, object]) -> str:
    """One line of JSON."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _form(path: Path, stream: BinaryIO) -> tuple[str, str]:
    """The encoding and the line end of a file, from its beginning; its mark is passed over."""
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise DataError(f"{path}:1: is UTF-32; save the file as UTF-8")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = head[: len(head) // 2 * 2].decode("utf-16", "ignore")
        return "utf-16", _line_end(text)
    if head.startswith(codecs.BOM_UTF8):
        stream.seek(len(codecs.BOM_UTF8))
    if 4 * head[:512].count(0) > len(head[:512]):
        raise DataError(f"{path}:1: looks like UTF-16 without its mark; save the file as UTF-8")
    return "utf-8", _line_end(head.decode("latin-1"))


def _line_end(head: str) -> str:
    """Old Macs, and Excel when it saves for them, end lines with a carriage return alone."""
    return "\r" if "\r" in head and "\n" not in head else "\n"


def _texts(path: Path, stream: BinaryIO, faults: Faults) -> Iterator[tuple[int, str]]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        text = None
        with faults.row():
            text = _decoded(f"{path}:{number}", line)
        if text is not None:
            yield number, text
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES + 1)  # the rest of a line left out


def _other_texts(
    path: Path, stream: BinaryIO, faults: Faults, encoding: str, end: str
) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with io.TextIOWrapper(stream, encoding, newline=end) as texts:
            while line := texts.readline(MAX_LINE_BYTES + 1):
                number += 1
                text = None
                with faults.row():
                    text = _short_enough(f"{path}:{number}", line)
                if text is not None:
                    yield number, text
                while len(line) > MAX_LINE_BYTES and not line.endswith(end):
                    line = texts.readline(MAX_LINE_BYTES + 1)  # the rest of a line left out
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number + 1}: {_undecoded(error, encoding.upper())}") from error


def _short_enough(where: str, line: AnyStr) -> AnyStr:
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{where}: line is longer than {MAX_LINE_BYTES} bytes")
    return line


def _decoded(where: str, line: bytes) -> str:
    _short_enough(where, line)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {_undecoded(error, 'UTF-8')}") from error


def _undecoded(error: UnicodeDecodeError, encoding: str) -> str:
    """What is no text, and as what it would be: most such files were saved by Windows."""
    rule = f"not {encoding} at byte {error.start}"
    found = error.object[error.start : error.start + 1]
    try:
        letter = found.decode("cp1252")
    except UnicodeDecodeError:
        return rule
    if encoding == "UTF-8" and letter.isprintable():
        rule += f"; in Windows-1252 it is {letter!r}: save the file as UTF-8"
    return rule


def parse(where: str, line: str) -> dict[str, Any]:
    """The object that a text of JSON is.

    Args:
        where: `file:line` or a file, for the error.

    Raises:
        DataError: not JSON, no object, a key twice, NaN or Infinity, a lone surrogate.
    """
    try:
        fields = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_constant)
        # Lone surrogates parse as JSON but are no text, and no tokenizer takes them.
        if "\\u" in line:
            json.dumps(fields, ensure_ascii=False).encode()
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds a lone surrogate") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply") from error
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: not JSON: {reason}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: not a JSON object")
    return fields


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DataError(f"key {key!r} twice")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise DataError(f"{name} is not JSON")
