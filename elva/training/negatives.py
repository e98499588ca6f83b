"""A query's own negatives: those that the data gives, the pool's hardest, and some at random.

Liu et al., ELVA, arXiv:2606.20280, sec. 3.4: drop the candidates whose similarity exceeds a
threshold, keep the top 50 of what remains, add 50 drawn at random.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from elva.data import Item, Query
from elva.draws import Seed, permutation
from elva.hardest import at_random, hardest
from elva.processes import Processes
from elva.recipe import StageConfig
from elva.training.comparison import SOURCES
from elva.training.examples import Candidates, Examples
from elva.training.plan import Batch

_NEIGHBOURHOOD = 50
"""Ours: the hardest candidates among which a hard batch looks for the batch's other answers."""

_AT_A_TIME = 4096
"""Ours: items that are held as Python objects while a pool is embedded."""


Embed = Callable[[Sequence[Item]], Tensor]
"""Items -> [n, D], greedily, with the weights of now."""


def embedded(embed: Embed, items: Sequence[Item] | Candidates, rows: Sequence[int]) -> Tensor:
    """[n, D] of some rows, some thousand items at a time."""
    some = (rows[start : start + _AT_A_TIME] for start in range(0, len(rows), _AT_A_TIME))
    return torch.cat([embed([items[row] for row in part]) for part in some])


class Negatives:
    """Where a stage's negatives come from; what it mined, and the embeddings it mined from.

    Args:
        processes: those that share out what is searched.
    """

    def __init__(
        self,
        stage: StageConfig,
        examples: Examples,
        seed: Seed,
        embed: Embed,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.stage, self.examples, self.seed, self.embed = stage, examples, tuple(seed), embed
        self.bank: Tensor | None = None  # [candidates, D]
        self.mined: Tensor | None = None  # [queries, K] rows of candidates, hardest first, or -1
        self._rows = np.concatenate(list(examples.rows.values()))  # of the queries, as mined
        self._place = {int(row): i for i, row in enumerate(self._rows)} if self._mines else {}

    @property
    def _mines(self) -> bool:
        return self.stage.negatives.mined > 0 or self.stage.hard_batches

    @property
    def depth(self) -> int:
        """Mined candidates a query."""
        return max(self.stage.negatives.mined, _NEIGHBOURHOOD if self.stage.hard_batches else 0)

    def prepare(self, step: int) -> None:
        """Embed and mine where this step needs it and nothing was mined or restored."""
        wanted = self._mines or self.stage.banks
        if wanted and (self.due(step) or (self.bank is None and not self._whole())):
            self.mine()

    def due(self, step: int) -> bool:
        """Whether this step embeds and mines anew."""
        every = self.stage.refresh_steps
        again = every is not None and step > 0 and step % every == 0
        return again and (self._mines or self.stage.banks)

    def _whole(self) -> bool:
        """Whether what was mined is there, and no bank is kept."""
        return self.mined is not None and not self.stage.banks

    def mine(self) -> None:
        """Embed the pools and the queries that need it with the weights of now, and search.

        A pool is embedded where a query needs mined rows of it, or the bank is kept.
        """
        candidates = self.examples.candidates
        wanted = {task: self._needing(rows) for task, rows in self.examples.rows.items()}
        pools: dict[tuple[int, int], list[str]] = {}
        for task in wanted:
            pools.setdefault(candidates.span(task), []).append(task)
        self.bank = None
        self.mined = torch.full((len(self._rows), self.depth), -1) if self._mines else None
        for span, tasks in pools.items():
            if not (self.stage.banks or any(len(wanted[task]) for task in tasks)):
                continue
            pool = embedded(self.embed, candidates, range(*span))
            for task in tasks:
                self._mine_task(wanted[task], pool, span[0])
            if self.stage.banks:
                if self.bank is None:
                    self.bank = pool.new_zeros(len(candidates), pool.shape[1])
                self.bank[slice(*span)] = pool

    def _needing(self, rows: np.ndarray) -> np.ndarray:
        """Those of some queries whose given negatives are too few."""
        if not self._mines or self.stage.hard_batches:
            return rows if self._mines else rows[:0]
        settings = self.stage.negatives
        if settings.given < settings.count:
            return rows
        known = [len(self._given(self.examples.query(row), 0, row)) for row in rows.tolist()]
        return rows[np.array(known, np.int64) < settings.count]

    def _mine_task(self, rows: np.ndarray, pool: Tensor, start: int) -> None:
        """Mine some queries of one pool, whose rows of candidates begin at `start`."""
        if not len(rows):
            return
        assert self.mined is not None
        query = embedded(self.embed, self.examples.queries, rows.tolist())
        own = self.processes.share(len(rows))
        asked = (self.examples.query(row) for row in rows[own.start : own.stop].tolist())
        right = [self.examples.right(query) for query in asked]
        found = hardest(
            query[own.start : own.stop],
            [pool],
            [[row - start for row in some] for some in right],
            k=self.depth,
            max_score=self.stage.max_score,
            identities=lambda some: self.examples.candidates.identities(some + start),
        )
        places = torch.tensor([self._place[row] for row in rows.tolist()])
        mined = torch.where(found.rows < 0, -1, found.rows + start)
        self.mined[places] = self.processes.gather(mined, len(rows)).cpu()

    def neighbours(self) -> dict[int, list[int]]:
        """For each query the queries whose answers it is most likely to be given, likeliest
        first."""
        assert self.mined is not None
        found: dict[int, list[int]] = {}
        for rows in self.examples.rows.values():
            asks: dict[int, int] = {}
            for row in rows.tolist():
                for answer in self.examples.right(self.examples.query(row)):
                    asks.setdefault(answer, row)
            for row in rows.tolist():
                hard = self.mined[self._place[row]].tolist()
                found[row] = [asks[c] for c in hard if c in asks]
        return found

    def of(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """[B, N] rows of a batch's own negatives, -1 where there are fewer, and their sources."""
        count = self.stage.negatives.count if self.stage.embeds else 0
        rows = np.full((len(batch.rows), count), -1, np.int64)
        sources = np.full_like(rows, SOURCES.index("random"))
        for b, row in enumerate(batch.rows if count else ()):
            query = self.examples.query(row)
            given, mined = self._given(query, batch.step, row), self._mined(row)
            known = [c for c in dict.fromkeys([*given, *mined]) if c >= 0][: rows.shape[1]]
            known += at_random(
                self.examples.candidates.span(query.task),
                {*known, *self.examples.right(query)},
                min(rows.shape[1] - len(known), self.stage.negatives.random),
                self.examples.candidates.identities,
                (*self.seed, "random", batch.step, row),
            )
            rows[b, : len(known)] = known
            sources[b, : len(known)] = [
                SOURCES.index("given" if c in given else "mined" if c in mined else "random")
                for c in known
            ]
        return rows, sources

    def _given(self, query: Query, step: int, row: int) -> list[int]:
        """So many of its own list, but none that is an answer or the copy of one."""
        wanted = self.stage.negatives.given
        listed = self.examples.given(query) if wanted else []
        if not listed:
            return []
        identities = self.examples.candidates.identities
        right = set(identities(np.array(self.examples.right(query), np.int64)).tolist())
        numbers = identities(np.array(listed, np.int64)).tolist()
        known = [c for c, number in zip(listed, numbers, strict=True) if number not in right]
        if len(known) <= wanted:
            return known
        order = permutation((*self.seed, "given", step, row), len(known))
        return [known[i] for i in sorted(order[:wanted])]

    def _mined(self, row: int) -> list[int]:
        if self.mined is None or not self.stage.negatives.mined:
            return []
        mined: list[int] = self.mined[self._place[row], : self.stage.negatives.mined].tolist()
        return mined

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: mined at an earlier step, so not to be had from the weights of now."""
        known = {"bank": self.bank, "mined": self.mined}
        return {name: value for name, value in known.items() if value is not None}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """What `state` gave."""
        self.bank = state["bank"].to(device) if "bank" in state else None
        self.mined = state.get("mined")
