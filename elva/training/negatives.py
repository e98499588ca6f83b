"""A query's own negatives: those that the data gives, the pool's hardest, and some at random.

Liu et al., ELVA, arXiv:2606.20280, sec. 3.4: drop the candidates whose similarity exceeds a
threshold, keep the top 50 of what remains, add 50 drawn at random.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from elva.data import Item, Query
from elva.draws import permutation, uniforms
from elva.hardest import hardest
from elva.recipe import StageConfig
from elva.training.comparison import SOURCES
from elva.training.examples import Examples
from elva.training.plan import Batch

NEIGHBOURHOOD = 50
"""Ours: the hardest candidates among which a hard batch looks for the batch's other answers."""

Seed = Sequence[int | str]


class Negatives:
    """Where a stage's negatives come from; what it mined, and the embeddings it mined from.

    Args:
        embed: items -> [n, D], greedily, with the weights of now.
    """

    def __init__(
        self,
        stage: StageConfig,
        examples: Examples,
        seed: Seed,
        embed: Callable[[Sequence[Item]], Tensor],
    ) -> None:
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
        return max(self.stage.negatives.mined, NEIGHBOURHOOD if self.stage.hard_batches else 0)

    def prepare(self, step: int) -> None:
        """Embed and mine where this step needs it and nothing was mined or restored."""
        every = self.stage.refresh_steps
        due = every is not None and step > 0 and step % every == 0
        if (self._mines or self.stage.banks) and (due or (self.bank is None and not self._whole())):
            self.mine()

    def _whole(self) -> bool:
        """Whether what was mined is there, and no bank is kept."""
        return self.mined is not None and not self.stage.banks

    def mine(self) -> None:
        """Embed the pools and the queries that need it with the weights of now, and search."""
        candidates, groups = self.examples.candidates, self.examples.rows
        bank: Tensor | None = None
        self.mined = None
        spans: dict[tuple[int, int], None] = {}
        for task, rows in groups.items():
            span = candidates.span(task)
            if span not in spans:
                spans[span] = None
                part = self.embed([candidates[i] for i in range(*span)])
                if bank is None:
                    bank = part.new_zeros(len(candidates), part.shape[1])
                bank[slice(*span)] = part
            if self._mines:
                assert bank is not None
                self._mine_task(task, rows, bank[slice(*span)])
        self.bank = bank if self.stage.banks else None

    def _mine_task(self, task: str, rows: np.ndarray, pool: Tensor) -> None:
        if self.mined is None:
            self.mined = torch.full((len(self._rows), self.depth), -1)
        queries = [self.examples.query(row) for row in rows.tolist()]
        chosen = [i for i, query in enumerate(queries) if self._needs(query)]
        if not chosen:
            return
        start = self.examples.candidates.span(task)[0]
        found = hardest(
            self.embed([queries[i] for i in chosen]),
            [pool],
            [[row - start for row in self.examples.right(queries[i])] for i in chosen],
            k=self.depth,
            max_score=self.stage.max_score,
            identities=lambda some: self.examples.candidates.identities(some + start),
        )
        places = torch.tensor([self._place[int(rows[i])] for i in chosen])
        self.mined[places] = torch.where(found.rows < 0, -1, found.rows + start).cpu()

    def _needs(self, query: Query) -> bool:
        settings = self.stage.negatives
        known = min(settings.given, len(query.negatives))
        return self.stage.hard_batches or known < settings.count

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
        rows = np.full((len(batch.rows), self.stage.negatives.count), -1, np.int64)
        sources = np.full_like(rows, SOURCES.index("random"))
        for b, row in enumerate(batch.rows):
            query = self.examples.query(row)
            given, mined = self._given(query, batch.step, row), self._mined(row)
            known = [c for c in dict.fromkeys([*given, *mined]) if c >= 0][: rows.shape[1]]
            known += self._random(query, known, rows.shape[1] - len(known), batch.step, row)
            rows[b, : len(known)] = known
            sources[b, : len(known)] = [0 if c in given else 1 if c in mined else 2 for c in known]
        return rows, sources

    def _given(self, query: Query, step: int, row: int) -> list[int]:
        wanted = self.stage.negatives.given
        known = self.examples.given(query) if wanted else []
        if len(known) <= wanted:
            return known
        order = permutation((*self.seed, "given", step, row), len(known))
        return [known[i] for i in sorted(order[:wanted])]

    def _mined(self, row: int) -> list[int]:
        if self.mined is None or not self.stage.negatives.mined:
            return []
        mined: list[int] = self.mined[self._place[row], : self.stage.negatives.mined].tolist()
        return mined

    def _random(
        self, query: Query, known: Sequence[int], wanted: int, step: int, row: int
    ) -> list[int]:
        """Rows drawn from the whole pool: none right or a copy, none twice, none of `known`."""
        wanted = min(wanted, self.stage.negatives.random)
        first, beyond = self.examples.candidates.span(query.task)
        right = self.examples.right(query)
        found: list[int] = []
        taken = {*known, *right}
        seen = set(self._identities([*known, *right]))
        for tries in range(1 + (wanted > 0) * (beyond - first)):
            if len(found) >= wanted or len(taken) >= beyond - first:
                break
            draws = uniforms((*self.seed, "random", step, row, tries), (2 * wanted + 8,))
            drawn = (first + (draws * (beyond - first)).long()).tolist()
            fresh = [c for c in dict.fromkeys(drawn) if c not in taken]
            for candidate, identity in zip(fresh, self._identities(fresh), strict=True):
                taken.add(candidate)
                if identity not in seen and len(found) < wanted:
                    seen.add(identity)
                    found.append(candidate)
        return found

    def _identities(self, rows: Sequence[int]) -> list[int]:
        found: list[int] = self.examples.candidates.identities(np.array(rows, np.int64)).tolist()
        return found

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: mined at an earlier step, so not to be had from the weights of now."""
        known = {"bank": self.bank, "mined": self.mined}
        return {name: value for name, value in known.items() if value is not None}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """What `state` gave."""
        self.bank = state["bank"].to(device) if "bank" in state else None
        self.mined = state.get("mined")
