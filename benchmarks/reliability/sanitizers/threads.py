"""The thread pool under ThreadSanitizer: tests/kernels/pool_driver.cpp, a seed a trial.

It is our own pool alone, that of a process without an OpenMP runtime and of a fork's child: the
sanitizer does not understand gcc's libgomp. gcc's sanitizer ends a process that forks beside
threads, so that there the children are left out; clang's bears them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from functools import cache
from pathlib import Path

from benchmarks.reliability.built import ROOT, kept
from benchmarks.reliability.row import Outcome, Row, Trials
from tests.kernels import compiled

DRIVER = ROOT / "tests" / "kernels" / "pool_driver.cpp"
PARTS = ("parallel", "kept_memory")
FLAGS = "-fsanitize=thread -O1"
FORKS = {"clang++-19": 8, "clang++": 8, "g++": 0}
"""Compilers in the order of preference -> children of a run."""

OPTIONS = "die_after_fork=0:report_thread_leaks=0:halt_on_error=1:atexit_sleep_ms=20"
"""A child counts its parent's threads, which it does not have, as leaked."""

MOST_SECONDS = 300


def compiler() -> str | None:
    return next(filter(shutil.which, FORKS), None)


@cache
def driver() -> Path:
    name = compiler()
    assert name is not None
    folder = kept(
        "pool", f"{name} {FLAGS}", DRIVER, Path(compiled.__file__),
        make=lambda folder: compiled.program(folder, DRIVER, FLAGS, compiler=name, parts=PARTS),
    )  # fmt: skip
    return folder / DRIVER.stem


def trials(wanted: Trials) -> Outcome:
    """Runs of the driver."""
    outcome, name = Outcome(), compiler()
    assert name is not None
    forks = FORKS[name]
    for number in wanted.numbers:
        outcome.tried += 1
        said = run(str(1_000_003 * wanted.seed + number), str(forks))
        if said is None:
            outcome.counts["runs"] += 1
            outcome.counts["forked children"] += forks and forks + FIRST_CHILDREN
        else:
            outcome.wrong.append(f"seed {wanted.seed} number {number}: {said}")
    return outcome


FIRST_CHILDREN = 80
"""Of the driver, which forks while its first call is on its way."""


def run(*arguments: str) -> str | None:
    """What is wrong with a run of the driver; its children end with it."""
    environment = os.environ | {"TSAN_OPTIONS": OPTIONS}
    process = subprocess.Popen(
        [driver(), *arguments], env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"does not end in {MOST_SECONDS} s"
    right = (process.returncode, said) == (0, "each once\n")
    return None if right else f"ends with {process.returncode}: {said[:2000]!r}"


def missing() -> str:
    return "" if compiler() else f"no {' or '.join(FORKS)} is installed"


ROWS = {
    "threads-sanitized": Row(
        title="the thread pool under ThreadSanitizer: three callers at once, loops inside loops, "
        "forks beside them and before the first call, the process's end",
        goal="1,000, no race and no child that waits for ever",
        unit="runs of the pool",
        amount=1_000,
        smoke=1,
        chunk=20,
        run=trials,
        said=lambda kept: f"{kept['counts'].get('forked children', 0):,} forked children",
        missing=missing,
    ),
}
