"""Rows of crashes and corruption: kills, full disks, flipped bytes, forged and malformed files."""

from __future__ import annotations

from functools import partial

from benchmarks.reliability.crashes import training
from benchmarks.reliability.crashes.forks import apart
from benchmarks.reliability.row import Row

ROWS = {
    "kills-training": Row(
        title="`kill -9` of a training at drawn moments of every stage, resumed until it is done",
        goal="500 kills, the same bits as undisturbed",
        unit="kills",
        amount=500,
        smoke=2,
        chunk=3 * training.KILLS_A_RUN,
        run=partial(apart, training.trials),
    ),
}
