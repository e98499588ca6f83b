"""The row of files that atheris changes, by what of elva's own lines they reach.

A chunk is a process of its own (atheris_target.py), on one reader after the other.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from benchmarks.reliability.built import ROOT
from benchmarks.reliability.row import Outcome, Row, Trials

GUIDED = ("rows", "trec", "recipes", "pictures", "data")
"""Readers of a file of their own: those that convert take too long an input."""

TARGET = Path(__file__).with_name("atheris_target.py")
CHUNK = 10_000
OPTIONS = ("-len_control=0", "-max_len=65536", "-timeout=120", "-rss_limit_mb=8192")
MOST_SECONDS = 7_200


def trials(wanted: Trials) -> Outcome:
    """A process of inputs."""
    name = GUIDED[(wanted.first // CHUNK + wanted.seed) % len(GUIDED)]
    seed = (wanted.seed * 1_000_003 + wanted.first) % (2**31 - 1) + 1
    outcome = Outcome(tried=wanted.count)
    with tempfile.TemporaryDirectory(prefix="elva-guided-") as scratch:
        command = [sys.executable, str(TARGET), name, scratch, f"-runs={wanted.count}"]
        done = subprocess.run(
            [*command, f"-seed={seed}", f"-artifact_prefix={scratch}/found-", *OPTIONS],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, errors="replace",
            timeout=MOST_SECONDS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        covered = re.findall(r"cov: (\d+)", done.stdout)
        outcome.measured(f"covered of {name}", float(covered[-1]) if covered else 0.0)
        outcome.counts[name] += wanted.count
        if done.returncode or f"Done {wanted.count} " not in done.stdout:
            inputs = [path.read_bytes()[:4096].hex() for path in Path(scratch).glob("found-*")]
            at = max(done.stdout.find("Uncaught Python exception"), 0)
            outcome.wrong.append(
                f"{name} seed {wanted.seed} from {wanted.first:,}: ends with {done.returncode}: "
                f"{done.stdout[at:][:1500]!r} of {inputs}"
            )
    return outcome


def missing() -> str:
    return "" if find_spec("atheris") else "atheris is not installed: pip install 'elva[fuzz]'"


ROWS = {
    "fuzz-readers-guided": Row(
        title="atheris, guided by the lines it reaches, on the same readers but those that convert",
        goal="10,000,000, each a value or one plain line in 5 s and 1 GiB",
        unit="files",
        amount=10_000_000,
        smoke=100,
        chunk=CHUNK,
        run=trials,
        said=lambda kept: "edges covered: " + ", ".join(
            f"{name.removeprefix('covered of ')} {edges:,.0f}"
            for name, edges in kept["most"].items()
        ),
        missing=missing,
    ),
}  # fmt: skip
