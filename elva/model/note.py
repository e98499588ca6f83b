"""What lies beside a checkpoint's weights: how it wants to be asked, and what its adapter stands
on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elva.model import adapters
from elva.model.reading import AT_RET, Reading, detect

NOTE = "elva.json"
"""Beside the weights: how a checkpoint wants to be asked, and what its adapter stands on (written
by `Retriever.save`)."""


def reading_of(path: str | Path, revision: str | None = None) -> Reading:
    """How a checkpoint is read out, by our note in it or its own files; of an adapter that says
    nothing, as its base.

    Raises:
        UserError: as what cannot be kept.
    """
    note = read_note(path)
    if note:
        return Reading.read(note["reading"]) if "reading" in note else AT_RET
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
        return folder, adapters.Base.read(Path(path), note["base"])
    return folder, adapters.base_of_stranger(folder)


def read_note(path: str | Path) -> dict[str, Any]:
    """What `save` wrote beside the weights; nothing of somebody else's checkpoint."""
    file = Path(path) / NOTE
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found


def base_of(path: Path) -> Path:
    """The directory with a checkpoint's weights: itself, or what its adapter stands on."""
    _, base = stands_on(path, None)
    return path if base is None else Path(base.path)
