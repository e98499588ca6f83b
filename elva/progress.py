"""What a person sees while work goes on: one bar with its rate and time left, one line when it
ends."""

from __future__ import annotations

import time
from typing import Protocol

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


LINE_SECONDS = 30.0
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
        if self._progress.disable and now - self._said >= LINE_SECONDS:
            self._said = now
            for task in self._progress.tasks:
                total = "" if task.total is None else f" of {task.total:,.0f}"
                counted = f"{task.description}: {done:,}{total} {task.fields['unit']}"
                rate = _Rate().render(task).plain
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
