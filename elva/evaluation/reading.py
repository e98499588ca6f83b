"""Which grains an embedding holds: a linear probe of it, fitted on some items and asked of others.

Ours. It says which grain embeddings lack, not how well they retrieve: over ways to train stage 3 no
figure of embeddings told that in every comparison, and grain distance least of all
(benchmarks/README.md, "Which figure tells it").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from elva.data import Query

_RIDGE = 1e-2
"""Of the regression, on embeddings of length 1."""

_LEAST_ASKED = 10
"""Items of which a type of grain is asked, at least."""


class Reading(NamedTuple):
    """How well a type of grain is read off embeddings.

    Attributes:
        accuracy: share of the items asked whose value the probe tells.
        chance: the same, of always the commonest value.
        asked: items.
    """

    accuracy: float
    chance: float
    asked: int


def one_of_a_type(query: Query) -> dict[str, str]:
    """Type -> text of the grains that are a query's only ones of their type: two people may differ
    in tone."""
    counts = Counter(grain.type for grain in query.grains or ())
    return {grain.type: grain.text for grain in query.grains or () if counts[grain.type] == 1}


def readings(
    embeddings: Tensor,
    grains: Mapping[int, Mapping[str, str]],
    asked: frozenset[int],
) -> dict[str, Reading]:
    """Type of grain -> how well a ridge regression to its values reads it.

    The entity, of which grains are attributes, is left out, and a type with one value or with
    fewer than `_LEAST_ASKED` items.

    Args:
        embeddings: [n, D] of items.
        grains: row -> type -> text.
        asked: the rows that are asked, of the values that the others have; it is fitted on these.
    """
    shown = embeddings.double()
    shown = shown / shown.norm(dim=1, keepdim=True).clamp(min=torch.finfo(shown.dtype).tiny)
    shown = torch.cat([shown, shown.new_ones(len(shown), 1)], 1)
    found = {}
    for kind in sorted({kind for own in grains.values() for kind in own} - {"entity"}):
        known = {row: own[kind] for row, own in grains.items() if kind in own}
        fitted = [row for row in known if row not in asked]
        values = sorted({known[row] for row in fitted})
        place = {value: i for i, value in enumerate(values)}
        told = [row for row in known if row in asked and known[row] in place]
        if len(values) < 2 or len(told) < _LEAST_ASKED:
            continue
        x, truth = shown[fitted], torch.tensor([place[known[row]] for row in fitted])
        ridge = _RIDGE * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        y = torch.nn.functional.one_hot(truth).to(x)
        guess = (shown[told] @ torch.linalg.solve(x.T @ x + ridge, x.T @ y)).argmax(1).tolist()
        right = [place[known[row]] for row in told]
        commonest = int(truth.bincount().argmax())
        found[kind] = Reading(
            fmean(float(a == b) for a, b in zip(guess, right, strict=True)),
            fmean(float(commonest == b) for b in right),
            len(told),
        )
    return found
