"""Runs tests in forks of a process that has imported all but what is mutated: a program.

    python server.py PRELOADED...

Works where it is started, which is the root of the tests. A line of JSON in: pytest's words,
seconds a test, fixtures without which. A line out: how it ended (passed, failed, crashed, timed
out) and the last test.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import sys
from typing import Any, NoReturn

import pytest

MEMORY_BYTES, FILE_BYTES = 12 << 30, 1 << 30
"""Ours: torch alone maps gigabytes that it does not use."""
WALL = 4
"""Ours: times the seconds of CPU; a test so long silent waits for ever, not for a busy machine."""


class Told:
    """A pytest plugin that says by a pipe which test runs and which has failed.

    Args:
        without: fixtures whose tests are left out.
        seconds: of CPU that a test may take.
    """

    def __init__(self, pipe: int, without: list[str], seconds: float) -> None:
        self.pipe, self.without, self.seconds = pipe, {*without}, seconds

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [x for x in items if self.without.isdisjoint(getattr(x, "fixturenames", ()))]

    def _say(self, *words: str) -> None:
        os.write(self.pipe, (json.dumps(words) + "\n").encode())

    def bounded(self) -> None:
        """From now on so many seconds are left."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        end = int(used.ru_utime + used.ru_stime + self.seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.bounded()
        self._say("runs", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._say("failed", report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._say("failed", report.nodeid)


def main() -> None:
    sys.path[0] = os.getcwd()
    for name in sys.argv[1:]:
        importlib.import_module(name)
    answers = os.dup(1)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = tried(asked["words"], asked["seconds"], asked["without"])
        os.write(answers, (json.dumps(answer) + "\n").encode())


def tried(words: list[str], seconds: float, without: list[str]) -> dict[str, Any]:
    """How a run of these tests in a process of its own ends, and its seconds of CPU."""
    here, there = os.pipe()
    child = os.fork()
    if not child:
        os.close(here)
        run(words, Told(there, without, seconds))
    os.close(there)
    told, late = heard(here, WALL * seconds)
    os.close(here)
    with contextlib.suppress(ProcessLookupError):  # and what it has started
        os.killpg(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    lines = [json.loads(line) for line in told.splitlines()]
    failed = [name for what, name in lines if what == "failed"]
    test = failed[0] if failed else lines[-1][1] if lines else ""
    slow = late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU)
    passed = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    end = "failed" if failed else "timed out" if slow else "passed" if passed else "crashed"
    return {"end": end, "test": test, "cpu": used.ru_utime + used.ru_stime}


def heard(pipe: int, patience: float) -> tuple[bytes, bool]:
    """What a pipe says until its writer has gone, and whether it was silent for too long."""
    told = b""
    while select.select([pipe], [], [], patience)[0]:
        some = os.read(pipe, 1 << 16)
        if not some:
            return told, False
        told += some
    return told, True


def run(words: list[str], told: Told) -> NoReturn:
    """The child: ends with pytest's status, whatever the mutated code does."""
    status = 70
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        told.bounded()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        options = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", f"{os.getcwd()}.tests"]
        status = int(pytest.main([*options, *words], plugins=[told]))
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
