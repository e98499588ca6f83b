"""Grain distance: does the embedding move when one grain of the query is taken away?

Liu et al., ELVA, arXiv:2606.20280, sec. 3.2, definition 2 (grain blindness): for some grain g_k,
d(f(q), f(q without g_k)) < delta, with d the cosine distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elva.data import Grain, Query
from elva.data.emoji import mask_grain


def masked(query: Query) -> list[tuple[Grain, Query]]:
    """(grain, the query without it), one for each grain that leaves any text."""
    found = []
    for grain in query.grains or ():
        assert query.raw_text is not None
        rest = mask_grain(query.raw_text, grain)
        if rest:
            found.append((grain, replace(query, text=rest, raw_text=rest, grains=None)))
    return found


@dataclass(frozen=True)
class Probe:
    """One grain taken away from one query.

    Args:
        distance: Cosine distance of the query's embedding with and without the grain, in [0, 2].
    """

    id: str
    text: str
    grain: str
    type: str
    distance: float


def probe(
    queries: Sequence[Query],
    embeddings: Tensor,
    encode: Callable[[Sequence[Query]], Tensor],
) -> list[Probe]:
    """Take away every grain of every query, one at a time.

    Args:
        embeddings: [Q, D], f(q) of each query.
        encode: f for a list of queries, [n, D].
    """
    taken = [(i, *one) for i, query in enumerate(queries) for one in masked(query)]
    if not taken:
        return []
    rows = torch.tensor([i for i, _, _ in taken])
    apart = 1 - torch.cosine_similarity(embeddings[rows], encode([q for _, _, q in taken]))
    return [
        Probe(queries[i].id, queries[i].raw_text or "", grain.text, grain.type, d)
        for (i, grain, _), d in zip(taken, apart.tolist(), strict=True)
    ]


def by_type(probes: Sequence[Probe]) -> dict[str, list[float]]:
    """Distances by grain type."""
    found: dict[str, list[float]] = {}
    for one in probes:
        found.setdefault(one.type, []).append(one.distance)
    return found


def least(probes: Sequence[Probe]) -> list[Probe]:
    """Each query's least seen grain, the most blind query first."""
    found: dict[str, Probe] = {}
    for one in probes:
        if one.id not in found or one.distance < found[one.id].distance:
            found[one.id] = one
    return sorted(found.values(), key=lambda p: (p.distance, p.id))
