"""Conditions on an index's metadata."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from elva.errors import IndexFault
from elva.settings import shown

Condition = tuple[str, str, Any]
"""(field, one of = != < <= > >= in, value)"""

Where = Sequence[Condition]
"""Conditions that must all hold."""

_COMPARISONS: dict[str, Callable[..., pa.ChunkedArray]] = {
    "=": pc.equal, "==": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal,
    ">": pc.greater, ">=": pc.greater_equal, "in": pc.is_in,
}  # fmt: skip


def checked(
    where: Where | None, schema: pa.Schema, conflicts: Mapping[str, str]
) -> list[Condition]:
    """The conditions with values of their fields' types; IndexFault for one that cannot be.

    Args:
        conflicts: fields of several types, with those types.
    """
    found = []
    for condition in where or ():
        if not isinstance(condition, (tuple, list)) or len(condition) != 3:
            raise IndexFault(
                "search: where must be conditions of field, comparison and value, got "
                f"{shown(condition)}; e.g. [('year', '>=', 1999)]"
            )
        found.append(_condition(*condition, schema, conflicts))
    return found


def held(table: pa.Table, conditions: Sequence[Condition]) -> np.ndarray:
    """[rows] bool: where all hold; a value that is not there holds none."""
    mask = np.ones(table.num_rows, bool)
    for name, comparison, value in conditions:
        column = table[name]
        try:
            if comparison == "in":
                found = pc.is_in(column, value_set=pa.array(value, column.type))
            else:
                found = _COMPARISONS[comparison](column, pa.scalar(value, column.type))
        except pa.ArrowException:
            raise IndexFault(
                f"search: where must name a field that compares by {comparison}, got {name} of "
                f"{column.type}"
            ) from None
        mask &= np.asarray(found.fill_null(False))
    return mask


def _condition(
    name: str, comparison: str, value: Any, schema: pa.Schema, conflicts: Mapping[str, str]
) -> Condition:
    if isinstance(name, str) and name in conflicts:
        raise IndexFault(
            f"search: where must name a field of one type, got {name} of {conflicts[name]}; "
            "delete the items of one of them"
        )
    if name not in schema.names:
        raise IndexFault(
            f"search: where must name a field, got {shown(name)}; there are "
            f"{', '.join(schema.names)}"
        )
    kind = schema.field(name).type
    if comparison not in tuple(_COMPARISONS):
        raise IndexFault(
            f"search: where must compare by one of {' '.join(_COMPARISONS)}, got "
            f"{shown(comparison)}"
        )
    try:
        if comparison == "in":
            if isinstance(value, str):
                raise TypeError
            return name, comparison, [pa.scalar(v).cast(kind).as_py() for v in value]
        return name, comparison, pa.scalar(value).cast(kind).as_py()
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        wanted = "values" if comparison == "in" else "a value"
        raise IndexFault(
            f"search: where must give {name} {wanted} of type {kind}, got {shown(value)}"
        ) from None
