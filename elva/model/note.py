"""What lies beside a checkpoint's weights: how it wants to be asked, and what its adapter stands
on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elva.errors import UserError
from elva.model import adapters
from elva.model.reading import AT_RET, Reading, detect

NOTE = "elva.json"
"""Beside the weights: how a checkpoint wants to be asked, and what its adapter stands on (written
by `Retriever.save`)."""

LENGTH = "max_completion_length"
"""In it, of what `elva export` wrote: tokens of a summary at most."""


def reading_of(path: str | Path, revision: str | None = None) -> Reading:
    """How a checkpoint is read out, by our note in it or its own files; of an adapter that says
    nothing, as its base.

    Raises:
        UserError: as what cannot be kept.
    """
    note = read_note(path)
    if note:
        try:
            return Reading.read(note["reading"]) if "reading" in note else AT_RET
        except (TypeError, ValueError, LookupError):
            raise _foreign(path, "a reading") from None
    found, (_, base) = detect(path, revision), stands_on(path, revision)
    if found.at_ret and base is not None:
        return reading_of(base.path, base.revision)
    return found


def stands_on(path: str | Path, revision: str | None) -> tuple[Path | None, adapters.Base | None]:
    """Where a checkpoint's adapter lies and what it stands on; None for one that is whole."""
    folder, note = adapters.folder_of(path, revision), read_note(path)
    if folder is None:
        return None, None
    if "base" in note:
        try:
            return folder, adapters.Base.read(Path(path), note["base"])
        except (TypeError, LookupError):
            raise _foreign(path, "the base of an adapter") from None
    return folder, adapters.base_of_stranger(folder)


def read_note(path: str | Path) -> dict[str, Any]:
    """What `save` wrote beside the weights; nothing of somebody else's checkpoint.

    Raises:
        UserError: it is not what `save` writes.
    """
    file = Path(path) / NOTE
    try:
        found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _foreign(path, "a JSON object")
    return found


def trained_on(path: str | Path) -> list[str] | None:
    """What a checkpoint that began from nothing has been trained on; None of any other."""
    found = read_note(path).get("trained_on")
    if found is None or (isinstance(found, list) and all(isinstance(one, str) for one in found)):
        return found
    raise _foreign(path, "a list of names as trained_on")


def kept_length(path: str | Path) -> int | None:
    """Tokens of a summary, of an exported checkpoint; None of any other."""
    found = read_note(path).get(LENGTH)
    if found is None or (type(found) is int and found >= 0):
        return found
    raise _foreign(path, f"a number of tokens as {LENGTH}")


def _foreign(path: str | Path, what: str) -> UserError:
    return UserError(
        f"{Path(path) / NOTE}: must hold {what} as this version of ELVA writes it; copy the "
        "checkpoint again"
    )


def base_of(path: Path) -> Path:
    """The directory with a checkpoint's weights: itself, or what its adapter stands on."""
    _, base = stands_on(path, None)
    return path if base is None else Path(base.path)
