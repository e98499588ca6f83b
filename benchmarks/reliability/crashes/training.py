"""`kill -9` of a training at drawn moments, resumed until it is done: nothing is lost.

A span of stages trains once undisturbed, then again and again under kills: at a start, between
steps, inside a checkpoint's write, inside a model's save, inside an evaluation. Compared bit for
bit: every stage's model, weights and optimizer of every checkpoint that was ever written, every
line of metrics.jsonl, every evaluation.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.reliability.crashes import marks, small
from benchmarks.reliability.crashes.forks import ended, forked
from benchmarks.reliability.crashes.places import place, scratch
from benchmarks.reliability.row import Outcome, Trials
from elva.commands.train import train
from elva.processes import Processes
from elva.progress import SILENT
from elva.run import Run

KINDS = ("start", "step", "checkpoint", "model", "evaluation")
SPANS = (("0", "1"), ("1", "2"), ("2", "3"))
"""Stages of a run, so that each kill costs little; the last is followed by its controls."""

KILLS_A_RUN = 5  # ours: a run then takes about twice as long as one that nobody disturbs
PATIENCE_S = 300.0

Mark = dict[str, Any]


def _name(mark: Mark) -> tuple[str, str, int]:
    return mark["kind"], mark["stage"], mark["step"]


@dataclass
class Timeline:
    """The marks of an undisturbed run, in order, and how long what began with each took.

    start_s: until the first of them.
    """

    marks: list[Mark]
    start_s: float
    place: dict[tuple[str, str, int], int] = field(init=False)

    def __post_init__(self) -> None:
        self.place = {_name(mark): i for i, mark in enumerate(self.marks)}
        assert len(self.place) == len(self.marks), "a run that nobody disturbed repeats nothing"

    def seconds(self, index: int) -> float:
        """Of what began with a mark."""
        return float(self.marks[index + 1]["time"] - self.marks[index]["time"])

    def draw(self, count: int, draw: random.Random) -> list[int | None]:
        """Marks to kill after, in their order, kinds in turn; None is at the process's start."""
        order = range(len(self.marks) - 1)  # the last begins nothing of a stage
        of = {kind: [i for i in order if self.marks[i]["kind"] == kind] for kind in KINDS}
        first = draw.randrange(len(KINDS))
        wanted = [draw.choice(of[KINDS[(first + turn) % len(KINDS)]]) for turn in range(count)]
        found: list[int | None] = [*sorted(wanted)]
        if draw.random() < count / len(KINDS):
            found[draw.randrange(count)] = None
        return found


# -- one process, or several that train together ---------------------------------------------------


class Due(NamedTuple):
    """When to kill, and what began before."""

    time: float
    kind: str


class Ended(NamedTuple):
    """How the process that was killed ended, or one that failed; after which marks; in what it was
    killed."""

    code: int
    marks: list[Mark]
    killed_in: str


def once(
    works: Sequence[Callable[[], object]],
    printed: Path,
    due_at: Callable[[Mark | None], Due | None],
    victim: int = 0,
) -> Ended:
    """Work from its start to its end, by a process each.

    Args:
        due_at: when to kill, asked with None at the start and then with each mark.
        victim: which is killed; the others follow, as a launcher does it.
    """
    reading, writing = os.pipe()

    def watched() -> None:
        marks.watch(writing)
        works[0]()

    children = [forked(work, printed) for work in (watched, *works[1:])]
    os.close(writing)
    seen: list[Mark] = []
    killed = ""
    try:
        killed = _look_on(reading, due_at, seen)
    finally:
        os.close(reading)
        if killed:
            os.kill(children[victim], signal.SIGKILL)
        codes = [_code(child, killed) for child in children]
    of_victim = codes[victim] if killed else 0
    return Ended(of_victim or next((code for code in codes if code), 0), seen, killed)


def _look_on(reading: int, due_at: Callable[[Mark | None], Due | None], seen: list[Mark]) -> str:
    """Collect marks until a process ends, or until it is time to kill it: in what."""
    rest, due = b"", due_at(None)
    while True:
        left = PATIENCE_S if due is None else max(0.0, due.time - time.monotonic())
        ready = select.select([reading], [], [], left)[0]
        if due is not None and time.monotonic() >= due.time:
            return due.kind
        if not ready:
            raise RuntimeError(f"no mark of a training for {PATIENCE_S:.0f} s")
        read = os.read(reading, 1 << 16)
        if not read:
            return ""
        *lines, rest = (rest + read).split(b"\n")
        for mark in map(json.loads, lines):
            seen.append(mark)
            due = due or due_at(mark)


def _code(child: int, killed: str) -> int:
    if killed:
        os.kill(child, signal.SIGKILL)  # of a child that nobody has waited for, ended or not
    return ended(child)


# -- a run of a span -------------------------------------------------------------------------------


@dataclass
class Spanned:
    """A span of stages in a directory, trained by some processes.

    beginning: the run that its first stage starts from.
    """

    stages: tuple[str, ...]
    directory: Path
    beginning: Path | None
    processes: int = 1

    @property
    def printed(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.printed")

    def works(self) -> list[Callable[[], object]]:
        """What each process does: begin the run, or go on with it."""
        if self.processes == 1:
            return [lambda: self._train(Processes())]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [lambda rank=rank: self._together(rank, port) for rank in range(self.processes)]

    def _together(self, world_rank: int, port: int) -> None:
        there = {
            "RANK": world_rank, "LOCAL_RANK": world_rank, "WORLD_SIZE": self.processes,
            "LOCAL_WORLD_SIZE": self.processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        os.environ.update({name: str(value) for name, value in there.items()})
        from elva.cli.console import together

        with together() as processes:
            self._train(processes)

    def _train(self, processes: Processes) -> None:
        with processes.first_alone() as mine:
            if mine and not (self.directory / "recipe.yaml").is_file():
                Run.create(self.directory, small.recipe(small.shared()))
        begun = None if self.beginning is None else Run.open(self.beginning)
        train(
            Run.open(self.directory), SILENT, stages=self.stages, start_from=begun,
            processes=processes,
        )  # fmt: skip

    def disturbed(self, targets: Sequence[int | None], timeline: Timeline, draw: random.Random) -> (
        tuple[list[str], list[Mark]]
    ):  # fmt: skip
        """Trained to the end, killed after each of `targets`: in what it was killed, and the marks
        of all its processes."""
        kills, seen = [], []
        for target in [*targets, len(timeline.marks)]:
            share, victim = draw.random(), draw.randrange(self.processes)
            moment = _Moment(target, timeline, share)
            done = once(self.works(), self.printed, moment, victim)
            seen += done.marks
            if done.code == 0:  # by itself, perhaps before its time had come
                return kills, seen
            if done.killed_in and done.code == -signal.SIGKILL:
                kills.append(done.killed_in)
            else:
                last = self.printed.read_text().strip().splitlines()[-1:]
                raise RuntimeError(f"a training ended with {done.code}: {' '.join(last)}")
        raise RuntimeError("the last process was killed by somebody else")


class _Moment:
    """When to kill: a share of what begins with a mark after that mark, or of the start."""

    def __init__(self, target: int | None, timeline: Timeline, share: float) -> None:
        self.target, self.timeline, self.share = target, timeline, share

    def __call__(self, mark: Mark | None) -> Due | None:
        if mark is None:
            if self.target is not None:
                return None
            return Due(time.monotonic() + self.share * self.timeline.start_s, "a process's start")
        index = self.timeline.place[_name(mark)]
        if self.target is None or not self.target <= index < len(self.timeline.marks) - 1:
            return None
        return Due(mark["time"] + self.share * self.timeline.seconds(index), mark["kind"])


# -- what an undisturbed run did, and whether another is the same ----------------------------------


@cache
def undisturbed(span: int, processes: int) -> tuple[Path, Timeline]:
    """The run of a span that nobody killed, and its marks."""
    before = undisturbed(span - 1, processes)[0] if span else None
    one = Spanned(SPANS[span], place() / f"whole-{processes}-{span}", before, processes)
    small.shared()
    began = time.monotonic()
    done = once(one.works(), one.printed, lambda mark: None)
    if done.code:
        raise RuntimeError(one.printed.read_text())
    return one.directory, Timeline(done.marks, done.marks[0]["time"] - began)


def facts(run: Path) -> dict[str, Any]:
    """All of a finished run that may not depend on when it was killed: name -> content."""
    found: dict[str, Any] = {
        str(path.relative_to(run)): json.loads(path.read_text(encoding="utf-8"))
        for pattern in ("*/model/manifest.json", "*/evaluation.json", "*/stage.json")
        for path in run.glob(pattern)
    }
    for content in found.values():
        content.pop("seconds", None)  # what it took
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found["metrics.jsonl"] = sorted(lines)  # a resumed stage writes its lines behind the others'
    found["left behind"] = sorted(
        str(p.relative_to(run)) for p in run.rglob("*") if re.search("partial|checkpoint-", p.name)
    )
    return found


def differences(
    whole: Path, disturbed: Path, timeline: Timeline, seen: Sequence[Mark]
) -> list[str]:
    """Names of what is not the same to the bit."""
    one, two = facts(whole), facts(disturbed)
    found = [name for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)]
    for mark in seen:
        there = timeline.marks[timeline.place[_name(mark)]]
        found += [
            f"{mark['stage']}/checkpoint {mark['step']}/{name}"
            for name in sorted(there["files"].keys() | mark["files"].keys())
            if there["files"].get(name) != mark["files"].get(name)
        ]
    return found


# -- the row ---------------------------------------------------------------------------------------


def trials(wanted: Trials) -> Outcome:
    """Kills, `KILLS_A_RUN` to a run, spans in turn, every fourth run by two processes."""
    outcome = Outcome()
    for run, kills in Counter(number // KILLS_A_RUN for number in wanted.numbers).items():
        attempt = 0
        while kills > 0:  # on a busy machine some come when all is done
            draw = random.Random(f"{wanted.seed} {run} {attempt}")
            name = f"seed {wanted.seed} run {run} attempt {attempt}"
            done = _run(run % len(SPANS), kills, 2 if run % 4 == 3 else 1, draw, outcome, name)
            kills, attempt = kills - done, attempt + 1
            outcome.tried += done
    return outcome


def _run(
    span: int, count: int, processes: int, draw: random.Random, outcome: Outcome, name: str
) -> int:
    """One disturbed run; how often it was killed."""
    whole, timeline = undisturbed(span, processes)
    before = undisturbed(span - 1, processes)[0] if span else None
    with scratch() as there:
        one = Spanned(SPANS[span], there / "killed", before, processes)
        try:
            kills, seen = one.disturbed(timeline.draw(count, draw), timeline, draw)
        except RuntimeError as error:
            outcome.wrong.append(f"{name}: {error}")
            return count
        outcome.wrong += [f"{name}: {w}" for w in differences(whole, one.directory, timeline, seen)]
    outcome.counts.update(f"in {kind}" for kind in kills)
    outcome.counts["runs"] += 1
    outcome.counts["runs of two processes"] += processes == 2
    outcome.counts["checkpoint files compared"] += sum(len(mark["files"]) for mark in seen)
    return len(kills)
