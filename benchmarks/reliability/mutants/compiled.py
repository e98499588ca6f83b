"""The compiled module with one mutated source: its objects compiled anew, the others as built."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks.reliability.mutants.workshop import ROOT, module

OPTIMISED = "-O1"
"""Ours: of the objects of a mutant, which are compiled for one run."""


class Step(NamedTuple):
    """A command of the build, and what it makes."""

    words: list[str]
    output: str


@contextmanager
def linked(file: str, tree: Path) -> Iterator[bool]:
    """Whether the module in the copy could be built with the copy's `file`; it is meanwhile."""
    made: dict[str, str] = {}
    target = tree / "elva_kernels" / module().name
    for step in steps("cxx"):
        if ROOT / file in read_of(step.output):
            made[step.output] = str(tree.parent / step.output.replace("/", "."))
            if not _run([*_moved(step, made[step.output], tree), OPTIMISED]):
                yield False
                return
    if not made:
        raise ValueError(f"{file}: must be a source of an object of {build_directory()}, got none")
    (link,) = steps("link")
    words = [str(target) if word == link.output else made.get(word, word) for word in link.words]
    target.unlink()
    try:
        yield _run(words)
    finally:
        shutil.copy2(module(), target)


def _moved(step: Step, output: str, tree: Path) -> list[str]:
    """The command that compiles the copy's source into another place, its list of files too."""
    moved = {step.output: output, f"{step.output}.d": f"{output}.d"}
    words = [word.replace(f"{ROOT}/csrc", f"{tree}/csrc") for word in step.words]
    return [moved.get(word, word) for word in words]


@cache
def build_directory() -> Path | None:
    """Where setup.py has left what it made for this interpreter."""
    tag = f"-{sys.implementation.cache_tag}"
    found = [x for x in ROOT.glob("build/temp.*/build.ninja") if x.parent.name.endswith(tag)]
    return found[0].parent if found else None


@cache
def steps(rule: str) -> list[Step]:
    """The build's commands of a rule."""
    told = subprocess.run(
        [sys.executable, "-m", "ninja", "-C", str(build_directory()), "-t", "compdb", rule],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    rows = json.loads(told[told.index("[") :])
    return [Step(shlex.split(row["command"]), row["output"]) for row in rows]


@cache
def read_of(output: str) -> frozenset[Path]:
    """The files that an object was compiled from."""
    directory = build_directory()
    assert directory is not None
    text = (directory / f"{output}.d").read_text(encoding="utf-8").replace("\\\n", " ")
    return frozenset(Path(word).resolve() for word in text.partition(":")[2].split())


def missing() -> str:
    """What is lacking to compile mutants, in words."""
    directory = build_directory()
    if directory is None:
        return "no objects of a build: python setup.py build_ext --inplace leaves them in build/"
    if shutil.which("ninja") is None:
        return "ninja is not installed"
    asked = subprocess.run(["ninja", "-n"], cwd=directory, capture_output=True, text=True)
    return "" if "no work to do" in asked.stdout else "objects older than csrc: build anew"


def _run(words: list[str]) -> bool:
    done = subprocess.run(words, cwd=build_directory(), capture_output=True)
    return done.returncode == 0
