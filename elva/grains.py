"""Grain distance: does the embedding move when one grain of the query is taken away?

Liu et al., ELVA, arXiv:2606.20280, sec. 3.2, definition 2 (grain blindness): for some grain g_k,
d(f(q), f(q without g_k)) < delta, with d the cosine distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from elva.data import Query
from elva.data.emoji import mask_grain


def masked(query: Query) -> list[tuple[str, Query]]:
    """(grain type, the query without that grain), one for each grain that leaves any text."""
    found = []
    for grain in query.grains or ():
        assert query.raw_text is not None
        rest = mask_grain(query.raw_text, grain)
        if rest:
            found.append((grain.type, replace(query, text=rest, raw_text=rest, grains=None)))
    return found


def distances(
    queries: Sequence[Query],
    embeddings: Tensor,
    encode: Callable[[Sequence[Query]], Tensor],
) -> dict[str, list[float]]:
    """Cosine distances by grain type.

    Args:
        embeddings: [Q, D], f(q) of each query.
        encode: f for a list of queries, [n, D].
    """
    probes = [(i, kind, q) for i, query in enumerate(queries) for kind, q in masked(query)]
    if not probes:
        return {}
    rows = torch.tensor([i for i, _, _ in probes])
    apart = 1 - torch.cosine_similarity(embeddings[rows], encode([q for _, _, q in probes]))
    found: dict[str, list[float]] = {}
    for (_, kind, _), d in zip(probes, apart.tolist(), strict=True):
        found.setdefault(kind, []).append(d)
    return found
