"""What is known of items beside what they say and show, as columns of an index."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from elva.data.schema import COLUMNS

TEXTS = frozenset({"caption"})
"""Fields of texts, whatever their values are: the next one may be a word."""

OWN = COLUMNS
"""Columns of every index."""


def kinds(rows: Iterable[Mapping[str, Any]]) -> dict[str, pa.DataType]:
    """Field -> number or text, over all rows, so that all their segments agree: a number where
    every value is one, but in `TEXTS`."""
    numbers: dict[str, bool] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                number = name not in TEXTS and _number(value) is not None
                numbers[name] = numbers.get(name, True) and number
    return {n: pa.float64() if number else pa.string() for n, number in sorted(numbers.items())}


def arrays(
    rows: Sequence[Mapping[str, Any]],
    kinds: Mapping[str, pa.DataType],
    own: Iterable[str] = OWN,
) -> dict[str, pa.Array]:
    """Column -> a value for each row, null where it has none.

    Args:
        kinds: As `kinds` gives them.
        own: Names that are taken: a field of such a name is the column `source_<name>`.
    """
    taken = {*own}
    found = {}
    for name, kind in kinds.items():
        values = [row.get(name) for row in rows]
        read = _number if kind == pa.float64() else str
        place = name
        while place in taken or (place != name and place in kinds):
            place = f"source_{place}"
        found[place] = pa.array([None if v is None else read(v) for v in values], kind)
    return found


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        return None
