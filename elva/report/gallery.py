"""Retrieval examples for the report: a query, what the model wrote about it, and what it found.

Which queries are shown is nobody's choice: the same number of each outcome, in the order of a hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from elva.data import DataError, Item, load
from elva.report import page, pictures
from elva.report.figures import Row, row_with

SHOWN = {"t2i": 12, "i2t": 4}
"""Queries of each task."""

PICTURES = "pictures"
"""Directory of the report's small pictures, inside the run."""


class Gallery:
    """Examples from the last stage and the one before it, with the pictures they need."""

    def __init__(self, rows: Sequence[Row], root: Path, directory: Path) -> None:
        """
        Args:
            root: the data that the rows were evaluated on.
            directory: the run's.

        Raises:
            DataError: it is not that data: its pictures would be shown beside the wrong words.
        """
        sides = [row_with(rows, "before"), row_with(rows, "last")]
        self.rows = [row for row in sides if row is not None and row.samples("t2i")]
        self.directory = directory
        split = self.rows[-1].evaluation.get("split", "test") if self.rows else "test"
        self.dataset = load(root, split=split, tasks=["t2i", "i2t"])
        self.names = pictures.names(root)
        self.queries = {query.id: query for query in self.dataset.queries}
        self.shown: set[str] = set()
        for row in self.rows:
            for task in SHOWN:
                self._check(root, row, row.samples(task).values())

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

    def sections(self) -> str:
        """The examples of both tasks, as HTML; the pictures are written on the way."""
        return "\n".join(
            [
                self._section(
                    "t2i",
                    "Pictures found for a text",
                    "Beside each text is the picture that it asks for, below it the first five "
                    "that were found; the right one is framed.",
                    self._text_to_pictures,
                ),
                self._section(
                    "i2t",
                    "Names found for a picture",
                    "Below each picture are the first five names that were found; the right one is "
                    "ticked.",
                    self._picture_to_names,
                ),
            ]
        )

    def _section(
        self, task: str, title: str, about: str, draw: Callable[[str, Mapping[str, Any]], str]
    ) -> str:
        samples = [row.samples(task) for row in self.rows]
        known = [i for i in samples[-1] if all(i in s for s in samples)] if samples else []
        outcomes = {i: self._outcome([s[i]["rank"] for s in samples]) for i in known}
        chosen = choose(outcomes, SHOWN[task])
        if not chosen:
            return ""
        counts = [
            f"{o}: {list(outcomes.values()).count(o):,}" for o in dict.fromkeys(chosen.values())
        ]
        note = (
            f"{about} “Wrote” is the summary of the query that ended in [RET]. {len(chosen)} of "
            f"{len(known):,} held-out queries: equally many of each outcome where there are so "
            f"many ({', '.join(counts)}), picked by a hash, not by hand."
        )
        cards = [
            page.card(
                self._head(task, samples[-1][i]),
                outcome,
                self._ask(task, i, samples[-1][i]),
                [
                    page.side(
                        f"{row.title}: right answer at rank {s[i]['rank']:,}",
                        s[i].get("summary") or "",
                        draw(i, s[i]),
                    )
                    for row, s in zip(self.rows, samples, strict=True)
                ],
            )
            for i, outcome in chosen.items()
        ]
        return page.section(title, page.text(note, "note"), *cards)

    def _outcome(self, ranks: Sequence[int]) -> str:
        right = [rank == 1 for rank in ranks]
        if len(set(right)) > 1:
            return f"{'won' if right[-1] else 'lost'} by {self.rows[-1].title}"
        both = "both " if len(ranks) > 1 else ""
        return both + ("right" if right[0] else "wrong")

    # -- one example -------------------------------------------------------------------------------

    def _head(self, task: str, sample: Mapping[str, Any]) -> str:
        return sample.get("query") or f"right answer: {self._name(task, sample['positives'][0])}"

    def _ask(self, task: str, id: str, sample: Mapping[str, Any]) -> str:
        """For a text the picture it asks for; for a picture itself."""
        if task == "i2t":
            query = self.queries.get(id)
            return page.picture(self._file(query), "the query", "pic ask")
        return page.picture(self._candidate(sample["positives"][0]), "the right answer", "pic ask")

    def _text_to_pictures(self, id: str, sample: Mapping[str, Any]) -> str:
        return page.strip([
            (self._candidate(t["id"]), self._name("t2i", t["id"]), t["id"] in sample["positives"])
            for t in sample["top"]
        ])  # fmt: skip

    def _picture_to_names(self, id: str, sample: Mapping[str, Any]) -> str:
        return page.ranked([
            (self._name("i2t", t["id"]), t["id"] in sample["positives"]) for t in sample["top"]
        ])  # fmt: skip

    def _name(self, task: str, id: str) -> str:
        pool = self.dataset.pool(task)
        text = self.names.get(id) if task == "t2i" else id in pool and pool[pool.row(id)].text
        return text.removesuffix(".") if text else id

    def _candidate(self, id: str) -> str | None:
        pool = self.dataset.pool("t2i")
        return self._file(pool[pool.row(id)]) if id in pool else None

    def _file(self, item: Item | None) -> str | None:
        """A picture's place relative to the report, written there once."""
        if item is None or item.image is None:
            return None
        file = f"{PICTURES}/{item.id.replace(':', '-')}.png"
        if item.id not in self.shown:
            pictures.thumbnail(self.directory / file, item)
            self.shown.add(item.id)
        return file


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
