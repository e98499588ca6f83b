"""Frozen dataclasses from plain data: every key, type and value checked, every fault one line.

The data is a YAML file's (`read_yaml`) or JSON that nobody vouches for (`read_json`).

A field states its rule in its annotation: `Annotated[float, at_least(0)]`, a `Literal` of names, or
a dataclass of further fields. A dataclass whose fields depend on each other yields the broken
rules from a method `faults`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import yaml

from elva.errors import UserError

MOST = 2**31 - 1
"""Ours: no count of a recipe comes near it, and every library beneath takes it."""


@dataclass(frozen=True)
class Rule:
    """What a value of the right type must be: `words` stand after "must"."""

    words: str
    holds: Callable[[Any], bool]


def between(low: float, high: float) -> Rule:
    """A number from `low` to `high`, both allowed."""
    return Rule(f"be from {low:,} to {high:,}", lambda value: low <= value <= high)


def at_least(low: float) -> Rule:
    return Rule(f"be finite and at least {low}", lambda value: low <= value < math.inf)


def over(low: float) -> Rule:
    return Rule(f"be finite and over {low}", lambda value: low < value < math.inf)


def _is_plain(value: Any) -> bool:
    """A finite number, a text, or one level of a list or mapping of them."""
    found = value if isinstance(value, list) else [value]
    found = list(value.values()) if isinstance(value, Mapping) else found
    return all(math.isfinite(x) if isinstance(x, float) else isinstance(x, (int, str)) or x is None
               for x in found)  # fmt: skip


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


Count = Annotated[int, between(1, MOST)]
Whole = Annotated[int, between(0, MOST)]
Number = Annotated[float, Rule("be finite", math.isfinite)]
Positive = Annotated[float, over(0)]
Weight = Annotated[float, at_least(0)]
Share = Annotated[float, between(0, 1)]
Plain = Annotated[Any, Rule("be finite numbers or texts", _is_plain)]
Text = Annotated[str, Rule("be valid text without null characters", _is_text)]
Name = Annotated[
    str, Rule("be a word of letters, digits, _ and -", re.compile(r"\w[\w-]*", re.A).fullmatch)
]
FileSize = Annotated[int, between(0, 2**62)]
Sha256 = Annotated[str, Rule("be a SHA-256 in hexadecimal", re.compile(r"[0-9a-f]{64}").fullmatch)]

JSON_BYTES, _JSON_VALUES = 64 << 20, 4_000_000
"""Ours: what a file that is read as a whole may hold, far over what is ever written."""


@dataclass(frozen=True)
class Places:
    """Where values come from: `known` maps a field's path to `file:line`; `default` is the rest's.

    A path that is not known stands where the nearest field around it does.
    """

    default: str
    known: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def refuse(self, path: str, rule: str, *got: Any) -> NoReturn:
        """Raise the UserError of a field: one line of bounded length, whatever the value is."""
        around = path
        while around and around not in self.known:
            around = around.rpartition(".")[0]
        where = self.known.get(around, self.default)
        words = f"{path} {rule}" if path else rule
        if got:
            words += f", got {shown(got[0])}"
        raise UserError(f"{where}: {''.join(c if c.isprintable() else '?' for c in words)}")


def shown(value: Any) -> str:
    """A value's representation, shortened."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxlevel = 2
    try:
        return short.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"


# -- reading ---------------------------------------------------------------------------------------


def read_yaml(file: Path) -> tuple[Any, Places]:
    """The data of a YAML file and the line of each of its fields.

    Raises:
        UserError: not readable, no YAML, a key twice, or nested beyond Python's recursion limit.
    """
    places: dict[str, str] = {}
    try:
        loader = yaml.SafeLoader(file.read_bytes())
        node = loader.get_single_node()
        if node is not None:
            _locate(node, "", file, places, set())
        data = None if node is None else loader.construct_document(node)
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{file}: must be a readable YAML file; it is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: must be a readable YAML file; {reason}") from None
    return data, Places(str(file), places)


def _locate(node: yaml.Node, path: str, file: Path, places: dict[str, str], seen: set[int]) -> None:
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:
        return
    seen.add(id(node))  # an alias stands where its anchor does
    for key, value in node.value:
        inner = f"{path}.{key.value}" if path else str(key.value)
        place = f"{file}:{key.start_mark.line + 1}"
        if inner in places:
            Places(place).refuse(inner, f"must be set once, is set at {places[inner]} too")
        places[inner] = place
        _locate(value, inner, file, places, seen)


def read_json(content: bytes, places: Places) -> Any:
    """The data of a JSON file, as if nobody vouched for it: bounded time and memory.

    Raises:
        UserError: no JSON in UTF-8, over `JSON_BYTES`, a key twice, NaN, a lone surrogate.
    """
    values = sum(content.count(mark) for mark in (b"[", b"{", b",", b":"))
    if len(content) > JSON_BYTES or values > _JSON_VALUES:
        places.refuse("", f"must be JSON of up to {JSON_BYTES:,} bytes and {_JSON_VALUES:,} values")
    try:
        data = json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
        if b"\\u" in content:
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        places.refuse("", "must be readable JSON; it is nested too deeply")
    except ValueError as error:  # the codec's too, and that of a number of thousands of digits
        places.refuse("", f"must be readable JSON; {' '.join(str(error).split())[:200]}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def read_value(text: str) -> Any:
    """One YAML value; what is none is a string."""
    try:
        return yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return text


# -- building --------------------------------------------------------------------------------------


def build(kind: Any, data: Any, places: Places, path: str = "") -> Any:
    """`kind` constructed from plain data.

    Raises:
        UserError: an unknown or missing key, a wrong type, or a value against its field's rule.
    """
    origin = typing.get_origin(kind)
    if origin is Annotated:
        value = build(kind.__origin__, data, places, path)
        for rule in kind.__metadata__:
            if not rule.holds(value):
                places.refuse(path, f"must {rule.words}", data)
        return value
    if origin in (types.UnionType, typing.Union):
        inner = next(a for a in typing.get_args(kind) if a is not type(None))
        return None if data is None else build(inner, data, places, path)
    if origin is Literal:
        allowed = typing.get_args(kind)
        if type(data) not in map(type, allowed) or data not in allowed:  # True is no 1
            places.refuse(path, f"must be one of {', '.join(map(str, allowed))}", data)
        return data
    if origin is tuple:
        if not isinstance(data, list):
            places.refuse(path, "must be a list", data)
        one = typing.get_args(kind)[0]
        return tuple(build(one, value, places, f"{path}.{i}") for i, value in enumerate(data))
    if dataclasses.is_dataclass(kind) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(data, Mapping):
            places.refuse(path or "recipe", "must be a mapping", data)
        if not dataclasses.is_dataclass(kind):
            keys, values = typing.get_args(kind)
            return {
                build(keys, str(k), places, f"{path}.{k}"): build(values, v, places, f"{path}.{k}")
                for k, v in data.items()
            }
        return _dataclass(kind, data, places, path)
    return _scalar(kind, data, places, path)


def _dataclass(kind: Any, data: Mapping[str, Any], places: Places, path: str) -> Any:
    hints = _hints(kind)
    prefix = f"{path}." if path else ""
    for key in data:
        if key not in hints:
            fields = ", ".join(hints)
            places.refuse(
                f"{prefix}{str(key)[:80]}", f"is not a field; the fields here are {fields}"
            )
    for field in dataclasses.fields(kind):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and field.name not in data:
            places.refuse(f"{prefix}{field.name}", "must be set")
    made = kind(**{k: build(hints[k], v, places, f"{prefix}{k}") for k, v in data.items()})
    faults: Iterator[tuple[str, str]] = made.faults() if hasattr(made, "faults") else iter(())
    for name, rule in faults:
        got = [getattr(made, name)] if name in hints else []
        places.refuse(f"{prefix}{name}", f"must {rule}", *got)
    return made


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _scalar(kind: Any, data: Any, places: Places, path: str) -> Any:
    if kind is Any:
        return data
    value = data
    if kind is float and isinstance(data, str):  # YAML 1.1 reads 1e-4 as a word
        with contextlib.suppress(ValueError):
            value = float(data)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        try:
            value = float(data)
        except OverflowError:
            value = math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        places.refuse(path, f"must be a {kind.__name__}", data)
    return value
