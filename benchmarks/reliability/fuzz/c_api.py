"""The row of the C API: libFuzzer's inputs to csrc/elva.h, under AddressSanitizer and UBSan.

The amount is the program's runs; a chunk is a process of its own, on one CPU level after the other,
that begins with no input and goes by what it finds new. A level's build of a minute is kept.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from benchmarks.reliability.built import kept
from benchmarks.reliability.row import Outcome, Row, Trials
from tests.kernels import compiled

MAIN = Path(__file__).parent / "c_api.cpp"
COMPILER = "clang++-19"
FLAGS = "-fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all -O1"
OTHER = "-fno-sanitize=undefined"  # as in the row of the suites
LINK = "-fsanitize=fuzzer"
CHUNK = 20_000
MOST_SECONDS = 7_200
OPTIONS = ("-len_control=0", "-max_len=4096", "-timeout=60", "-rss_limit_mb=4096", "-verbosity=1")


@cache
def program(level: str) -> Path:
    """Of one CPU level and plain, which is always there."""
    folder = kept(
        f"c-api-{level}", f"{COMPILER} {FLAGS} {OTHER} {LINK}", MAIN, Path(compiled.__file__),
        make=lambda folder: compiled.program(
            folder, MAIN, FLAGS, compiler=COMPILER, link=LINK, levels={"plain", level},
            whole=["plain"], other=OTHER,
        ),
    )  # fmt: skip
    return folder / MAIN.stem


@cache
def levels() -> list[str]:
    """The CPU levels of this machine that are compiled."""
    import elva_kernels

    return list(elva_kernels.doctor().native["levels"])


def trials(wanted: Trials) -> Outcome:
    """A process of inputs."""
    level = levels()[wanted.first // CHUNK % len(levels())]
    seed = (wanted.seed * 1_000_003 + wanted.first) % (2**31 - 1) + 1
    outcome = Outcome(tried=wanted.count)
    with tempfile.TemporaryDirectory(prefix="elva-fuzz-c-") as scratch:
        command = [program(level), f"-runs={wanted.count}", f"-seed={seed}", *OPTIONS]
        done = subprocess.run(
            command, cwd=scratch, text=True, timeout=MOST_SECONDS,
            env=os.environ | {"ELVA_KERNELS_CPU_LEVEL": level, "ASAN_OPTIONS": "detect_leaks=0"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        covered = re.findall(r"cov: (\d+)", done.stdout)
        outcome.measured("edges covered", float(covered[-1]) if covered else 0.0)
        outcome.counts[level] += wanted.count
        if done.returncode or f"Done {wanted.count} runs" not in done.stdout:
            inputs = [path.read_bytes().hex() for path in sorted(Path(scratch).glob("*-*"))]
            at = max(done.stdout.find("ERROR"), done.stdout.find("runtime error"), 200)
            outcome.wrong.append(
                f"{level} seed {wanted.seed} from {wanted.first:,}: ends with {done.returncode}: "
                f"{done.stdout[at - 200 :][:2000]!r} of {inputs}"
            )
    return outcome


def missing() -> str:
    return "" if shutil.which(COMPILER) else f"{COMPILER}, for libFuzzer, is not installed"


ROWS = {
    "fuzz-c-api": Row(
        title="libFuzzer on the C API of groups and of search: shapes, strides and values in "
        "blocks of exactly that memory",
        goal="10,000,000, no report",
        unit="inputs",
        amount=10_000_000,
        smoke=200,
        chunk=CHUNK,
        run=trials,
        said=lambda kept: (
            f"{kept['most'].get('edges covered', 0):,.0f} edges covered, tried where clang is"
        ),
        missing=missing,
    ),
}
