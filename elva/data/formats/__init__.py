"""The formats that `elva data convert` knows, each by the name of its reader."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from elva.data.formats import (
    beir,
    choices,
    circo,
    flickr30k,
    folder,
    mmeb,
    mteb,
    nli,
    tevatron,
    urban1k,
)
from elva.data.formats.source import Request, Source
from elva.data.formats.writer import check_output, convert
from elva.data.layout import SPLITS
from elva.data.strict import Faults
from elva.errors import DataError
from elva.progress import SILENT, Reporter

FORMATS: dict[str, Callable[[Request], Source]] = {
    "beir": beir.read,
    "folder": folder.read,
    "mmeb": mmeb.read,
    "mmeb-test": mmeb.read_test,
    "mteb": mteb.read,
    "nli": nli.read,
    "tevatron": tevatron.read,
}

UNSEEN: dict[str, Callable[[Request], Source]] = {
    "ccneg": choices.ccneg,
    "circo": circo.read,
    "flickr30k": flickr30k.read,
    "sugarcrepe": choices.sugarcrepe,
    "urban1k": urban1k.read,
}
"""Published sets that the paper evaluates on and does not train on."""

KNOWN = {**FORMATS, **UNSEEN}

_WITH_IMAGES = ("ccneg", "circo", "flickr30k", "mmeb", "mmeb-test", "sugarcrepe", "tevatron")
"""Formats whose pictures may lie in a folder of their own."""


def convert_file(
    format: str,
    source: Path,
    output: Path,
    *,
    split: str = "train",
    name: str | None = None,
    number: int | None = None,
    instruction: str | None = None,
    images: Path | None = None,
    skip_bad: int = 0,
    duplicates: str = "keep",
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Convert a file or folder of a known format to a data directory.

    Args:
        name, number, instruction: the reader's own for None.
        images: the folder that pictures' paths start from; the reader's rule for None.
        skip_bad: so many bad rows are left out and listed; one more ends it.
        duplicates: of a folder, `keep` or `drop` pictures that show what another one shows.

    Returns:
        As `convert`, and `left_out`: why files of a folder are not in the data -> their names.

    Raises:
        DataError: an unknown format, or a row that is not as its format has it.
    """
    if format not in KNOWN:
        raise DataError(f"format must be one of {', '.join(KNOWN)}, got {format!r}")
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if images is not None:
        _check_images(format, images)
    if duplicates not in ("keep", "drop"):
        raise DataError(f"duplicates must be keep or drop, got {duplicates!r}")
    if duplicates != "keep" and format != "folder":
        raise DataError(f"duplicates is for folder, got it for {format}")
    if format == "folder" and output.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{output}: must lie outside of the folder {source}; choose another place")
    check_output(output)  # before a reader takes its time
    faults = Faults(skip_bad)
    found = KNOWN[format](Request(source, split, images, faults, duplicates, reporter))
    found = replace(found, name=_name(found.name if name is None else name))
    if number is not None and number != found.number:
        found = replace(found, number=number, keeps_ids=False)
    if instruction is not None:
        line = _line(instruction)
        found = replace(found, instruction=line, prompts=dict.fromkeys(found.prompts, line))
    return {**convert(found, output, split=split, faults=faults), "left_out": found.left_out}


def _check_images(format: str, images: Path) -> None:
    if format not in _WITH_IMAGES:
        raise DataError(f"images is for {', '.join(_WITH_IMAGES)}, got it for {format}")
    if not images.is_dir():
        raise DataError(f"{images}: no such folder")


def _name(name: str) -> str:
    """A dataset's name, which becomes part of file names that the loader takes apart."""
    if not re.fullmatch("[A-Za-z0-9_]{1,100}", name):
        raise DataError(f"name must be 1 to 100 letters, digits and _, got {name!r}")
    return name


def _line(instruction: str) -> str:
    """An instruction, which becomes a cell of a table of lines and tabs."""
    if re.search("[\\t\\r\\n\ud800-\udfff]", instruction):
        raise DataError(f"instruction must be one line of text without tabs, got {instruction!r}")
    return instruction.strip()
