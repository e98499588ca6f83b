"""A row of the table: what is tried, how often, and what came of it, kept as a file."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report

KEPT = report.RESULTS / "reliability"
SHOWN = 200  # ours: so many failures are kept in words, all are counted


class Trials(NamedTuple):
    """Which trials are wanted: those numbered `first` to `first + count - 1`, drawn by `seed`."""

    first: int
    count: int
    seed: int

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass
class Outcome:
    """What came of some trials.

    tried: how many they were.
    counts: what happened, by its name; added up.
    most: the largest of a measured figure, by its name.
    wrong: a line for each trial that went wrong, which says how to have it again.
    noted: what was no failure but is to be listed, in lines.
    """

    tried: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    most: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    noted: list[str] = field(default_factory=list)

    def measured(self, name: str, value: float) -> None:
        """Keeps `value` where it is the largest so far; NaN is the largest of all."""
        if not value <= self.most.get(name, float("-inf")):
            self.most[name] = value

    def add(self, other: Outcome) -> None:
        self.tried += other.tried
        self.counts.update(other.counts)
        for name, value in other.most.items():
            self.measured(name, value)
        self.wrong += other.wrong
        self.noted += other.noted


class Row(NamedTuple):
    """A row of the table.

    title: what is tried, for the table.
    goal: what the row is held to, in words.
    unit: what a trial is, in the plural.
    amount: trials that the goal asks for.
    smoke: trials that CI does each time.
    chunk: trials after which the file is written, and where a run that was ended goes on.
    run: does trials.
    said: the table's cell, made of what was kept; "" adds nothing to the counts.
    missing: what this machine lacks for it, in words; "" for nothing.
    """

    title: str
    goal: str
    unit: str
    amount: int
    smoke: int
    chunk: int
    run: Callable[[Trials], Outcome]
    said: Callable[[Mapping[str, Any]], str] = lambda kept: ""
    missing: Callable[[], str] = lambda: ""


def kept(name: str, directory: Path = KEPT) -> dict[str, Any] | None:
    """What is known of a row, or None."""
    file = directory / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def measure(
    name: str, row: Row, amount: int, seed: int, *, processes: int = 1, directory: Path = KEPT
) -> dict[str, Any]:
    """Trials up to `amount`, those behind what the row's file has of this seed; the file's content.

    What has been tried is kept after each chunk; a run that was ended goes on from there.
    """
    found = kept(name, directory)
    if found is not None and found["seed"] != seed:
        raise SystemExit(
            f"{name}: --seed must be {found['seed']}, of which {found['tried']:,} trials are kept, "
            f"got {seed}; --fresh forgets them"
        )
    if found is None:
        found = {
            "row": name, "title": row.title, "goal": row.goal, "unit": row.unit, "seed": seed,
            "tried": 0, "failed": 0, "counts": {}, "most": {}, "wrong": [], "noted": [],
            "parts": [],
        }  # fmt: skip
    begun = found["tried"]
    if begun >= amount:
        print(f"{name}: {begun:,} {row.unit} are kept, {found['failed']} wrong; --fresh tries anew")
    chunks = [
        Trials(first, min(row.chunk, amount - first), seed)
        for first in range(begun, amount, row.chunk)
    ]
    part = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "first": begun, "tried": 0,
        "processes": processes, "seconds": 0.0, "machine": report.machine(),
    }  # fmt: skip
    before, began = list(found["parts"]), time.monotonic()
    for outcome in _done(row, chunks, processes):
        _merge(found, outcome)
        part["tried"] += outcome.tried
        part["seconds"] = round(time.monotonic() - began, 1)
        found["parts"] = [*before, part]
        directory.mkdir(parents=True, exist_ok=True)
        written = directory / f"{name}.json.partial"
        written.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        written.replace(directory / f"{name}.json")
        print(
            f"{name}: {found['tried']:,} of {amount:,} {row.unit}, {found['failed']} wrong, "
            f"{part['tried'] / max(part['seconds'], 1e-9):.3g} a second",
            flush=True,
        )
    return found


def _done(row: Row, chunks: list[Trials], processes: int) -> Iterator[Outcome]:
    """Outcomes in the order of the chunks, so that a file holds all trials before its last one."""
    if processes == 1:
        yield from map(row.run, chunks)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(row.run, chunks)


def _merge(found: dict[str, Any], outcome: Outcome) -> None:
    all_of = Outcome(0, Counter(found["counts"]), found["most"], found["wrong"], found["noted"])
    all_of.add(outcome)
    found["tried"] += outcome.tried
    found["failed"] += len(outcome.wrong)
    found["counts"] = dict(sorted(all_of.counts.items()))
    found["most"] = all_of.most
    found["wrong"], found["noted"] = all_of.wrong[:SHOWN], all_of.noted
