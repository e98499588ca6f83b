"""Branch coverage of rooms by their tests: `python -m benchmarks.reliability.coverage`.

Runs pytest under coverage.py and keeps lines and branches of each room in
benchmarks/results/coverage.json. What runs in processes of its own (Triton interpreted, runs that
are killed) is not counted, nor is csrc: gcov would need a build of its own.

    python -m benchmarks.reliability.coverage
    python -m benchmarks.reliability.coverage tests/elva/test_index.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report

ROOT = Path(__file__).resolve().parents[2]
KEPT = report.RESULTS / "coverage.json"
ROOMS = {
    "public functions, checks, reference": (
        "elva_kernels/*.py", "elva_kernels/reference/*.py", "elva_kernels/registered/*.py",
    ),
    "backends": ("elva_kernels/backends/**/*.py",),
    "index": ("elva/index/**/*.py",),
    "readers": (
        "elva/data/formats/*.py", "elva/data/strict.py", "elva/data/schema.py",
        "elva/data/qrels.py", "elva/data/mbeir.py", "elva/evaluation/trec.py",
    ),
}  # fmt: skip
"""Room -> its files."""

TESTS = (
    "tests/kernels", "tests/test_reference.py", "tests/elva/test_index*.py",
    "tests/elva/test_embed*.py", "tests/elva/test_data*.py", "tests/elva/test_folder*.py",
    "tests/elva/test_ccneg.py", "tests/elva/test_unseen.py", "tests/elva/test_metrics.py",
)  # fmt: skip
"""Theirs: with those of all other rooms it takes most of an hour."""


class Share(NamedTuple):
    """Of lines and branches: how many a test has run, of how many."""

    lines: int = 0
    of_lines: int = 0
    branches: int = 0
    of_branches: int = 0

    def __add__(self, other: tuple[int, ...]) -> Share:  # type: ignore[override]
        return Share(*(a + b for a, b in zip(self, other, strict=True)))


def main() -> None:
    asked = sys.argv[1:]
    tests = asked or sorted(str(p.relative_to(ROOT)) for one in TESTS for p in ROOT.glob(one))
    with tempfile.TemporaryDirectory() as scratch:
        told = measured(tests, Path(scratch))
    found = rooms(told, {room: _files(room) for room in ROOMS})
    kept = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "machine": report.machine(),
        "tests": list(TESTS), "rooms": {name: one._asdict() for name, one in found.items()},
    }  # fmt: skip
    print(table(found))
    if not asked:
        KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def measured(tests: list[str], scratch: Path) -> dict[str, Any]:
    """coverage.py's report on the packages, of a run of these tests."""
    own = ["--data-file", str(scratch / "data")]
    run = ["run", "--branch", "--source", "elva,elva_kernels", *own, "-m", "pytest"]
    run += ["-q", "--every-case", *tests]
    subprocess.run([sys.executable, "-m", "coverage", *run], cwd=ROOT, check=True)
    told = scratch / "told.json"
    asked = ["json", "-q", "-o", str(told), *own]
    subprocess.run([sys.executable, "-m", "coverage", *asked], cwd=ROOT, check=True)
    found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    return found


def rooms(told: Mapping[str, Any], files: Mapping[str, list[str]]) -> dict[str, Share]:
    """Room -> its share, added up over its files; one that no test imports counts with nothing."""
    return {
        room: sum((_share(told, file) for file in some), Share()) for room, some in files.items()
    }


def table(found: Mapping[str, Share]) -> str:
    """A line a room."""
    lines = ["| room | branches | lines |", "|---|---|---|"]
    for room, one in found.items():
        branches = _percent(one.branches, one.of_branches)
        lines.append(f"| {room} | {branches} | {_percent(one.lines, one.of_lines)} |")
    return "\n".join(lines)


def _share(told: Mapping[str, Any], file: str) -> Share:
    known = told["files"].get(file)
    if known is None:
        raise ValueError(f"{file}: must be measured, got no word of it; is another elva imported?")
    one = known["summary"]
    return Share(
        one["covered_lines"], one["num_statements"], one["covered_branches"], one["num_branches"]
    )


def _files(room: str) -> list[str]:
    paths = [path for pattern in ROOMS[room] for path in ROOT.glob(pattern)]
    return sorted({path.relative_to(ROOT).as_posix() for path in paths})


def _percent(some: int, of: int) -> str:
    return f"{100 * some / max(1, of):.1f} % of {of:,}"


if __name__ == "__main__":
    main()
