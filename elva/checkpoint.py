"""Checkpoints inside a stage: safetensors and JSON, no pickles.

checkpoint-<step>/<group>.safetensors   whole tensors by parameter name, however many processes
                                        trained them: any number can go on
checkpoint-<step>/state.json            {step, groups, state}
checkpoint-<step>/manifest.json         size and SHA-256 of each file, written last

A process killed at any moment leaves the newest complete one and perhaps a `.partial` directory,
which the next writer removes.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from elva.errors import MAX_MESSAGE, RunError, UserError, printable
from elva.files import PARTIAL, fault, listed, read_bounded, write_directory, write_text
from elva.settings import JSON_BYTES, FileSize, Name, Places, build, read_json

STATE = "state.json"
PREFIX = "checkpoint-"


@dataclass(frozen=True)
class _State:
    """What `state.json` holds."""

    step: FileSize
    groups: tuple[Name, ...]
    state: Mapping[str, Any]


def save(
    parent: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> Path:
    """Write `parent/checkpoint-<step>`: a safetensors file a group of tensors, the state as JSON.

    Raises:
        OSError: the disk is full or not writable; the checkpoints before it stay.
    """

    def fill(directory: Path) -> None:
        for name, group in tensors.items():
            flat = {k: v.detach().cpu().contiguous().clone() for k, v in group.items()}
            save_file(flat, directory / f"{name}.safetensors")
        told = {"step": step, "groups": sorted(tensors), "state": dict(state)}
        write_text(directory / STATE, json.dumps(told))

    final = place(parent, step)
    if final.exists():  # damaged, and so passed over by the run that now comes here again
        shutil.rmtree(final)
    write_directory(final, fill)
    return final


def place(parent: Path, step: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return parent / f"{PREFIX}{step:08d}"


def load(directory: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save` wrote."""
    told = _state(directory)
    tensors = {name: load_file(directory / f"{name}.safetensors") for name in told.groups}
    return tensors, dict(told.state)


def load_whole(directory: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The same of a checkpoint that no other can stand in for; RunError where it is damaged."""
    if (why := _damage(directory)) is not None:
        raise RunError(
            f"{directory}: must be as it was written, got {why}; delete its stage's directory, "
            "and --resume trains that stage again"
        )
    return load(directory)


def newest(parent: Path, say: Callable[[str], None] = lambda line: None) -> Path | None:
    """The latest whole checkpoint; None where there is none.

    Args:
        say: takes a line for each damaged one that was passed over, and one about where training
            then goes on.
    """
    found, damaged = None, 0
    for directory in reversed(_all(parent)):
        if (why := _damage(directory)) is None:
            found = directory
            break
        damaged += 1
        say(f"{parent.name}/{directory.name}: must be as it was written, passed over: {why}")
    if damaged:
        start = "its start, no checkpoint is whole" if found is None else found.name
        say(f"{parent.name}: goes on from {start}")
    return found


def step_of(directory: Path) -> int:
    """The steps that were done when a checkpoint was written."""
    return int(directory.name.removeprefix(PREFIX))


def last_step(parent: Path) -> int:
    """Of the latest checkpoint, whole or not; 0 where there is none."""
    return max(map(step_of, _all(parent)), default=0)


def prune(parent: Path, keep: int) -> None:
    """Remove all but the latest `keep` checkpoints; with `keep` 0 what a killed writer left too."""
    found = _all(parent)
    for directory in found[: max(0, len(found) - keep)]:
        shutil.rmtree(directory)
    if keep == 0:
        for directory in parent.glob(f"{PREFIX}*{PARTIAL}"):
            shutil.rmtree(directory)


def _all(parent: Path) -> list[Path]:
    found = (p for p in parent.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", p.name))
    return sorted(found, key=step_of)


def _damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, beyond its manifest, which anybody could have written."""
    if (why := fault(directory)) is not None:
        return why
    try:
        told = _state(directory)
        if told.step != step_of(directory):
            return f"{STATE} is of step {told.step}"
        lacking = {f"{name}.safetensors" for name in told.groups} - {*listed(directory)}
        if lacking:
            return f"{min(lacking)} is missing"
        for name in told.groups:
            with safe_open(directory / f"{name}.safetensors", "pt") as file:
                file.keys()
    except (OSError, UserError, SafetensorError) as error:
        said = " ".join(str(error).split())  # what a header says is quoted as it is
        return f"{type(error).__name__}: {printable(said)[:MAX_MESSAGE]}"
    return None


def _state(directory: Path) -> _State:
    places = Places(STATE)
    content = read_bounded(directory / STATE, JSON_BYTES)
    found: _State = build(_State, read_json(content, places), places)
    return found
