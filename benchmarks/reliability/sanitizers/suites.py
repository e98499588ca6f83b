"""The kernels' own suites with a compiled module of AddressSanitizer and UBSan, a file a trial.

The interpreter is not theirs: their runtime is loaded before it, and leaks are not looked for. The
first trial takes seconds, the thread pool's driver; the others a build of minutes, which is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.reliability.built import ROOT, kept
from benchmarks.reliability.row import Outcome, Row, Trials
from tests.kernels import compiled, guest_session

DRIVER = ROOT / "tests" / "kernels" / "pool_driver.cpp"
PARTS = ("parallel", "kept_memory")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -O1"
OTHER = "-fno-sanitize=undefined"
"""Of the levels but plain: what is undefined takes the compiler minutes in their inner loops."""

OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
SUITES = ("pool", *guest_session.CONTRACT)
MOST_SECONDS = 7_200


def trials(wanted: Trials) -> Outcome:
    """Suites, the pool's first; their cases are the same for every seed."""
    outcome = Outcome()
    for number in wanted.numbers:
        name = SUITES[number % len(SUITES)]
        wrong = pool(wanted.seed + number) if name == "pool" else suite(name, outcome)
        outcome.tried += 1
        outcome.counts["reports"] += bool(wrong)
        if wrong:
            outcome.wrong.append(f"{name}: {wrong}")
    return outcome


def suite(name: str, outcome: Outcome) -> str:
    """What is wrong with a suite under the sanitizers; counts the tests that have passed."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        environment = OPTIONS | {
            "LD_PRELOAD": " ".join(filter(None, map(runtime, ("libasan.so", "libubsan.so")))),
            guest_session.MODULE: str(module()),
            guest_session.REPORT: str(report),
        }
        plugins = ["-p", guest_session.__name__, "-p", "no:cacheprovider", "--every-case"]
        file = f"tests/kernels/test_{name}.py"
        said = _run([sys.executable, "-m", "pytest", "-q", *plugins, file], environment)
        if said is None:
            outcome.counts.update(json.loads(report.read_text()))
        return said or ""


def pool(seed: int) -> str:
    """What is wrong with a run of the pool's driver, without children of forks: in them the
    allocator of gcc 12's AddressSanitizer may wait for a lock that its parent's threads held."""
    return _run([str(driver()), str(seed), "0"], OPTIONS) or ""


def _run(command: list[str], environment: dict[str, str]) -> str | None:
    done = subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, text=True, timeout=MOST_SECONDS,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    at = done.stdout.find("Sanitizer")
    if done.returncode == 0 and at < 0:
        return None
    said = done.stdout[at - 200 :][:2000] if at >= 0 else done.stdout[-2000:]
    return f"ends with {done.returncode}: {said!r}"


@cache
def driver() -> Path:
    folder = kept(
        "pool-exact", FLAGS, DRIVER, Path(compiled.__file__),
        make=lambda folder: compiled.program(folder, DRIVER, FLAGS, parts=PARTS),
    )  # fmt: skip
    return folder / DRIVER.stem


@cache
def module() -> Path:
    """elva_kernels._C with the sanitizers."""
    how = f"{FLAGS} {OTHER} {sys.version}"
    folder = kept(
        "module-exact", how, Path(compiled.__file__),
        make=lambda folder: compiled.module(folder, FLAGS, whole=["plain"], other=OTHER),
    )  # fmt: skip
    return folder / "_C.so"


@cache
def runtime(name: str) -> str:
    """The path of a sanitizer's library, "" where g++ has none."""
    if shutil.which("g++") is None:
        return ""
    told = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    return path if os.path.isabs(path := told.stdout.strip()) else ""


def missing() -> str:
    lacks = [name for name in ("libasan.so", "libubsan.so") if not runtime(name)]
    return f"g++ has no {' and no '.join(lacks)}" if lacks else ""


def said(kept: Mapping[str, Any]) -> str:
    levels = {name: count for name, count in kept["counts"].items() if name != "reports"}
    told = ", ".join(f"{level} {count:,}" for level, count in levels.items())
    return f"tests on each level: {told}" if told else "the pool's driver alone"


ROWS = {
    "sanitizers": Row(
        title="the kernels' suites on every CPU level under AddressSanitizer, all but "
        "the inner loops of vector levels under UBSan too; and the thread pool's driver",
        goal=f"all {len(SUITES)}, no report",
        unit="suites",
        amount=len(SUITES),
        smoke=1,
        chunk=1,
        run=trials,
        said=said,
        missing=missing,
    ),
}  # fmt: skip
