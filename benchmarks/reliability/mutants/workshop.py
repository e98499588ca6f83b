"""A copy of the tree in which one file at a time is mutated, and a server that runs its tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.reliability.mutants.mutant import Mutant, read

if TYPE_CHECKING:
    from benchmarks.reliability.mutants.suites import Suite

ROOT = Path(__file__).resolve().parents[3]
SERVER = Path(__file__).with_name("server.py")
COPIED = ("elva", "elva_kernels", "tests", "benchmarks", "pyproject.toml", "csrc")
LEFT_OUT = shutil.ignore_patterns("results", "screens", "*.so", "*.png")
LONG_AGO = 1_000_000_000
"""Times of mutated files, a second each: no bytecode of another one passes for theirs."""


class Workshop:
    """Tests of one mutant after the other.

    Args:
        tree: the copy.
    """

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self._times = count(LONG_AGO)
        self._servers: dict[str, subprocess.Popen[str]] = {}

    def run(self, suite: Suite, words: Sequence[str]) -> dict[str, Any]:
        """How tests end in the copy as it is: `end`, the last `test`, `cpu` in seconds."""
        server = self._server(suite)
        assert server.stdin is not None and server.stdout is not None
        asked = {
            "words": ["--every-case", *words],
            "seconds": suite.seconds,
            "without": suite.without,
        }
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        line = server.stdout.readline()
        if not line:
            raise RuntimeError("the server of the tests has ended")
        shutil.rmtree(f"{self.tree}.tests", ignore_errors=True)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        for server in self._servers.values():
            server.kill()
            server.communicate()

    def _server(self, suite: Suite) -> subprocess.Popen[str]:
        name = json.dumps([dict(suite.env), suite.preloaded])
        if name not in self._servers:
            known = {
                **os.environ, "PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1",
                "TMPDIR": str(self.tree.parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                **suite.env,
            }  # fmt: skip
            self._servers[name] = subprocess.Popen(
                [sys.executable, str(SERVER), *suite.preloaded], cwd=self.tree, env=known,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        return self._servers[name]

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[Path]:
        """The copy has the mutant meanwhile."""
        path = self.tree / mutant.file
        path.write_text(mutant.applied(read(ROOT, mutant.file)), encoding="utf-8")
        os.utime(path, (time := next(self._times), time))
        try:
            yield path
        finally:
            shutil.copy2(ROOT / mutant.file, path)


@contextmanager
def opened() -> Iterator[Workshop]:
    """A workshop that is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="elva-mutants-") as scratch:
        tree = Path(scratch) / "tree"
        _copy(tree)
        shop = Workshop(tree)
        try:
            yield shop
        finally:
            shop.close()


def _copy(tree: Path) -> None:
    tree.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=LEFT_OUT)
        else:
            shutil.copy2(ROOT / name, tree / name)
    shutil.copy2(module(), tree / "elva_kernels" / module().name)


def module() -> Path:
    """The compiled module."""
    spec = find_spec("elva_kernels._C")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def missing() -> str:
    """What is lacking for a workshop, in words."""
    lacks = [name for name in COPIED if not (ROOT / name).exists()]
    if lacks:
        return f"no source tree: {ROOT} has no {', '.join(lacks)}"
    return "" if find_spec("elva_kernels._C") else "no compiled module"
