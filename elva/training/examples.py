"""What a stage trains on: its queries and pools by task, and which of them each step takes.

Data order is a pure function of (seed, step), so a resumed run sees what the unkilled one would
have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from elva.data import Dataset, Item, Query
from elva.errors import UserError
from elva.model.rollout import uniforms
from elva.recipe import StageConfig


class Examples:
    """A training set by task, with the caption that each of its items should be summarised by.

    Args:
        tasks: task -> share of the batches; empty takes all that the data has, by their size.
    """

    def __init__(self, dataset: Dataset, tasks: Mapping[str, float]) -> None:
        self.queries: dict[str, list[Query]] = {task: [] for task in tasks}
        for query in dataset.queries:
            if not tasks or query.task in tasks:
                self.queries.setdefault(query.task, []).append(query)
        empty = [task for task, found in self.queries.items() if not found]
        if empty or not self.queries:
            raise UserError(
                f"train: tasks must have training queries, got none for {', '.join(empty) or 'any'}"
            )
        self.shares = dict(tasks) or {task: float(len(q)) for task, q in self.queries.items()}
        self.pools = {task: dataset.pool(task) for task in self.queries}
        self._names: dict[str, str] = {}  # picture -> the text that the data says it shows
        for query in dataset.queries:
            if query.task == "t2i" and query.text:
                self._names.update((p, query.text) for p in query.positives)

    def positive(self, query: Query) -> Item:
        pool = self.pools[query.task]
        return pool[pool.row(query.positives[0])]

    def positive_rows(self, query: Query) -> list[int]:
        pool = self.pools[query.task]
        return [pool.row(p) for p in query.positives]

    def caption(self, candidate: Item) -> str | None:
        """What a candidate says or shows; a query is summarised by what its positive says or
        shows."""
        text = candidate.text or self._names.get(candidate.id)
        return None if text is None else text.removesuffix(".")  # M-BEIR's full stop says nothing

    def items(self) -> Iterator[Item]:
        """Every query and candidate, in a fixed order."""
        for task, queries in self.queries.items():
            yield from queries
            yield from (self.pools[task][i] for i in range(len(self.pools[task])))


@dataclass(frozen=True)
class Batch:
    """One step's data."""

    step: int
    task: str
    rows: list[int]  # of Examples.queries[task]


def plan(
    stage: StageConfig,
    examples: Examples,
    steps: int,
    seed: Sequence[int | str],
    neighbours: Mapping[str, list[list[int]]] | None = None,
) -> list[Batch]:
    """Which queries each step trains on: a pure function of its arguments.

    With `neighbours` (queries whose answers a query confuses with its own) a batch is made of a few
    seeds and their neighbours, so that the in-batch negatives are hard.
    """
    tasks = list(examples.shares)
    shares = torch.tensor([examples.shares[t] for t in tasks], dtype=torch.float64)
    edges = (shares / shares.sum()).cumsum(0)
    drawn = torch.searchsorted(edges, uniforms((*seed, "task"), (steps,))).clamp_(
        max=len(tasks) - 1
    )
    streams = {t: _forever(len(examples.queries[t]), (*seed, "order", t)) for t in tasks}
    batches = []
    for step in range(steps):
        task = tasks[int(drawn[step])]
        size = min(stage.batch_size, len(examples.queries[task]))
        rows: dict[int, None] = {}
        while len(rows) < size:
            row = next(streams[task])
            group = [row, *(neighbours[task][row][:7] if neighbours else [])]
            rows.update(dict.fromkeys(group))
        batches.append(Batch(step, task, list(rows)[:size]))
    return batches


def _forever(count: int, seed: Sequence[int | str]) -> Iterator[int]:
    epoch = 0
    while True:
        yield from uniforms((*seed, epoch), (count,)).argsort().tolist()
        epoch += 1
