"""The formats that `elva data convert` knows, each by the name of its reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from elva.data.formats import folder, mmeb, mteb, nli, tevatron
from elva.data.formats.source import Source, convert
from elva.data.schema import DataError
from elva.data.strict import Faults

FORMATS: dict[str, Callable[[Path, Faults], Source]] = {
    "folder": folder.read,
    "mmeb": mmeb.read,
    "mmeb-test": mmeb.read_test,
    "mteb": mteb.read,
    "nli": nli.read,
    "tevatron": tevatron.read,
}


def convert_file(
    format: str,
    source: Path,
    output: Path,
    *,
    split: str = "train",
    name: str | None = None,
    number: int | None = None,
    instruction: str | None = None,
    skip_bad: int = 0,
) -> dict[str, Any]:
    """Convert a file or folder of a known format to a data directory.

    Args:
        name, number, instruction: the reader's own for None.
        skip_bad: so many bad rows are left out and listed; one more ends it.

    Raises:
        DataError: an unknown format, or a row that is not as its format has it.
    """
    if format not in FORMATS:
        raise DataError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    faults = Faults(skip_bad)
    found = FORMATS[format](source, faults)
    given: dict[str, Any] = {"name": name, "number": number, "instruction": instruction}
    chosen = replace(found, **{k: v for k, v in given.items() if v is not None})
    return convert(chosen, output, split=split, faults=faults)
