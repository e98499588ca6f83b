"""Checkpoints inside a stage: safetensors and JSON, no pickles.

A process killed at any moment leaves the newest complete one and perhaps a `.partial` directory,
which the next writer removes.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from elva.files import is_whole, write_directory, write_text

STATE = "state.json"
PREFIX = "checkpoint-"


def save(
    parent: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Write `parent/checkpoint-<step>`: a safetensors file a group of tensors, the state as
    JSON."""

    def fill(directory: Path) -> None:
        for name, group in tensors.items():
            flat = {k: v.detach().cpu().contiguous().clone() for k, v in group.items()}
            save_file(flat, directory / f"{name}.safetensors")
        write_text(directory / STATE, json.dumps(state))

    final = parent / f"{PREFIX}{step:08d}"
    if (
        final.exists()
    ):  # left by a run that was killed after writing it and resumed from an older one
        shutil.rmtree(final)
    write_directory(final, fill)
    return final


def load(directory: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save` wrote."""
    tensors = {p.stem: load_file(p) for p in sorted(directory.glob("*.safetensors"))}
    state: dict[str, Any] = json.loads((directory / STATE).read_text(encoding="utf-8"))
    return tensors, state


def newest(parent: Path) -> Path | None:
    """The latest checkpoint that verifies; a damaged one is passed over for the one before it."""
    for directory in sorted(parent.glob(f"{PREFIX}*[0-9]"), reverse=True):
        if is_whole(directory):
            return directory
    return None


def prune(parent: Path, keep: int) -> None:
    """Remove all but the latest `keep` checkpoints."""
    found = sorted(parent.glob(f"{PREFIX}*[0-9]"))
    for directory in found[: max(0, len(found) - keep)]:
        shutil.rmtree(directory)
