"""`kill -9` while an index is written: it is the old one or the new one, never a third state.

A kill comes at a drawn one of the calls by which files change, half of a write done, or at a drawn
time. What comes next is done in its place: it succeeds, to the same bytes as undisturbed, and
nothing that the kill left stays.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.reliability.crashes import calls
from benchmarks.reliability.crashes.forks import ended, forked
from benchmarks.reliability.crashes.places import place, scratch
from benchmarks.reliability.row import Outcome, Trials
from elva.commands import build_index
from elva.index import Index, manifest
from elva.index.compact import compact
from elva.model.identity import Identity

MODEL = "a model"
LATE = 1.3
"""Ours: kills by time are drawn up to so many times what an undisturbed change takes."""


def rows_of(name: str, count: int) -> dict[str, Any]:
    """A .npy file and its ids, as `elva index build` takes them."""
    folder = place() / "rows"
    folder.mkdir(exist_ok=True)
    npy, ids = folder / f"{name}.npy", folder / f"{name}.txt"
    if not ids.exists():
        draw = np.random.default_rng(count)
        np.save(npy, draw.standard_normal((count, 64), dtype=np.float32))
        ids.write_text("".join(f"{name} {i}\n" for i in range(count)))
    return {"npy": npy, "ids": ids, "model": MODEL}


def _build(path: Path) -> None:
    build_index.build(path, [], overwrite=True, **rows_of("new", 300))


def _add(path: Path) -> None:
    embeddings = torch.from_numpy(np.load(rows_of("more", 120)["npy"]))
    ids = [f"more {i}" for i in range(len(embeddings))]
    Index(path).add(ids, embeddings, model=Identity(MODEL, MODEL, "unknown"))


def _delete(path: Path) -> None:
    Index(path).delete([f"old {i}" for i in range(0, 200, 3)])


def _begin(path: Path) -> None:
    build_index.build(path, [], codes=False, **rows_of("old", 200))


CHANGES: dict[str, tuple[tuple[Callable[[Path], object], ...], Callable[[Path], object]]] = {
    "build": ((), _build),
    "build over another": ((_begin,), _build),
    "add": ((_begin,), _add),
    "delete": ((_begin, _add), _delete),
    "compact": ((_begin, _add, _delete), compact),
    "codes": ((_begin, _add), Index.with_codes),
}
"""What is killed, and what was done before it."""


def state(path: Path) -> Any:
    """An index to the byte, but for the names of its files and how often it was changed; None for
    none.

    Raises:
        IndexFault: a third state.
    """
    if not manifest.exists(path):
        return None
    Index(path)  # every checksum
    found = manifest.read(path)
    said = asdict(found)
    del said["generation"]
    said["segments"] = [
        (entry.rows, entry.deleted, {_digest(path / manifest.SEGMENTS / n) for n in entry.files})
        for entry in found.segments
    ]
    return said


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_behind(path: Path) -> list[str]:
    """Names of files that are no part of an index."""
    known = {name for entry in manifest.read(path).segments for name in entry.files}
    known |= {manifest.FILE, manifest.LOCK}
    return sorted(p.name for p in path.rglob("*") if p.is_file() and p.name not in known)


class Known(NamedTuple):
    """A change that nobody disturbed."""

    before: Path
    old: Any
    new: Any
    calls: int
    seconds: float


@cache
def known(name: str) -> Known:
    """What it does, in how many calls, and how long it takes."""
    earlier, change = CHANGES[name]
    before, after = place() / f"{name} before", place() / f"{name} after"
    for one in earlier:
        done(one, before)
    if before.exists():
        shutil.copytree(before, after)
    told, began = place() / "counted", time.monotonic()
    done(lambda path: counted(change, path, told), after)
    seconds = time.monotonic() - began
    return Known(before, state(before), state(after), int(told.read_text()), seconds)


def counted(
    change: Callable[[Path], object], path: Path, told: Path, code: int = calls.KILL
) -> None:
    """Do it, and write down in how many calls.

    Args:
        code: of those that can fail with it; `calls.KILL` for those where a kill can come.
    """
    calls.at(path, 0, code)
    change(path)
    told.write_text(str(calls.count()))


def done(change: Callable[[Path], object], path: Path) -> None:
    """A change by a process of its own, which ends well."""
    printed = place() / "printed"
    if ended(forked(lambda: change(path), printed)):
        raise RuntimeError(printed.read_text().strip().splitlines()[-1])


def trials(wanted: Trials) -> Outcome:
    """Kills, changes in turn."""
    outcome = Outcome()
    for number in wanted.numbers:
        name = [*CHANGES][number % len(CHANGES)]
        draw = random.Random(f"{wanted.seed} {number}")
        outcome.tried += 1
        with scratch() as there:
            try:
                _killed(name, there / "index", draw, outcome)
            except Exception as error:  # noqa: BLE001  the next is tried all the same
                outcome.wrong.append(
                    f"seed {wanted.seed} number {number} ({name}): {type(error).__name__} {error}"
                )
    return outcome


def _killed(name: str, path: Path, draw: random.Random, outcome: Outcome) -> None:
    one, change = known(name), CHANGES[name][1]
    while True:
        if one.before.exists():
            shutil.copytree(one.before, path)
        timed = draw.random() < 0.3
        moment = draw.uniform(0, LATE * one.seconds) if timed else draw.randint(1, one.calls)
        if _kill(change, path, moment):
            break
        shutil.rmtree(path)  # it was done before its time came
    outcome.counts["by time" if timed else "at a call"] += 1
    now = state(path)
    if now not in (one.old, one.new):
        raise RuntimeError(f"a third state after a kill at {moment}")
    outcome.counts["new" if now == one.new else "old"] += 1
    again, wanted = (change, one.new) if now == one.old else (_build, known("build").new)
    done(again, path)
    if (after := state(path)) != wanted:
        other = [name for name in wanted if after[name] != wanted[name]]
        raise RuntimeError(f"other {other} by the next change, after a kill at {moment}")
    if left := left_behind(path):
        raise RuntimeError(f"{left} left behind after a kill at {moment} and the next change")


def _kill(change: Callable[[Path], object], path: Path, moment: float) -> bool:
    """Whether a change was killed: at a call by its number, or after seconds."""
    reading, writing = os.pipe()

    def work() -> None:
        if isinstance(moment, int):
            calls.at(path, moment, calls.KILL)
        os.close(writing)
        change(path)

    child = forked(work, place() / "printed")
    os.close(writing)
    os.read(reading, 1)  # it begins
    os.close(reading)
    if isinstance(moment, float):
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    code = ended(child)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError((place() / "printed").read_text().strip().splitlines()[-1])
    return code != 0
