"""Whether a killed training loses anything: `python -m benchmarks.kills --times 100 --seed 0`.

`elva train` of a small recipe runs once undisturbed, then again and again under kill -9 at drawn
moments: at a start, between steps, inside a checkpoint's write, inside a model's save, inside an
evaluation, in every stage and control; resumed until it is done. Compared bit for bit: every
stage's model, weights and optimizer of every checkpoint that was ever written, every line of
metrics.jsonl, every evaluation.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import select
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from elva.recipes import RECIPES

WATCHED = Path(__file__).with_name("watched.py")
KINDS = ("start", "step", "checkpoint", "model", "evaluation")
KILLS_A_RUN = 20  # ours: a run then takes about three times as long as one that nobody disturbs
FIRST_START_S = 1.0  # ours: drawn from until a start of a warm process has been seen
PATIENCE_S = 600.0

Mark = dict[str, Any]
Start = Callable[[Sequence[str], str], list[BaseProcess]]
"""(words after `elva`, statements that run before it) -> its processes, the writing one first."""


def small(data: str = "emoji") -> dict[str, Any]:
    """What makes the smoke recipe a run of seconds: a model of one layer, few steps, a checkpoint
    after each."""
    changes = {"batch_size": 8, "data": data, "refresh_steps": 2}
    steps = {"0": 80, "1": 3, "2": 4, "3": 4}
    return {
        "model": {"scratch": {
            "hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2, "vocabulary": 600,
            "vision_size": 32, "vision_layers": 1, "vision_heads": 2,
        }},
        "stages": {
            name: {"steps": n, **changes, **({"learning_rate": 5e-3} if name == "0" else {})}
            for name, n in steps.items()
        },  # stage 0 long enough that summaries begin to end in [RET]
        "controls": {name: {"steps": 2, **changes} for name in RECIPES["smoke"].controls},
        "save_seconds": 0.0,
        "evaluate_limit": 24,
    }  # fmt: skip


def watching(journal: Path) -> str:
    """Statements that let a process mark its steps in a journal."""
    return f"import runpy; runpy.run_path({str(WATCHED)!r})['watch']({str(journal)!r})"


class Server:
    """Starts `elva` in processes of their own, forked from one that has imported the trainer and
    computed nothing: the seconds of importing it are spent once."""

    def __init__(self, directory: Path) -> None:
        """`directory`: where the server lives; it would import what lies there."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["elva.cli", "elva.commands.train", "elva.commands.evaluate"]
        )
        kept, here = os.environ.get("OMP_NUM_THREADS"), Path.cwd()
        os.environ["OMP_NUM_THREADS"] = "1"  # the server keeps this environment
        os.chdir(directory)
        try:
            forkserver.ensure_running()
        finally:
            os.chdir(here)
            del os.environ["OMP_NUM_THREADS"]
            if kept is not None:
                os.environ["OMP_NUM_THREADS"] = kept

    def start(self, *words: str, directory: Path, before: str = "") -> BaseProcess:
        """Begin `elva WORDS`; what it prints goes to `directory`/printed.

        Args:
            before: statements that run first.
        """
        program = f"""
import os, sys
os.chdir({str(directory)!r})
printed = os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for stream in (1, 2):
    os.dup2(printed, stream)
sys.argv[:] = ["elva", *{words!r}]
{before}
from elva.cli import app
app()
"""
        process = self._context.Process(target=exec, args=(program,))
        process.start()
        return process

    def group(self, processes: int, directory: Path) -> Start:
        """Starts the same words in several processes that find each other, as a launcher does."""

        def begin(words: Sequence[str], before: str) -> list[BaseProcess]:
            if processes == 1:
                return [self.start(*words, directory=directory, before=before)]
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            found = []
            for place in range(processes):
                there = {
                    "RANK": place, "LOCAL_RANK": place, "WORLD_SIZE": processes,
                    "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                }  # fmt: skip
                settings = {name: str(value) for name, value in there.items()}
                first = f"import os; os.environ.update({settings!r})\n" + before * (place == 0)
                found.append(self.start(*words, directory=directory, before=first))
            return found

        return begin


# -- what an undisturbed run did -------------------------------------------------------------------


def read_journal(file: Path) -> list[Mark]:
    """The marks of a run, in order."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _name(mark: Mark) -> tuple[str, str, int]:
    return mark["kind"], mark["stage"], mark["step"]


@dataclass
class Timeline:
    """The marks of an undisturbed run, and how long what began with each took."""

    marks: list[Mark]
    place: dict[tuple[str, str, int], int] = field(init=False)

    def __post_init__(self) -> None:
        self.place = {_name(mark): i for i, mark in enumerate(self.marks)}
        assert len(self.place) == len(self.marks), "a run that nobody disturbed repeats nothing"

    def seconds(self, index: int) -> float:
        """Of what began with a mark."""
        return float(self.marks[index + 1]["time"] - self.marks[index]["time"])

    def draw(self, count: int, draw: random.Random) -> list[int | None]:
        """Marks to kill after, in their order, kinds in turn; None is at the process's start."""
        order = list(range(len(self.marks) - 1))  # the last begins nothing of a stage
        of = {kind: [i for i in order if self.marks[i]["kind"] == kind] for kind in KINDS}
        wanted: list[int] = []
        for turn in range(count):
            stages: dict[str, list[int]] = {}
            for i in of[KINDS[turn % len(KINDS)]]:
                stages.setdefault(self.marks[i]["stage"], []).append(i)
            fresh = [s for s in stages if not set(stages[s]) <= set(wanted)]
            left = [i for i in stages[draw.choice(fresh)] if i not in wanted] if fresh else order
            wanted.append(draw.choice(left))
        found: list[int | None] = [*sorted(wanted)]
        if found:
            found[draw.randrange(len(found))] = None
        return found


# -- kill, resume ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """Where a run was killed: in what, of which stage and step, how long after it began."""

    kind: str
    stage: str
    step: int
    after_ms: float
    process: int


@dataclass
class Disturbed:
    """A run that is killed and resumed: where, and the marks of all its processes."""

    kills: list[Kill] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    _start_s: float = FIRST_START_S

    def go(
        self, start: Start, begin: Sequence[str], resume: Sequence[str], timeline: Timeline,
        targets: Sequence[int | None], draw: random.Random, scratch: Path,
    ) -> None:  # fmt: skip
        """Train to the end, killed after each of `targets`.

        Args:
            begin, resume: words of `elva` that start the run and go on with it.
            scratch: a directory for the FIFO.

        Raises:
            RuntimeError: a process ended by itself where it should not, or not well at the end.
        """
        words = begin
        for target in [*targets, len(timeline.marks)]:
            code = self._once(start, words, timeline, target, draw, scratch)
            if code == 0:
                return
            if code != -signal.SIGKILL:
                raise RuntimeError(f"elva {' '.join(words)} ended with {code}")
            if begun(begin):
                words = resume
        raise RuntimeError("the last process was killed by somebody else")

    def _once(
        self, start: Start, words: Sequence[str], timeline: Timeline, target: int | None,
        draw: random.Random, scratch: Path,
    ) -> int:  # fmt: skip
        """One process (or group) from its start to its end; its exit code."""
        fifo = scratch / "marks"
        fifo.unlink(missing_ok=True)
        os.mkfifo(fifo)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        began = time.monotonic()
        processes = start(words, watching(fifo))
        due: tuple[float, Mark] | None = None
        share = draw.random()
        victim = draw.randrange(len(processes))
        if target is None:
            due = began + share * self._start_s, {"kind": "start", "stage": "", "step": 0}
        rest, seen = b"", False
        try:
            while processes[0].is_alive():
                wait = 0.2 if due is None else max(0.0, due[0] - time.monotonic())
                ready = select.select([reader], [], [], min(wait, 0.2))[0]
                if due is not None and time.monotonic() >= due[0]:
                    self._kill(processes, victim, due, began)
                    break
                read = os.read(reader, 1 << 20) if ready else b""
                if ready and not read:  # nobody writes: not open yet, or ended
                    time.sleep(0.005)
                *lines, rest = (rest + read).split(b"\n")
                for mark in map(json.loads, lines):
                    if not seen and target is not None:
                        self._start_s = mark["time"] - began
                    seen = True
                    self.marks.append(mark)
                    index = timeline.place[_name(mark)]
                    last = index == len(timeline.marks) - 1  # a busy machine was late: all is done
                    if due is None and target is not None and target <= index and not last:
                        due = mark["time"] + share * timeline.seconds(index), mark
                if time.monotonic() - began > PATIENCE_S:
                    raise RuntimeError(f"elva {' '.join(words)} is at work for {PATIENCE_S:.0f} s")
        finally:
            os.close(reader)
            if due is not None:
                for process in processes:  # what a launcher does to the others of a group
                    process.kill()
        for process in processes:
            process.join(PATIENCE_S)
        codes = [process.exitcode for process in processes]
        assert all(code is not None for code in codes)
        return next((code for code in codes if code), 0)  # type: ignore[misc]

    def _kill(
        self, processes: Sequence[BaseProcess], victim: int, due: tuple[float, Mark], began: float
    ) -> None:
        processes[victim].kill()
        mark = due[1]
        after = time.monotonic() - mark.get("time", began)
        self.kills.append(
            Kill(mark["kind"], mark["stage"], mark["step"], round(after * 1e3, 2), victim)
        )


def begun(words: Sequence[str]) -> bool:
    """Whether the run directory of `--output` holds a run to resume."""
    return (Path(words[list(words).index("--output") + 1]) / "recipe.yaml").is_file()


# -- compare ---------------------------------------------------------------------------------------


def facts(run: Path) -> dict[str, Any]:
    """All of a finished run that may not depend on when it was killed: name -> content."""
    found: dict[str, Any] = {
        str(path.relative_to(run)): json.loads(path.read_text(encoding="utf-8"))
        for pattern in ("*/model/manifest.json", "*/evaluation.json")
        for path in run.glob(pattern)
    }
    for content in found.values():
        content.pop("seconds", None)  # what an evaluation took
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found["metrics.jsonl"] = sorted(lines)  # a resumed stage writes its lines behind the others'
    found["left behind"] = sorted(
        str(p.relative_to(run)) for p in run.rglob("*") if re.search("partial|checkpoint-", p.name)
    )
    return found


def differences(
    whole: Path, disturbed: Path, timeline: Timeline, marks: Sequence[Mark]
) -> list[str]:
    """Names of what is not the same to the bit."""
    one, two = facts(whole), facts(disturbed)
    found = [name for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)]
    for mark in marks:
        there = timeline.marks[timeline.place[_name(mark)]]
        found += [
            f"{mark['stage']}/checkpoint {mark['step']}/{name}"
            for name in sorted(there["files"].keys() | mark["files"].keys())
            if there["files"].get(name) != mark["files"].get(name)
        ]
    return found


# -- by command ------------------------------------------------------------------------------------


def measure(times: int, seed: int, processes: int, scratch: Path) -> dict[str, Any]:
    """Kill `times` times, in as many runs as it takes."""
    draw, start = random.Random(seed), Server(scratch).group(processes, scratch)
    recipe, journal = scratch / "recipe.yaml", scratch / "journal"
    recipe.write_text(yaml.safe_dump(small()))

    def words(run: Path) -> tuple[list[str], list[str]]:
        there = ["train", "--output", str(run)]
        return [*there, "--recipe", "smoke", "--config", str(recipe)], [*there, "--resume"]

    whole = scratch / "whole"
    began = time.monotonic()
    for process in (undisturbed := start(words(whole)[0], watching(journal))):
        process.join()
    if any(process.exitcode for process in undisturbed):
        raise SystemExit((scratch / "printed").read_text())
    seconds, timeline = time.monotonic() - began, Timeline(read_journal(journal))
    kills: list[Kill] = []
    wrong: list[str] = []
    compared = runs = 0
    while len(kills) < times:
        run, one = scratch / f"killed-{runs}", Disturbed()
        targets = timeline.draw(min(KILLS_A_RUN, times - len(kills)), draw)
        one.go(start, *words(run), timeline, targets, draw, scratch)
        wrong += [f"run {runs}: {w}" for w in differences(whole, run, timeline, one.marks)]
        compared += sum(len(mark["files"]) for mark in one.marks)
        kills += one.kills
        runs += 1
        print(f"{len(kills)} kills in {runs} runs, {len(wrong)} differences", flush=True)
    return {
        "processes": processes, "seed": seed, "kills": len(kills), "runs": runs,
        "differences": wrong, "checkpoint_files_compared": compared,
        "by_kind": dict(Counter(kill.kind for kill in kills)),
        "by_stage": dict(Counter(kill.stage or "a process's start" for kill in kills)),
        "undisturbed_s": round(seconds, 1), "recipe": small(),
        "each": [asdict(kill) for kill in kills],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--times", type=int, default=100, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, default=1, help="that train one run together")
    given = parser.parse_args()
    from benchmarks import report

    with tempfile.TemporaryDirectory(prefix="elva-kills-") as scratch:
        result: Mapping[str, Any] = measure(
            given.times, given.seed, given.processes, Path(scratch)
        )  # fmt: skip
    result = {"machine": report.machine(), **result}
    name = "kills" if given.processes == 1 else f"kills-{given.processes}-processes"
    print(report.write(name, result))
    if result["differences"]:
        raise SystemExit("\n".join(result["differences"]))


if __name__ == "__main__":
    main()
