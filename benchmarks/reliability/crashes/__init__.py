"""Rows of crashes and corruption: kills, full disks, flipped bytes, forged and malformed files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.reliability.crashes import (
    calls,
    contention,
    failing,
    flipped,
    forged,
    indexing,
    malformed,
    training,
)
from benchmarks.reliability.crashes.forks import apart
from benchmarks.reliability.row import Outcome, Row, Trials


def _forking(run: Callable[[Trials], Outcome]) -> Callable[[Trials], Outcome]:
    return partial(apart, run)


def _runs(kept: Mapping[str, Any]) -> str:
    counts = kept["counts"]
    compared = counts.get("checkpoint files compared", 0)
    together = counts.get("runs of two processes", 0)
    return (
        f"{counts.get('runs', 0):,} runs, {together:,} of them by two processes, {compared:,} "
        "checkpoint files compared"
    )


def _states(kept: Mapping[str, Any]) -> str:
    counts = kept["counts"]
    return f"{counts.get('old', 0):,} left the old index, {counts.get('new', 0):,} the new"


ROWS = {
    "kills-training": Row(
        title="`kill -9` of a training at drawn moments of every stage, resumed until it is done",
        goal="500 kills; models, checkpoints, metrics and evaluations as undisturbed, to the bit",
        unit="kills",
        amount=500,
        smoke=2,
        chunk=len(training.SPANS) * training.KILLS_A_RUN,
        run=_forking(training.trials),
        said=_runs,
    ),
    "kills-indexing": Row(
        title="`kill -9` while an index is built, added to, deleted from, compacted, coded",
        goal="500 kills; the old or the new index, and the next change as undisturbed, to the byte",
        unit="kills",
        amount=500,
        smoke=6,
        chunk=30,
        run=_forking(indexing.trials),
        said=_states,
        missing=calls.missing,
    ),
    "failing-writes": Row(
        title="every call that writes a checkpoint, model, index, embeddings, metrics or report, "
        "failing with a full disk and with an I/O error",
        goal="all; what was there or what was to come, one line with place and bytes",
        unit="failures",
        amount=failing.ALL,
        smoke=10,
        chunk=76,
        run=_forking(failing.trials),
        missing=calls.missing,
    ),
    "flips": Row(
        title="single bytes of an index or a checkpoint flipped",
        goal="10,000; each found, in one line",
        unit="flips",
        amount=10_000,
        smoke=200,
        chunk=1_000,
        run=flipped.trials,
    ),
    "malformed": Row(
        title="malformed corpora: pictures, JSONL, csv, parquet, rows of an index",
        goal="2,000; each refused in one line with file and line",
        unit="corpora",
        amount=2_000,
        smoke=40,
        chunk=250,
        run=malformed.trials,
    ),
    "forged": Row(
        title="forged manifests, headers and checkpoints with right checksums: each field by each "
        "of a list of hostile values",
        goal="all; refused in one line or as the real one, in bounded memory and time",
        unit="forgeries",
        amount=forged.ALL,
        smoke=40,
        chunk=600,
        run=forged.trials,
    ),
    "contention": Row(
        title="two processes at one directory: writers, builders, a reader beside a writer or of a "
        "removed index, runs, trainings",
        goal="1,000 rounds; one wins, the other says so, nothing is lost",
        unit="rounds",
        amount=1_000,
        smoke=7,
        chunk=70,
        run=_forking(contention.trials),
    ),
}
