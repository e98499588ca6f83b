"""`elva inspect`: where a run's training stands, from its files alone, while it trains or after.

The process that trains holds a lock and keeps `status.json`; every step is a line of
`metrics.jsonl`. Nothing is written here, and the training does not notice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elva.run import Run, metrics_line

SHOWN = (
    "loss", "lm", "infonce", "reward", "margin_reward", "rank_reward", "rank_1", "kl",
    "completion_length", "frac_no_ret", "frac_zero_std",
)  # fmt: skip
"""Values with a sparkline, in this order, where the stage has them."""

_BLOCKS, WIDTH = "▁▂▃▄▅▆▇█", 48

_STARTING_S = 300
"""Ours: a run without a lock that was created so lately may still be reading its data."""


@dataclass(frozen=True)
class _Standing:
    """Where a training stands.

    Args:
        state: `training`; `starting`, before its process holds the run; `finished`, it ended in
            order; `died`, no process trains it and it did not end; `stopped`, nothing was trained.
        what: What is worked at, a stage or its evaluation.
        stage: The stage or control of the last step; None before the first.
        done, total, unit: Of that work; total is None where the clock ends it.
        rate: Units a second.
        left_s: Seconds to the end of this work.
        age_s: Seconds since the process last said so.
        trained: The finished stages and controls.
        values: The last step's.
        curves: The stage's values by step, None where one is missing.
    """

    run: str
    state: Literal["training", "starting", "finished", "died", "stopped"]
    what: str
    stage: str | None
    done: int | None
    total: int | None
    unit: str
    rate: float | None
    left_s: float | None
    age_s: float | None
    trained: list[str]
    values: dict[str, float]
    curves: dict[str, list[float | None]]


class Follower:
    """Looks at a run again and again, reading of `metrics.jsonl` only what is new."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._names = {*run.recipe.stages, *run.recipe.controls}
        self._known: tuple[int, int] = (0, 0)  # the file's inode, bytes read
        self._lines: dict[str, dict[int, dict[str, Any]]] = {}  # stage -> step -> values
        self._stage: str | None = None

    def look(self) -> _Standing:
        """Where it stands now."""
        training = self.run.is_training
        status, finished = _status(self.run.status_file), self.run.trained
        self._read()
        lines = self._lines.get(self._stage, {}) if self._stage is not None else {}
        steps = [lines[step] for step in sorted(lines)]
        curves = {key: [_number(line.get(key)) for line in steps] for key in SHOWN}
        curves = {k: v for k, v in curves.items() if any(x is not None for x in v)}
        values = {k: v[-1] for k, v in curves.items() if v[-1] is not None}
        if training and not status and steps:  # held by a version that keeps no status
            status = {"what": self.run.title(str(self._stage)), "done": max(lines)}
        done, total, rate = (_number(status.get(key)) for key in ("done", "total", "rate"))
        said = _number(status.get("time"))
        left = None
        if training and done is not None and total is not None and rate:
            left = max(0.0, (total - done) / rate)
        return _Standing(
            run=str(self.run.directory),
            state=self._state(training, bool(status or (steps and not finished)), bool(finished)),
            what=str(status.get("what") or ""),
            stage=None if self._stage is None else self.run.title(self._stage),
            done=None if done is None else int(done),
            total=None if total is None else int(total),
            unit=str(status.get("unit") or "steps"),
            rate=rate,
            left_s=left,
            age_s=None if said is None else max(0.0, time.time() - said),
            trained=[self.run.title(name) for name in finished],
            values=values,
            curves=curves,
        )

    def _state(self, training: bool, begun: bool, finished: bool) -> Any:
        if training:
            return "training"
        if begun:
            return "died"
        if finished:
            return "finished"
        age = time.time() - (self.run.directory / "recipe.yaml").stat().st_mtime
        return "starting" if age < _STARTING_S else "stopped"

    def _read(self) -> None:
        """The whole lines behind those known; a file that was replaced is read anew."""
        try:
            with open(self.run.metrics_file, "rb") as file:
                stat, start = os.fstat(file.fileno()), self._known[1]
                if stat.st_ino != self._known[0] or stat.st_size < start:
                    self._lines, self._stage, start = {}, None, 0
                file.seek(start)
                new, ended, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._known = stat.st_ino, start + len(new) + len(ended)
        for line in new.splitlines():
            entry = metrics_line(line)
            if entry is not None and entry["stage"] in self._names:
                self._stage = entry["stage"]
                self._lines.setdefault(self._stage, {}).setdefault(entry["step"], {}).update(entry)


def follow(run: Run, interval: float) -> Iterator[_Standing]:
    """Where a run stands, every so many seconds, until it trains no more."""
    follower = Follower(run)
    while True:
        standing = follower.look()
        yield standing
        if standing.state not in ("training", "starting"):
            return
        time.sleep(interval)


def as_json(standing: _Standing) -> dict[str, Any]:
    """For programs."""
    return asdict(standing)


def line(standing: _Standing) -> str:
    """Where it stands, in one line."""
    said = {
        "training": "",
        "starting": "starting: no step yet",
        "finished": f"finished: {', '.join(standing.trained)}",
        "stopped": "stopped before anything was trained; start it with elva train --resume "
        f"--output {standing.run}",
        "died": f"died{_ago(standing)}: no process trains it; go on with elva train --resume "
        f"--output {standing.run}",
    }[standing.state]
    if standing.state in ("starting", "finished", "stopped"):
        return said
    words = [standing.what or "begins"]
    if standing.done is not None:
        of = "" if standing.total is None else f" of {standing.total:,}"
        words.append(f"{standing.done:,}{of} {standing.unit}")
    if standing.state == "training":
        if standing.rate is not None:
            words.append(f"{standing.rate:.3g} {standing.unit}/s")
        if standing.left_s is not None:
            words.append(f"{_time(standing.left_s)} left")
    words += [f"{k} {v:.3f}" for k, v in standing.values.items() if k in ("loss", "reward")]
    return ", ".join(words) + (f"; {said}" if said else "")


def panel(standing: _Standing) -> Group:
    """The same with a sparkline a value, for a terminal."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, values in standing.curves.items():
        now = standing.values.get(key)
        known = [v for v in values if v is not None]
        shown = "-" if now is None else f"{now:.4g}"
        table.add_row(
            Text(key), Text(sparkline(values)), Text(shown, "bold"),
            Text(f"{min(known):.4g} to {max(known):.4g}", "dim"),
        )  # fmt: skip
    stage: list[RenderableType] = (
        [] if standing.stage is None else [Text(f"{standing.stage}, by step", "dim"), table]
    )
    return Group(Text(line(standing)), *stage)


def sparkline(values: Sequence[float | None], width: int = WIDTH) -> str:
    """Values as blocks from their least to their largest, means where there are more than places.

    Example:
        >>> sparkline([0.0, 1.0, None, 2.0])
        '▁▅ █'
    """
    count = min(width, len(values))
    means: list[float | None] = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        known = [v for v in part if v is not None]
        means.append(sum(known) / len(known) if known else None)
    found = [v for v in means if v is not None]
    if not found:
        return " " * count
    low, span = min(found), (max(found) - min(found)) or 1.0
    top = len(_BLOCKS) - 1
    return "".join(" " if v is None else _BLOCKS[round(top * (v - low) / span)] for v in means)


def _status(file: Path) -> Mapping[str, Any]:
    """What `status.json` says; empty where there is none, or none that could be read."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        return {"what": "an unreadable status.json"}
    return found if isinstance(found, dict) else {"what": "an unreadable status.json"}


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if known and math.isfinite(value) else None


def _ago(standing: _Standing) -> str:
    return "" if standing.age_s is None else f" {_time(standing.age_s)} ago"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
