"""Retrieval examples for the report: a query, what the model wrote about it, and what it found.

Which queries are shown is nobody's choice: the same number of each outcome, in the order of a hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from elva.data import Item, Query, load
from elva.data.schema import hashed_id
from elva.errors import DataError, UserError
from elva.report import pictures
from elva.report.figures import Row, row_with
from elva.run import Run, evaluated

SHOWN = {"t2i": 12, "i2t": 4}
"""Queries of each task."""


@dataclass(frozen=True)
class Answer:
    """One of a query's first five: its name, its picture as a data URI, whether it is right."""

    name: str
    picture: str | None
    hit: bool


@dataclass(frozen=True)
class Side:
    """What a stage answered to a query."""

    title: str
    rank: int
    summary: str
    answers: list[Answer]


@dataclass(frozen=True)
class Card:
    """A query, the picture that it asks for or by, and every side's answers."""

    head: str
    outcome: str
    asked: str | None
    sides: list[Side]


@dataclass(frozen=True)
class Section:
    """The examples of a task, out of `known` held-out queries."""

    task: str
    known: int
    counts: str
    cards: list[Card]


@dataclass(frozen=True)
class Examples:
    """All that the report shows of a run's retrieval."""

    sections: list[Section] = field(default_factory=list)
    credit: str | None = None
    """The line that the pictures ask for."""
    missing: str | None = None
    """Why nothing can be shown, where there would be something."""


def examples(run: Run, rows: Sequence[Row]) -> Examples:
    """The examples of a run's evaluations, with pictures out of its data."""
    if not any(row.samples(task) for row in rows for task in SHOWN):
        return Examples()
    try:
        gallery = _Gallery(rows, evaluated(run.recipe)[0])
        sections = [section for task in SHOWN if (section := gallery.section(task)) is not None]
    except (DataError, UserError) as error:
        return Examples(missing=str(error))
    return Examples(sections, pictures.attribution(gallery.pictures))


class _Gallery:
    """Examples from the last stage and the one before it, with the pictures they need."""

    def __init__(self, rows: Sequence[Row], root: Path) -> None:
        """
        Args:
            root: the data that the rows were evaluated on.

        Raises:
            DataError: it is not that data: its pictures would be shown beside the wrong words.
        """
        sides = [row_with(rows, "before"), row_with(rows, "last")]
        self.rows = [row for row in sides if row and any(map(row.samples, SHOWN))]
        split = self.rows[-1].evaluation.get("split", "test") if self.rows else "test"
        tasks = [task for task in SHOWN if any(row.samples(task) for row in self.rows)]
        self.dataset = load(root, split=split, tasks=tasks)
        self.names = pictures.names(root)
        self.queries = self._asked_about()
        self.pictures: dict[str, str] = {}
        for row in self.rows:
            for task in SHOWN:
                self._check(root, row, row.samples(task).values())

    def _asked_about(self) -> dict[str, Query]:
        """The queries that were evaluated, by id."""
        ids = {hashed_id(id) for row in self.rows for task in SHOWN for id in row.samples(task)}
        queries = self.dataset.queries
        rows = np.flatnonzero(np.isin(queries.column("id"), list(ids)))
        return {query.id: query for query in queries.select(rows)}

    def _check(self, root: Path, row: Row, samples: Iterable[Mapping[str, Any]]) -> None:
        for sample in samples:
            query = self.queries.get(sample["id"])
            if query is None or (query.raw_text, list(query.positives)) != (
                sample["query"],
                sample["positives"],
            ):
                raise DataError(
                    f"{root}: must be the data that {row.title} was evaluated on, got another "
                    f"query {sample['id']}; evaluate it again"
                )

    def section(self, task: str) -> Section | None:
        """The examples of a task; None where no query was asked of every side."""
        samples = [row.samples(task) for row in self.rows]
        known = [i for i in samples[-1] if all(i in s for s in samples)] if samples else []
        outcomes = {i: self._outcome([s[i]["rank"] for s in samples]) for i in known}
        chosen = choose(outcomes, SHOWN[task])
        if not chosen:
            return None
        kinds, every = dict.fromkeys(chosen.values()), list(outcomes.values())
        counts = ", ".join(f"{kind}: {every.count(kind):,}" for kind in kinds)
        cards = [
            Card(
                self._head(task, samples[-1][i]),
                outcome,
                self._asked(task, i, samples[-1][i]),
                [
                    Side(row.title, s[i]["rank"], s[i].get("summary") or "",
                         self._answers(task, s[i]))
                    for row, s in zip(self.rows, samples, strict=True)
                ],
            )
            for i, outcome in chosen.items()
        ]  # fmt: skip
        return Section(task, len(known), counts, cards)

    def _outcome(self, ranks: Sequence[int]) -> str:
        right = [rank == 1 for rank in ranks]
        if len(set(right)) > 1:
            return f"{'won' if right[-1] else 'lost'} by {self.rows[-1].title}"
        both = "both " if len(ranks) > 1 else ""
        return both + ("right" if right[0] else "wrong")

    def _head(self, task: str, sample: Mapping[str, Any]) -> str:
        return sample.get("query") or f"right answer: {self._name(task, sample['positives'][0])}"

    def _asked(self, task: str, id: str, sample: Mapping[str, Any]) -> str | None:
        """For a text the picture it asks for; for a picture itself."""
        if task == "i2t":
            return self._picture(self.queries.get(id))
        return self._candidate(sample["positives"][0])

    def _answers(self, task: str, sample: Mapping[str, Any]) -> list[Answer]:
        ids = [top["id"] for top in sample["top"]]
        return [
            Answer(
                self._name(task, id),
                self._candidate(id) if task == "t2i" else None,
                id in sample["positives"],
            )
            for id in ids
        ]

    def _name(self, task: str, id: str) -> str:
        pool = self.dataset.pool(task)
        text = self.names.get(id) if task == "t2i" else id in pool and pool[pool.row(id)].text
        return text.removesuffix(".") if text else id

    def _candidate(self, id: str) -> str | None:
        pool = self.dataset.pool("t2i")
        return self._picture(pool[pool.row(id)]) if id in pool else None

    def _picture(self, item: Item | None) -> str | None:
        if item is None or item.image is None:
            return None
        if item.id not in self.pictures:
            self.pictures[item.id] = pictures.data_uri(item)
        return self.pictures[item.id]


def choose(outcomes: Mapping[str, str], count: int) -> dict[str, str]:
    """`count` queries, as many of each outcome as there are, filled up from the rest.

    Args:
        outcomes: query id -> outcome.

    Returns:
        The chosen of them, outcome by outcome.
    """
    order = sorted(outcomes, key=lambda i: hashlib.sha256(i.encode()).digest())
    kinds = sorted(
        set(outcomes.values()), key=lambda o: (not o.startswith("won"), "lost" not in o, o)
    )
    share = count // max(1, len(kinds))
    first = [i for kind in kinds for i in [j for j in order if outcomes[j] == kind][:share]]
    rest = [i for i in order if i not in first]
    chosen = set(first + rest[: count - len(first)])
    return {i: kind for kind in kinds for i in order if i in chosen and outcomes[i] == kind}
