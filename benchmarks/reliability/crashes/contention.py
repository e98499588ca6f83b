"""Two processes at one directory: one wins, the other says so in one line, nothing is lost.

Both wait at a gate, so that they begin at once, and then a drawn moment each.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.reliability.crashes import indexing, small
from benchmarks.reliability.crashes.forks import ended, forked
from benchmarks.reliability.crashes.places import place, scratch
from benchmarks.reliability.row import Outcome, Trials
from elva.errors import IndexFault, UserError
from elva.files import MANIFEST, PARTIAL, fault, write_directory, write_text
from elva.index import Index
from elva.run import Run

MOST_LATE_S = 0.03
"""Ours: a drawn part of it is slept before work; a change of an index takes as long."""

Work = Callable[[], object]


class Ended(NamedTuple):
    """What came of one of two: `answer`, or what it said."""

    answer: Any
    said: str


def together(works: list[Work], there: Path, draw: random.Random) -> list[Ended]:
    """What comes of works that begin at once, each in a process of its own.

    Raises:
        RuntimeError: one ended otherwise than with an answer or a line of ELVA's errors.
    """
    gate, open_gate = os.pipe()
    children = []
    for number, work in enumerate(works):
        told, late = there / f"told-{number}", draw.uniform(0, MOST_LATE_S)

        def tell(work: Work = work, told: Path = told, late: float = late) -> None:
            os.close(open_gate)
            os.read(gate, 1)
            time.sleep(late)
            told.write_text(json.dumps(_tried(work)))

        children.append(forked(tell, told))
    os.close(gate)
    os.close(open_gate)
    codes = [ended(child) for child in children]
    said = [(there / f"told-{number}").read_text() for number in range(len(works))]
    if any(codes):
        raise RuntimeError(f"a process ended with {max(codes)}: {' '.join(said)[-300:]}")
    found = [Ended(*json.loads(text)) for text in said]
    for one in found:
        if "\n" in one.said:
            raise RuntimeError(one.said)
    return found


def _tried(work: Work) -> Ended:
    try:
        return Ended(work(), "")
    except UserError as error:
        return Ended(None, str(error))
    except Exception:  # noqa: BLE001  what it is is read by who waits
        return Ended(None, traceback.format_exc())


def _won(found: list[Ended], line: str) -> list[int]:
    """Who won; every other said the line."""
    for one in found:
        if one.said and line not in one.said:
            raise RuntimeError(f"another line than {line!r}: {one.said}")
    winners = [i for i, one in enumerate(found) if not one.said]
    if not winners:
        raise RuntimeError(f"nobody won: {found[0].said}")
    return winners


# -- indexes ---------------------------------------------------------------------------------------

ONE_WRITER = "must have one writer at a time, got a second; wait for the other"


def _copied(name: str, there: Path) -> Path:
    """An index as it is before a change of `indexing.CHANGES`."""
    path = there / "index"
    shutil.copytree(indexing.known(name).before, path)
    return path


def _written(change: Work) -> Work:
    def work() -> None:
        change()

    return work


def two_writers(there: Path, draw: random.Random) -> str:
    """Each adds an item of its own: each that was not refused is found."""
    path = _copied("add", there)
    before = len(Index(path))

    def add(number: int) -> Work:
        rows, model = torch.full((1, 64), number + 1.0), Index(path).model
        return _written(lambda: Index(path).add([f"by {number}"], rows, model=model))

    winners = _won(together([add(0), add(1)], there, draw), ONE_WRITER)
    index = Index(path)
    found = {id for id in index.ids(range(len(index))) if id.startswith("by ")}
    if found != {f"by {number}" for number in winners} or len(index) != before + len(winners):
        raise RuntimeError(f"{winners} won, found {found} in {len(index)}, there were {before}")
    if left := indexing.left_behind(path):
        raise RuntimeError(f"{left} left behind")
    return "both in turn" if len(winners) == 2 else "one won, one said so"


def two_builders(there: Path, draw: random.Random) -> str:
    """Both build an index where none is: it is one's, whole."""
    path = there / "index"

    def build() -> None:
        indexing.build_index.build(path, [], **indexing.rows_of("new", 300))

    found = together([build, build], there, draw)
    lines = (ONE_WRITER, "must not hold an index yet")
    winners = _won(found, lines[any(lines[1] in one.said for one in found)])
    if len(winners) != 1 or indexing.state(path) != indexing.known("build").new:
        raise RuntimeError(f"{winners} won, and the index is another")
    if left := indexing.left_behind(path):
        raise RuntimeError(f"{left} left behind")
    return "one won, one said so"


def a_reader_beside_a_writer(there: Path, draw: random.Random) -> str:
    """What is read is all of the old index or all of the new, again and again."""
    name = draw.choice(("build over another", "add", "compact", "codes", "delete"))
    path, change = _copied(name, there), indexing.CHANGES[name][1]

    def read() -> list[Any]:
        return [_seen(path) for _ in range(6)]

    right = [_seen(indexing.known(name).before), _seen(place() / f"{name} after")]
    reader, _ = found = together([read, _written(lambda: change(path))], there, draw)
    _won(found, "nothing is to be refused")
    if any(one not in right for one in reader.answer):
        raise RuntimeError(f"{name}: read {reader.answer}, neither of {right}")
    both = len({json.dumps(one) for one in reader.answer})
    return "read before and after a change" if both == 2 else "read before or after a change"


def _seen(path: Path) -> list[Any]:
    """All ids, and what a search finds with which scores."""
    index = Index(path)
    found = index.search(torch.ones(1, 64), 3)
    return [
        sorted(index.ids(index.alive.nonzero()[0])), index.ids(found.rows[0].tolist()),
        found.scores[0].tolist(),
    ]  # fmt: skip


def a_reader_of_a_removed_index(there: Path, draw: random.Random) -> str:
    """An index that is open answers on; one that is opened then is there or is not."""
    path = _copied("add", there)
    held, right = Index(path), _seen(path)

    def read() -> str:
        answers = [held.ids(held.search(torch.ones(1, 64), 3).rows[0].tolist())]
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
        answers.append(held.ids(held.search(torch.ones(1, 64), 3).rows[0].tolist()))
        assert answers[0] == answers[1], answers
        return ""

    def open_it() -> Any:
        try:
            return _seen(path)
        except IndexFault as error:
            assert "\n" not in str(error) and str(path) in str(error), str(error)
            return "gone"

    found = together([read, open_it], there, draw)
    _won(found, "nothing is to be refused")
    if found[1].answer not in (right, "gone"):
        raise RuntimeError(f"read {found[1].answer}")
    return "open and removed"


# -- runs and their directories --------------------------------------------------------------------


@cache
def _recipes() -> list[Any]:
    recipe = small.recipe(place())
    return [replace(recipe, seed=seed) for seed in (1, 2)]


def two_runs(there: Path, draw: random.Random) -> str:
    """Both begin a run in one directory: what lies there is the winner's alone."""
    directory = there / "run"

    def begin(number: int) -> Work:
        def work() -> int:
            run = Run.create(directory, _recipes()[number])
            with run.locked():
                run.log("0", 1, {"loss": float(number)})
                time.sleep(draw.uniform(0, MOST_LATE_S))
            return number

        return work

    found = together([begin(0), begin(1)], there, draw)
    for one in found:
        if one.said and not any(
            w in one.said for w in ("must be empty to start", "by one process")
        ):
            raise RuntimeError(one.said)
    winners = [one.answer for one in found if not one.said]
    if len(winners) != 1:
        raise RuntimeError(f"{len(winners)} won: {[one.said for one in found]}")
    run = Run.open(directory)
    facts = json.loads((directory / "run.json").read_text())
    losses = [line["loss"] for line in run.metrics()]
    if (run.recipe.seed, facts["seed"]) != (winners[0] + 1,) * 2 or losses != [float(winners[0])]:
        raise RuntimeError(f"{winners} won: seeds {run.recipe.seed}, {facts['seed']}, {losses}")
    return "one won, one said so"


def two_trainings(there: Path, draw: random.Random) -> str:
    """Both go on with one run: never both at a time."""
    run = Run.create(there / "run", _recipes()[0])
    at_work = there / "at work"

    def go_on() -> None:
        with run.locked():
            os.close(os.open(at_work, os.O_CREAT | os.O_EXCL))
            run.log("0", 1, {"loss": 0.5})
            time.sleep(draw.uniform(0.2, 0.8))
            at_work.unlink()

    winners = _won(together([go_on, go_on], there, draw), "must be trained by one process")
    if len(run.metrics()) != len(winners):
        raise RuntimeError(f"{winners} won, {len(run.metrics())} lines")
    return "both in turn" if len(winners) == 2 else "one won, one said so"


def two_directories(there: Path, draw: random.Random) -> str:
    """Both write a checkpoint or a model to one place: it is one's, whole."""
    final = there / "model"

    def write(number: int) -> Work:
        def fill(directory: Path) -> None:
            for name in ("a.json", "b.json"):
                write_text(directory / name, json.dumps([number] * 500))

        return _written(lambda: write_directory(final, fill))

    found = together([write(0), write(1)], there, draw)
    lines = ("must have one writer at a time", "must not exist yet")
    winners = _won(found, lines[any(lines[1] in one.said for one in found)])
    texts = {(final / name).read_text() for name in ("a.json", "b.json")}
    if len(winners) != 1 or fault(final) or texts != {json.dumps([winners[0]] * 500)}:
        raise RuntimeError(f"{winners} won, {fault(final)}")
    if left := [p.name for p in there.iterdir() if p.name.endswith(PARTIAL)]:
        raise RuntimeError(f"{left} left behind")
    assert (final / MANIFEST).exists()
    return "one won, one said so"


KINDS = (
    two_writers, two_builders, a_reader_beside_a_writer, a_reader_of_a_removed_index, two_runs,
    two_trainings, two_directories,
)  # fmt: skip


def trials(wanted: Trials) -> Outcome:
    """Rounds, kinds in turn."""
    outcome = Outcome()
    for number in wanted.numbers:
        kind = KINDS[number % len(KINDS)]
        name, draw = kind.__name__.replace("_", " "), random.Random(f"{wanted.seed} {number}")
        outcome.tried += 1
        with scratch() as there:
            try:
                outcome.counts[f"{name}: {kind(there, draw)}"] += 1
            except Exception as error:  # noqa: BLE001  the next round is tried all the same
                outcome.wrong.append(
                    f"seed {wanted.seed} number {number} ({name}): {type(error).__name__} {error}"
                )
    return outcome
