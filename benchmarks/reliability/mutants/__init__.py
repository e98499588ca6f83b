"""Rows of mutants: a source with one change, which the tests must notice."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks.reliability.mutants import compiled, workshop
from benchmarks.reliability.mutants.suites import (
    CPP,
    INDEX,
    INTERPRETED,
    KERNELS,
    LOSSES,
    READERS,
    Suite,
)
from benchmarks.reliability.mutants.trial import GOAL, share, trials
from benchmarks.reliability.row import Row


def said(kept: Mapping[str, Any]) -> str:
    """How many were killed of how many, in the table."""
    counts = kept["counts"]
    killed, judged = share(counts)
    below = ": below the goal" if killed < GOAL * judged else ""
    return (
        f"{killed} of {judged} killed ({100 * killed / max(1, judged):.0f} %{below}), "
        f"{counts.get('equivalent', 0)} equivalent, {counts.get('survived', 0)} survive; a sample "
        f"of {int(kept['most']['mutants']):,}"
    )


def missing_for_cpp() -> str:
    return workshop.missing() or compiled.missing()


def missing_for_kernels() -> str:
    lacks = "" if find_spec("triton") else "triton is not installed"
    return workshop.missing() or lacks


def row(title: str, *suites: Suite, missing: Callable[[], str] = workshop.missing) -> Row:
    return Row(
        title=f"mutants of {title}",
        goal="90 % killed by the quick tests",
        unit="mutants",
        amount=300,
        smoke=1,
        chunk=60,
        run=partial(trials, suites=suites),
        said=said,
        missing=missing,
    )


ROWS = {
    "mutants-cpp": row("the CPU kernels (`csrc/cpu`)", CPP, missing=missing_for_cpp),
    "mutants-kernels": row(
        "`elva_kernels`: public functions, checks, reference, Triton kernels interpreted",
        KERNELS,
        INTERPRETED,
        missing=missing_for_kernels,
    ),
    "mutants-index": row("the index (`elva/index`)", INDEX),
    "mutants-readers": row("the readers (`elva/data/formats`, strict, schema, TREC)", READERS),
    "mutants-losses": row("the losses and their negatives (`elva/training`)", LOSSES),
}
