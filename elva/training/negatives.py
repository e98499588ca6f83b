"""Negatives for stage 3: a query's hardest candidates and a random half, from the whole pool.

Liu et al., ELVA, arXiv:2606.20280, sec. 3.4: drop the candidates whose similarity exceeds a
threshold, keep the top 50 of what remains, add 50 drawn at random.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from elva.data import Item
from elva.draws import uniforms
from elva.errors import UserError
from elva.model.retriever import Retriever
from elva.model.rollout import encode
from elva.recipe import StageConfig
from elva.training.examples import Batch, Examples


def hardest(
    query: Tensor,
    pool: Tensor,
    positives: Sequence[Sequence[int]],
    *,
    k: int,
    max_score: float,
    chunk: int = 4096,
) -> Tensor:
    """Pool rows of each query's k most similar non-positives, [Q, k] int64, most similar first.

    Args:
        query: [Q, D]; pool: [P, D] embeddings.
        positives: pool rows that are right answers of each query.
        max_score: a candidate with a higher cosine is taken for a false negative and dropped.

    Raises:
        UserError: a query is left with fewer than k candidates.
    """
    unit = F.normalize(pool, dim=-1)
    rows = []
    for start in range(0, len(query), chunk):
        scores = F.normalize(query[start : start + chunk], dim=-1) @ unit.T
        scores.masked_fill_(scores > max_score, float("-inf"))
        for i, right in enumerate(positives[start : start + chunk]):
            scores[i, list(right)] = float("-inf")
        top = scores.topk(min(k, scores.shape[1]), dim=1)
        if top.values.shape[1] < k or bool(torch.isinf(top.values).any()):
            raise UserError(
                f"mine: every query must have {k} candidates at or below max_score {max_score}, "
                f"got {int((~torch.isinf(scores)).sum(1).min())}; lower hard_negatives"
            )
        rows.append(top.indices)
    return torch.cat(rows)


def at_random(
    positives: Sequence[Sequence[int]], pool_size: int, n: int, seed: Sequence[int | str]
) -> Tensor:
    """n pool rows for each query, none of them a right answer, [Q, n] int64; a pure function of
    `seed`."""
    spread = uniforms(seed, (len(positives), n))
    rows = []
    for i, right in enumerate(positives):
        wrong = pool_size - len(set(right))
        if wrong < 1:
            raise UserError(f"mine: the pool must hold a non-positive, got {pool_size} positives")
        drawn = (spread[i] * wrong).long().clamp_(max=wrong - 1)
        for row in sorted(set(right)):  # count over the right answers
            drawn += drawn >= row
        rows.append(drawn)
    return torch.stack(rows)


class Negatives:
    """What a stage ranks its positives against: embedded pools, and each query's hardest
    candidates."""

    def __init__(
        self,
        stage: StageConfig,
        examples: Examples,
        retriever: Retriever,
        seed: Sequence[int | str],
    ) -> None:
        self.stage, self.examples, self.retriever, self.seed = stage, examples, retriever, seed
        self.banks: dict[str, Tensor] = {}  # task -> [P, D] embeddings of its pool
        self.hard: dict[str, Tensor] = {}  # task -> [Q, hard_negatives] pool rows
        self.mine()

    def mine(self) -> None:
        """Embed the training queries and pools greedily with the weights of now, and search
        them."""
        for task, queries in self.examples.queries.items():
            pool = self.examples.pools[task]
            self.banks[task] = self._encode([pool[i] for i in range(len(pool))])
            self.hard[task] = hardest(
                self._encode(queries),
                self.banks[task],
                [self.examples.positive_rows(q) for q in queries],
                k=self.stage.hard_negatives,
                max_score=self.stage.max_score,
            )

    def _encode(self, items: Sequence[Item]) -> Tensor:
        out = encode(self.retriever, items, max_completion_length=self.stage.max_completion_length)
        return out.embeddings.to(self.retriever.device)

    def neighbours(self) -> dict[str, list[list[int]]]:
        """For each query the queries whose answers it is most likely to be given, likeliest
        first."""
        found = {}
        for task, queries in self.examples.queries.items():
            asks: dict[int, int] = {}
            for row, query in enumerate(queries):
                asks.setdefault(self.examples.positive_rows(query)[0], row)
            found[task] = [[asks[c] for c in row if c in asks] for row in self.hard[task].tolist()]
        return found

    def rows(self, batch: Batch) -> Tensor:
        """[B, N] pool rows of a batch: the hard ones, then the random ones."""
        queries = self.examples.queries[batch.task]
        right = [self.examples.positive_rows(queries[r]) for r in batch.rows]
        random = at_random(
            right,
            len(self.examples.pools[batch.task]),
            self.stage.random_negatives,
            (*self.seed, "negatives", batch.step),
        )
        hard = self.hard[batch.task][torch.tensor(batch.rows)]
        return torch.cat([hard, random.to(hard.device)], 1)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: mined at an earlier step, so not to be had from the weights of now."""
        return {f"bank|{t}": v for t, v in self.banks.items()} | {
            f"hard|{t}": v for t, v in self.hard.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """What `state` gave."""
        for name, value in state.items():
            kind, task = name.split("|")
            (self.banks if kind == "bank" else self.hard)[task] = value.to(self.retriever.device)
