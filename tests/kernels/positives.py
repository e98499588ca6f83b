"""Batches with several positives a query and candidates that are left out, for the in-batch ops."""

from typing import Any, NamedTuple

import torch

from elva_kernels import reference
from tests.kernels.cases import batch, every_score
from tests.kernels.in_batch_oracle import Asked

TEMPERATURE = 0.2
# (B, M, D, P): one positive, several, more than there are candidates, no candidates, no queries.
SHAPES = [
    (3, 7, 5, 1),
    (5, 19, 33, 2),
    (6, 40, 16, 5),
    (4, 34, 9, 17),
    (3, 2, 8, 5),
    (2, 0, 4, 2),
    (0, 4, 8, 3),
]


class Case(NamedTuple):
    """Arguments of every in-batch op."""

    query: torch.Tensor
    candidates: torch.Tensor
    target: torch.Tensor | None
    options: dict[str, Any]

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [x.detach().clone().requires_grad_() for x in self[:2]]

    @property
    def asked(self) -> Asked:
        excluded, ids = self.options["excluded"], self.options["candidate_ids"]
        return Asked(
            self.target.tolist(),
            [] if excluded is None else excluded.tolist(),
            None if ids is None else ids.tolist(),
            self.options["max_score"],
        )

    @property
    def batch(self) -> reference.Batch:
        """As a launcher takes it."""
        options = dict(self.options)
        if options["excluded"] is not None:
            pairs = options["excluded"].long()
            options["excluded"] = pairs[pairs[:, 0].argsort()]
        return reference.Batch(self.target.long(), **options)

    def but(self, **options: Any) -> "Case":
        return self._replace(options=self.options | options)


def several(b, m, d, p, dtype, *, seed=0, given=("excluded", "candidate_ids", "max_score")):
    """A query with p positives, one that lists one twice, one with none; copies of positives."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, max(high, low + 1), shape, generator=generator)

    query, candidates = batch(b, m, d, dtype, seed=seed)
    target = draw(-1, m, b, p)
    if b > 0 and m >= p:
        target[0] = torch.randperm(m, generator=generator)[:p]
        candidates[m - 1] = candidates[target[0, 0]]
    if b > 1:
        target[1, -1] = target[1, 0]
        target[b - 1] = -1
    options = {
        "excluded": allowed(target, draw(0, b, 2 * b), draw(0, m, 2 * b)) if m else None,
        "candidate_ids": draw(0, 2 * m // 3, m),
        "max_score": 0.45,
    }
    kept = {name: value if name in given else None for name, value in options.items()}
    return Case(query, candidates, target, kept)


def allowed(target, row, column):
    """Pairs in no order, some twice; without those that name a positive."""
    pairs = torch.stack([row, column], dim=1)
    pairs = torch.cat([pairs, pairs[: len(pairs) // 3]]).flip(0)
    return pairs[(target[pairs[:, 0]] != pairs[:, 1:]).all(1)]


def same_ids(case):
    """The pairs that `candidate_ids` leave out."""
    target, ids = case.target, case.options["candidate_ids"]
    alike = (ids[target.clamp(min=0)].unsqueeze(2) == ids) & (target >= 0).unsqueeze(2)
    row, column = alike.any(1).nonzero().unbind(1)
    pairs = torch.stack([row, column], dim=1)
    return pairs[(target[row] != column.unsqueeze(1)).all(1)]


def own_scores(case, backend):
    """The backend's own scores [B, M]; NaN where a row is not finite."""
    nobody = torch.zeros(len(case.query), dtype=torch.int64)
    return every_score(case.query, case.candidates, nobody, backend)
