"""The objects of a JSON file that is one list or one object, each with the line it begins on."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from elva.data.strict import Faults, Record, parse, read_text
from elva.errors import DataError

_MAX_BYTES = 512 * 2**20
"""Ours: Karpathy's Flickr30k is 36 MB, COCO's list of its unlabelled pictures 31 MB."""

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


def objects(path: Path, faults: Faults, key: str | None = None) -> Iterator[tuple[str, Record]]:
    """Every object of a list, or of an object's values: its number or name, and it as a record of
    `file:line: [number or name]`.

    Args:
        faults: Objects that may be left out, and in which they are listed.
        key: Of the object that the file is, whose value they lie in; None: the file's own.

    Raises:
        DataError: no JSON, neither a list nor an object, empty, a name twice, no such key; an
            element that is no object, or breaks a rule of `strict.parse`.
    """
    text = read_text(path, _MAX_BYTES)
    members = _members(path, text, _after_space(text, 0), whole=True)
    if key is not None:
        places = {name: at for name, at, _ in members}
        if key not in places:
            raise DataError(f"{path}: {key} is missing")
        members = _members(path, text, places[key])
    line, seen, empty = 1, 0, True
    for name, at, end in members:
        line, seen, empty = line + text.count("\n", seen, at), at, False
        with faults.row():
            where = f"{path}:{line}: {key or ''}[{name}]"
            yield name, Record(where, parse(where, text[at:end]))
    if empty:
        raise DataError(f"{path}: holds no rows")


def _members(
    path: Path, text: str, at: int, *, whole: bool = False
) -> Iterator[tuple[str, int, int]]:
    """(name or number, where its value begins, where it ends) of a list or object at a place.

    Args:
        whole: Nothing may stand behind it.
    """
    kind = text[at : at + 1]
    if kind not in ("[", "{"):
        _fail(path, text, at, "neither a list nor an object")
    end, names = "]" if kind == "[" else "}", set[str]()
    at = _after_space(text, at + 1)
    while text[at : at + 1] != end or names:
        name = str(len(names))
        if kind == "{":
            name, at = _name(path, text, at)
            if name in names:
                _fail(path, text, at, f"key {name!r} twice")
        names.add(name)
        start, (_, at) = at, _value(path, text, at)
        yield name, start, at
        at = _after_space(text, at)
        if text[at : at + 1] == end:
            break
        if text[at : at + 1] != ",":
            _fail(path, text, at, f"not JSON: no , or {end} after an element")
        at = _after_space(text, at + 1)
    if whole and _after_space(text, at + 1) < len(text):
        _fail(path, text, at + 1, f"not JSON: more after the last {end}")


def _name(path: Path, text: str, at: int) -> tuple[str, int]:
    """A member's name, and where its value begins."""
    name, end = _value(path, text, at)
    colon = _after_space(text, end)
    if not isinstance(name, str) or text[colon : colon + 1] != ":":
        _fail(path, text, at, 'not JSON: no "name":')
    return name, _after_space(text, colon + 1)


def _value(path: Path, text: str, at: int) -> tuple[object, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        _fail(path, text, error.pos, f"not JSON: {error.msg}")
    except RecursionError:
        _fail(path, text, at, "nested too deeply")


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _fail(path: Path, text: str, at: int, rule: str) -> NoReturn:
    raise DataError(f"{path}:{1 + text.count(chr(10), 0, at)}: {rule}")
