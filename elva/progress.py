"""What a person sees while work goes on: one bar with its rate and time left, one line when it
ends."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from elva.files import write_text
from elva.terminal import Terminal

SHOWN = ("loss", "lm", "infonce", "reward", "rank_1", "kl")
"""Values worth a place beside the bar, in this order, where a stage has them."""


class Reporter(Protocol):
    """Who is told how work goes on; the command line draws bars, a test listens."""

    def start(self, what: str, total: int | None, unit: str = "steps") -> None: ...
    def advance(self, done: int, values: dict[str, float] | None = None) -> None: ...
    def say(self, line: str) -> None: ...
    def finish(self, line: str) -> None: ...


class Silent:
    """The reporter of a call from Python: tells nobody."""

    def start(self, what: str, total: int | None, unit: str = "steps") -> None: ...
    def advance(self, done: int, values: dict[str, float] | None = None) -> None: ...
    def say(self, line: str) -> None: ...
    def finish(self, line: str) -> None: ...


SILENT = Silent()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g} {task.fields['unit']}/s")


_LINE_SECONDS = 30.0
"""Ours: between two lines on work that goes on, in a log."""


class Bars:
    """The reporter of the command line: a bar on a terminal, else a line now and then."""

    def __init__(self, console: Terminal) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._said = time.perf_counter()

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, what: str, total: int | None, unit: str = "steps") -> None:
        """Begin a bar, in place of the last; total None where only the clock ends it."""
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._progress.add_task(what, total=total, values="", unit=unit)
        self._said = time.perf_counter()

    def advance(self, done: int, values: dict[str, float] | None = None) -> None:
        text = "  ".join(f"{k} {values[k]:.3f}" for k in SHOWN if k in values) if values else ""
        for task in self._progress.task_ids:
            self._progress.update(task, completed=done, values=text)
        now = time.perf_counter()
        if self._progress.disable and now - self._said >= _LINE_SECONDS:
            self._said = now
            for one in self._progress.tasks:
                total = "" if one.total is None else f" of {one.total:,.0f}"
                counted = f"{one.description}: {done:,}{total} {one.fields['unit']}"
                rate = _Rate().render(one).plain
                self.say("  ".join(filter(None, (counted, rate, text))))

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.console.print_line(line)

    def finish(self, line: str) -> None:
        """End the bar, with a line or, for an empty one, without."""
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        if line:
            self.say(line)


class Noted:
    """A reporter that tells another, and keeps where its bar stands in a file, for who looks on.

    Args:
        inner: is told everything.
        file: JSON, replaced whole at most once a second: `what`, `done`, `total`, `unit`, `rate` a
            second (None before the second look), `time` (seconds since 1970) and `pid`.
    """

    def __init__(self, inner: Reporter, file: Path) -> None:
        self.inner, self.file = inner, file
        self._state: dict[str, Any] = {}
        self._first: tuple[int, float] | None = None
        self._written = 0.0

    def start(self, what: str, total: int | None, unit: str = "steps") -> None:
        """A bar begins."""
        self.inner.start(what, total, unit)
        self._state = {"what": what, "done": 0, "total": total, "unit": unit, "rate": None}
        self._first = None
        self._write()

    def advance(self, done: int, values: dict[str, float] | None = None) -> None:
        """It goes on; a resumed stage's first step is no work of this process's seconds."""
        self.inner.advance(done, values)
        now = time.perf_counter()
        if self._first is None:
            self._first = done, now
        elif now > self._first[1]:
            self._state["rate"] = (done - self._first[0]) / (now - self._first[1])
        self._state["done"] = done
        if now - self._written >= 1:
            self._write()

    def say(self, line: str) -> None:
        """A line."""
        self.inner.say(line)

    def finish(self, line: str) -> None:
        """The bar ends."""
        self.inner.finish(line)
        self._write()

    def close(self) -> None:
        """All work is done: the file goes."""
        self.file.unlink(missing_ok=True)

    def _write(self) -> None:
        self._written = time.perf_counter()
        try:
            write_text(
                self.file, json.dumps({**self._state, "time": time.time(), "pid": os.getpid()})
            )
        except OSError as error:
            # Work does not end for want of who could look on; what it writes itself will say so.
            self.inner.say(f"{self.file.name} was not written: {error.strerror}")
