"""Single bytes that flip in an index or a checkpoint: each is found, in one line.

One in four where the structure lies, in the first page of a file or the last.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.reliability.crashes.places import place
from benchmarks.reliability.row import Outcome, Trials
from elva import checkpoint
from elva.errors import IndexFault, RunError
from elva.files import MANIFEST
from elva.index import Index
from elva.model.identity import Identity

MODEL = Identity("a model", "revision", "preprocessing")
PAGE = 4_096


class Flip(NamedTuple):
    """A byte of a file, and what is done to its bits."""

    file: Path
    at: int
    bits: int


def _rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 96, generator=torch.Generator().manual_seed(seed))


@cache
def index() -> tuple[Path, ...]:
    """The files of an index: its manifest, two segments, one with codes, one with deleted rows."""
    path = place() / "flipped" / "index"
    ids = [f"item {i}" for i in range(200)]
    built = Index.build(path, ids, _rows(200, 0), model=MODEL, columns={"year": [*range(200)]})
    added = built.add([f"more {i}" for i in range(80)], _rows(80, 1), model=MODEL)
    added.delete(["item 7", "more 3"])
    return tuple(sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size))


@cache
def saved() -> tuple[Path, ...]:
    """The files of a checkpoint: weights, optimizer, state, manifest."""
    groups = {
        "weights": {"a": _rows(8, 2), "b": torch.full((), 3.0)},
        "optimizer": {"a|exp_avg": _rows(8, 3).double(), "a|step": torch.full((), 3.0)},
    }
    best = {"value": None, "step": 0, "worse": 0}
    path = checkpoint.save(
        place() / "flipped" / "stage-2", 3, groups, {"elapsed": 1.5, "best": best}
    )
    return tuple(sorted(path.iterdir()))


def drawn(draw: random.Random) -> Flip:
    """A file of either, a byte and bits of it."""
    file = draw.choice(draw.choice((index(), saved())))
    size = file.stat().st_size
    at = draw.randrange(size)
    if draw.random() < 0.25:
        at = draw.choice((0, max(0, size - PAGE))) + draw.randrange(min(PAGE, size))
    return Flip(file, at, draw.randrange(1, 256))


def trials(wanted: Trials) -> Outcome:
    """Flips of an index's or a checkpoint's bytes."""
    outcome = Outcome()
    for number in wanted.numbers:
        one = drawn(random.Random(f"{wanted.seed} {number}"))
        outcome.tried += 1
        what = "index" if one.file in index() else "checkpoint"
        name = one.file.name if what == "checkpoint" else f"index's {one.file.suffix[1:]}"
        outcome.counts[f"{what}: {name}"] += 1
        if why := _fault(one, outcome):
            outcome.wrong.append(
                f"seed {wanted.seed} number {number}, {what}, byte {one.at} ^ {one.bits} of "
                f"{name}: {why}"
            )
    return outcome


def _fault(one: Flip, outcome: Outcome) -> str:
    """What went wrong; "" where it was found."""
    before = one.file.read_bytes()
    flipped = bytes([before[one.at] ^ one.bits])
    after = before[: one.at] + flipped + before[one.at + 1 :]
    one.file.write_bytes(after)
    try:
        said = _of_index() if one.file in index() else _of_checkpoint(one.file.parent)
    except Exception as error:  # noqa: BLE001  whatever it is, it is no line
        return f"{type(error).__name__}: {error}"
    finally:
        one.file.write_bytes(before)
    if said is None and _is_blank(one, before, after):
        outcome.counts["blanks of a JSON file that became other blanks: the same file"] += 1
        return ""
    if said is None:
        return "accepted"
    place_of = one.file.name if one.file in index() else "stage-2/checkpoint-00000003: must be as"
    return "" if place_of in said and "\n" not in said else f"another line: {said}"


def _is_blank(one: Flip, before: bytes, after: bytes) -> bool:
    """Whether the byte carries nothing: between the words of a checkpoint's manifest."""
    if one.file.name != MANIFEST or not before[one.at : one.at + 1].isspace():
        return False
    return bool(json.loads(before) == json.loads(after))


def _of_index() -> str | None:
    try:
        Index(place() / "flipped" / "index")
    except IndexFault as error:
        return str(error)
    return None


def _of_checkpoint(directory: Path) -> str | None:
    """What is said of it where a training goes on from the newest, and where no other can stand in
    for it."""
    lines: list[str] = []
    found = checkpoint.newest(directory.parent, lines.append)
    try:
        checkpoint.load_whole(directory)
    except RunError as error:
        if found is not None:
            raise RuntimeError(f"a training goes on from it: {error}") from error
        return lines[0] if "\n" not in str(error) else str(error)
    if found is None:
        raise RuntimeError(f"load_whole accepts it: {lines[0]}")
    return None
