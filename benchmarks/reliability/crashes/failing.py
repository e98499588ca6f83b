"""Every N-th call by which a file is written fails, with a full disk and with an I/O error.

What was there is intact or the new is there whole, nothing half-written stays, and the command's
one line names the place and, where bytes were being written, how many were.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer

from benchmarks import reported
from benchmarks.reliability.crashes import calls, indexing, small
from benchmarks.reliability.crashes.forks import ended, forked
from benchmarks.reliability.crashes.places import place, scratch
from benchmarks.reliability.row import Outcome, Trials
from elva import checkpoint
from elva.cli.console import one_line_errors, quiet_libraries
from elva.commands.embed import embed
from elva.commands.report import report
from elva.data import Item
from elva.errors import IndexFault
from elva.files import PARTIAL, write_directory
from elva.model.identity import Identity
from elva.model.rollout import Encoded
from elva.model.scratch import create
from elva.run import Run

CODES = (errno.ENOSPC, errno.EIO)
WRITES = ("write", "pwrite", "pwrite64", "writev")


# -- what is written -------------------------------------------------------------------------------


def _checkpoint(step: int) -> Callable[[Path], object]:
    def save(path: Path) -> None:
        numbers = torch.arange(6_000.0).view(60, 100) + step
        groups = {"weights": {"a": numbers}, "optimizer": {"a|exp_avg": numbers.double()}}
        checkpoint.save(path, step, groups, {"elapsed": step / 3})

    return save


def _model(path: Path) -> None:
    spec = small.recipe(path).model.scratch
    write_directory(
        path / "model",
        lambda partial: create(partial, spec, small.NAMES, summary_prompt="Say.", seed=0),
    )


class Encoder:
    """Embeddings that are made of ids."""

    identity = Identity("a model", "revision", "preprocessing")
    about: Mapping[str, Any] = {"model": "a model"}
    embedding_size, instructions = 16, "optional"
    modalities = frozenset({"text", "image", "image,text"})

    def check(self, item: Item) -> None: ...

    def __call__(self, items: Sequence[Item], progress: object = None) -> Encoded:
        numbers = torch.tensor([[float(item.id.split(":")[1])] for item in items])
        return Encoded(numbers.expand(-1, 16) + torch.arange(16), [""] * len(items))


def _embed(path: Path) -> None:
    embed(Encoder(), small.shared(), path / "embedded", tasks=["t2i"], shard_rows=8, resume=True)


def _begin_run(path: Path) -> None:
    reported.build(_told(), path)


def _step(path: Path) -> None:
    """What a run writes beside its checkpoints and models."""
    run = Run.open(path / "run")
    run.log("2", 5, {"loss": 0.5, "lm": float("nan")})
    run.log("2", 6, {"loss": 0.25})
    run.forget_after("1", 3)
    run.write("2", "stage.json", {"steps": 6, "seconds": 3.0, "best": None})


def _report(path: Path) -> None:
    report(Run.open(path / "run"))


@cache
def _told() -> Path:
    return reported.write_data(place() / "told")


# -- what is right ---------------------------------------------------------------------------------


def _files(path: Path) -> dict[str, str]:
    """Name -> digest of what lies in a directory; of metrics, each line is one, and the same line
    once more another: they come and go by themselves, and move those behind them."""
    found: dict[str, str] = {}
    for one in sorted(p for p in path.rglob("*") if p.is_file()):
        name = str(one.relative_to(path))
        if one.suffix == ".jsonl":
            seen: Counter[str] = Counter()
            for line in one.read_text(encoding="utf-8").splitlines():
                seen[line] += 1
                found[f"{name} {line} #{seen[line]}"] = ""
        elif one.name != ".lock":
            content = re.sub(_elsewhere(), b"", one.read_bytes())
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def _elsewhere() -> bytes:
    """What a page tells of where its run lies: another place for each copy of it."""
    return re.escape(os.fsencode(place())) + rb"/[\w/-]*?/(?=run/)"


def _each_whole(now: dict[str, str], old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Files that are neither what was there nor what was to come."""
    gone = [name for name in old.keys() & new.keys() if name not in now]
    return gone + [
        name for name, digest in now.items() if digest not in (old.get(name), new.get(name))
    ]


def _same_index(now: Any, old: Any, new: Any) -> list[str]:
    return [] if now in (old, new) else ["the index"]


class Artefact(NamedTuple):
    """What is there before, what writes, what is then there, and what of it is in a third state."""

    before: tuple[Callable[[Path], object], ...]
    write: Callable[[Path], object]
    state: Callable[[Path], Any] = _files
    third: Callable[[Any, Any, Any], list[str]] = _each_whole


def _of_index(name: str) -> Artefact:
    before, change = indexing.CHANGES[name]
    return Artefact(before, change, indexing.state, _same_index)


ARTEFACTS = {
    "checkpoint": Artefact((_checkpoint(3),), _checkpoint(4)),
    "model": Artefact((), _model),
    "embeddings": Artefact((), _embed),
    "metrics": Artefact((_begin_run,), _step),
    "report": Artefact((_begin_run, _report, _step), _report),
    **{f"index, {name}": _of_index(name) for name in indexing.CHANGES},
}


class Case(NamedTuple):
    artefact: str
    nth: int
    code: int


class Known(NamedTuple):
    """An artefact that nobody disturbed."""

    before: Path
    old: Any
    new: Any
    calls: int


@cache
def known(name: str) -> Known:
    one = ARTEFACTS[name]
    before, after = place() / f"{name}-before", place() / f"{name}-after"
    for earlier in one.before:
        indexing.done(earlier, before)
    if before.exists():
        shutil.copytree(before, after)
    counted = place() / "counted"
    indexing.done(lambda path: indexing.counted(one.write, path, counted, errno.EIO), after)
    return Known(before, one.state(before), one.state(after), int(counted.read_text()))


@cache
def cases() -> list[Case]:
    """Every call of every artefact, failing in each way."""
    small.shared()  # once, for all that are forked
    _told()
    return [
        Case(name, nth, code)
        for name in ARTEFACTS
        for nth in range(1, known(name).calls + 1)
        for code in CODES
    ]


def trials(wanted: Trials) -> Outcome:
    """All cases in turn, those of one artefact behind each other."""
    outcome, every = Outcome(), cases()
    if len(every) != ALL:
        outcome.wrong.append(f"there are {len(every):,} failures, and the row tries {ALL:,}")
    for number in wanted.numbers:
        case = every[(number + 97 * wanted.seed) * STRIDE % len(every)]
        outcome.tried += 1
        with scratch() as there:
            if why := _fault(case, there / "place", outcome):
                outcome.wrong.append(f"{case.artefact}, call {case.nth}, {_name(case)}: {why}")
    return outcome


ALL = 908
"""How many `cases` there are."""

STRIDE = 1_009
"""A prime, so that a few trials are of several artefacts and as many as there are cases are all."""


def _name(case: Case) -> str:
    return errno.errorcode[case.code]


def _fault(case: Case, path: Path, outcome: Outcome) -> str:
    """What went wrong; "" for nothing."""
    one, right = ARTEFACTS[case.artefact], known(case.artefact)
    if right.before.exists():
        shutil.copytree(right.before, path)
    printed, name = path.with_name("printed"), path.with_name("call")

    def work() -> None:
        quiet_libraries()
        calls.at(path, case.nth, case.code)
        code = 0
        try:
            with one_line_errors():
                one.write(path)
        except typer.Exit as leaving:
            code = leaving.exit_code
        name.write_text(calls.refused())
        os._exit(code)

    code, said = ended(forked(work, printed)), printed.read_text()
    call = name.read_text() if name.exists() else ""
    if not call:
        return f"the call did not come: {said[-300:]}" if code else "the call did not come"
    try:
        now = one.state(path)
    except IndexFault as error:
        return f"a damaged index: {error}"
    if left := [p.name for p in path.rglob(f"*{PARTIAL}")]:
        return f"{left} left behind"
    if third := one.third(now, right.old, right.new):
        return f"{third[:3]} in a third state"
    if code == 0:
        outcome.counts["done all the same"] += 1
        return "" if now == right.new else "said nothing, and the new is not there"
    outcome.counts[f"refused at {call}"] += 1
    return _line_fault(code, said, case, call, path)


def _line_fault(code: int, said: str, case: Case, call: str, path: Path) -> str:
    """What is wrong with the line that a person reads."""
    if code != 2 or said.count("\n") != 1 or not said.startswith("elva: "):
        return f"exit code {code}, no single line: {said[-300:]}"
    if os.strerror(case.code) not in said or str(path) not in said:
        return f"no place or reason: {said}"
    if call in WRITES and "at byte" not in said:
        return f"no bytes: {said}"
    return ""
