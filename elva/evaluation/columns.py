"""The figures that a table of an evaluation shows, and their headings."""

from collections.abc import Iterable, Mapping
from typing import Any

from elva.data.schema import TASKS

_SHOWN_TASKS = 3
"""Ours: tasks in a table at most, so that it fits a terminal; files hold all of them."""

PAIRS = "minimal_pair_recall_at_1"


def label(task: str) -> str:
    """`t→i` for `t2i`."""
    return task.replace("2", "→")


def tasks_of(figures: Iterable[Mapping[str, Any]]) -> list[str]:
    """The tasks that any of some evaluations measured, in the order of `TASKS`."""
    known = {name for one in figures for name in one}
    return [task for task in TASKS if f"{task}_recall_at_1" in known]


def columns(figures: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Figure -> heading, of what some evaluations have in common with a table."""
    every = list(figures)
    found = {
        f"{task}_recall_at_{k}": f"{label(task)} R@{k}"
        for task in tasks_of(every)[:_SHOWN_TASKS]
        for k in (1, 5)
    }
    return found | ({PAIRS: "pairs R@1"} if any(PAIRS in one for one in every) else {})
