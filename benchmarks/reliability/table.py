"""The table of the rows, as benchmarks/README.md has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.reliability.row import KEPT, kept
from benchmarks.reliability.rows import ROWS


def cell(name: str, found: Mapping[str, Any]) -> str:
    """What came of a row: how many trials, how many wrong, and what the row adds."""
    row = ROWS[name]
    of = f" of {row.amount:,}" * (found["tried"] < row.amount)  # it goes on
    said = f"{found['tried']:,}{of} {row.unit}, {found['failed']:,} wrong"
    more = row.said(found)
    return f"{said}; {more}" if more else said


def table(directory: Path = KEPT) -> str:
    """A line a row that has a file."""
    lines = ["| row | what | goal | result |", "|---|---|---|---|"]
    for name, row in ROWS.items():
        found = kept(name, directory)
        if found is not None:
            link = f"[`{name}`](results/reliability/{name}.json)"
            lines.append(f"| {link} | {row.title} | {row.goal} | {cell(name, found)} |")
    return "\n".join(lines)
