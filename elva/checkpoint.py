"""Directories that are either whole or absent: safetensors and JSON, a manifest last, then a
rename.

A process killed at any moment leaves the newest complete checkpoint and perhaps a `.partial`
directory, which the next writer removes. Nothing here reads or writes pickles.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from elva.files import sha256, sync_directory, write_text

MANIFEST = "manifest.json"
STATE = "state.json"
PREFIX = "checkpoint-"


def write_directory(final: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary sibling, then make it `final` in one step.

    Raises:
        OSError: the disk is full or not writable; `final` is untouched and the sibling removed.
    """
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        manifest = {
            str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": _sync_hash(p)}
            for p in files
        }
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
        if final.exists():
            raise FileExistsError(f"{final}: must not exist yet; choose another directory")
        os.rename(partial, final)
        sync_directory(final.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors hides the system's error number in its text; callers want the real thing.
        number = (
            re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        )
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(final)) from error


def is_whole(directory: Path) -> bool:
    """Whether every file of the manifest is there with its size and hash."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    for name, entry in manifest.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        if sha256(path) != entry["sha256"]:
            return False
    return True


def save(
    parent: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    more: Callable[[Path], None],
) -> Path:
    """Write `parent/checkpoint-<step>`: a safetensors file a group of tensors, the state as JSON,
    and what `more` puts beside them."""

    def fill(directory: Path) -> None:
        for name, group in tensors.items():
            flat = {k: v.detach().cpu().contiguous().clone() for k, v in group.items()}
            save_file(flat, directory / f"{name}.safetensors")
        write_text(directory / STATE, json.dumps(state))
        more(directory)

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


def _sync_hash(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256(path)
