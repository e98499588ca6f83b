"""What a stage trains on: its queries, and the candidates that they are told from.

Nothing here is a list of all rows: queries and pools stay the mapped tables that the data room
reads, and are named by their row.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from elva.data import Dataset, Item, Pool, Query
from elva.data.sample import subset_rows
from elva.errors import UserError
from elva.recipe import StageConfig


class Candidates:
    """The pools of several tasks as one numbering: row -> `Item`.

    Args:
        pools: task -> pool; tasks may share one.
    """

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        distinct = list({id(pool): pool for pool in pools.values()}.values())
        starts = np.cumsum([0, *map(len, distinct)])
        self.pools, self._starts = distinct, starts
        place = {id(pool): i for i, pool in enumerate(distinct)}
        self._place = {task: place[id(pool)] for task, pool in pools.items()}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Item:
        place = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.pools[place][int(row - self._starts[place])]

    def span(self, task: str) -> tuple[int, int]:
        """First row and one beyond the last of a task's pool."""
        place = self._place[task]
        return int(self._starts[place]), int(self._starts[place + 1])

    def row(self, task: str, id: str) -> int:
        """The row of an id in a task's pool."""
        place = self._place[task]
        return int(self._starts[place]) + self.pools[place].row(id)

    def identities(self, rows: np.ndarray) -> np.ndarray:
        """One number a row, [n] int64: equal ones are the same answer, whatever it is called."""
        found = np.empty(len(rows), np.int64)
        places = np.searchsorted(self._starts, rows, side="right") - 1
        for place in np.unique(places).tolist():
            some = places == place
            found[some] = self.pools[place].identities(rows[some] - self._starts[place])
        return found

    @property
    def pictures(self) -> int:
        """How many have one."""
        return sum(len(pool.pictured) for pool in self.pools)


class Examples:
    """The training queries of a stage, by row, with their right answers and given negatives.

    Args:
        dataset: a split.
        stage: its tasks and share of the data; a query of which no right answer is in the pool
            trains nothing and is left out.
        seed: of the share.
    """

    def __init__(self, dataset: Dataset, stage: StageConfig, seed: int = 0) -> None:
        queries = dataset.queries
        tasks = {task: share for task, share in stage.tasks.items() if share > 0}
        answered = queries.listed("positives") > 0
        drawn = np.full(len(queries), stage.share == 1)
        if stage.share < 1:
            drawn[subset_rows(queries, stage.share, "dataset", seed)] = True
        rows = {
            task: found[(answered & drawn)[found]]
            for task in tasks or queries.tasks()
            for found in [queries.rows_of(task)]
        }
        empty = [task for task, found in rows.items() if not len(found)]
        if not tasks:
            rows = {task: found for task, found in rows.items() if len(found)}
        if (tasks and empty) or not rows:
            there = ", ".join(queries.tasks()) or "none"
            raise UserError(
                f"train: {dataset.root} must have {dataset.split} queries of "
                f"{', '.join(empty) or 'any task'}, "
                f"got {there}; set the stage's tasks or data"
            )
        self.queries, self.rows, self._root = queries, rows, dataset.root
        self.shares = dict(tasks) or {task: float(len(found)) for task, found in rows.items()}
        self.candidates = Candidates({task: dataset.pool(task) for task in rows})
        self.captions = Captions(dataset) if stage.lm > 0 or stage.completions == "gold" else None
        self.unanswered, self.notices = int((~answered).sum()), dataset.notices

    def __len__(self) -> int:
        return sum(map(len, self.rows.values()))

    def query(self, row: int) -> Query:
        """The query of a row."""
        return self.queries[int(row)]

    def right(self, query: Query) -> list[int]:
        """Rows of its right answers in `candidates`, those that the pool holds."""
        return [self.candidates.row(query.task, id) for id in query.positives]

    def given(self, query: Query) -> list[int]:
        """Rows of the negatives that the data names."""
        return [self.candidates.row(query.task, id) for id in query.negatives]

    def candidate_grains(self) -> list[frozenset[tuple[str, str]]]:
        """(type, text) of the grains of each candidate: those of the text that asks for it, or that
        it is.

        Raises:
            UserError: no query has grains.
        """
        known: dict[str, frozenset[tuple[str, str]]] = {}
        for query in self.queries:
            if query.grains:
                grains = frozenset((grain.type, grain.text) for grain in query.grains)
                for name in (query.text or "", *query.positives):
                    known.setdefault(name, grains)
        if not known:
            raise UserError(
                f"train: {self._root} must have queries with grains for relevance grains, got none;"
                " set relevance to start or none"
            )
        items = (self.candidates[row] for row in range(len(self.candidates)))
        nothing: frozenset[tuple[str, str]] = frozenset()
        return [known.get(item.id, known.get(item.text or "", nothing)) for item in items]

    @property
    def negatives(self) -> int:
        """How many of the queries name negatives."""
        named = self.queries.listed("negatives") > 0
        return sum(int(named[found].sum()) for found in self.rows.values())

    @property
    def pictures(self) -> int:
        """Pictures of queries and candidates, those that several share counted several times."""
        asked = np.isin(np.concatenate(list(self.rows.values())), self.queries.pictured)
        return self.candidates.pictures + int(asked.sum())


class Captions:
    """What the items of a data set say or show, in words: a summary to learn from."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    @cached_property
    def _names(self) -> dict[str, str]:
        """Picture -> the text that the data says it shows."""
        queries = self.dataset.queries
        named = [queries[row] for row in queries.rows_of("t2i").tolist()]
        return {id: query.text for query in named if query.text for id in query.positives}

    def of(self, candidates: Sequence[Item]) -> list[str | None]:
        """A caption each; None where the data has no words for it."""
        found = [item.text or self._names.get(item.id) for item in candidates]
        # M-BEIR's full stop says nothing.
        return [None if text is None else text.removesuffix(".") for text in found]
