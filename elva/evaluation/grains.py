"""Grain distance: does the embedding move when one grain of the query is taken away?

Liu et al., ELVA, arXiv:2606.20280, sec. 3.2, definition 2 (grain blindness): for some grain g_k,
d(f(q), f(q without g_k)) < delta, with d the cosine distance.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from elva.data import Dataset, Grain, Query
from elva.data.schema import mask_grain
from elva.evaluation.ranks import leads_its_own


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
    queries: Sequence[Query], embeddings: Tensor, encode: Callable[[Sequence[Query]], Tensor]
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


def figures(probes: Sequence[Probe], delta: float) -> dict[str, Any]:
    """The mean, the least type, every type, and the share of queries with a grain not seen.

    Args:
        delta: below it a grain counts as not seen.
    """
    types = {
        kind: {"mean": fmean(values), "count": len(values)}
        for kind, values in sorted(by_type(probes).items())
    }
    weakest = min(types, key=lambda kind: float(types[kind]["mean"]))
    lowest = least(probes)
    return {
        "mean": fmean(p.distance for p in probes),
        "least": {"type": weakest, "mean": types[weakest]["mean"]},
        "types": types,
        "blind": fmean(float(p.distance < delta) for p in lowest),
        "queries": [asdict(p) for p in lowest],
        "probes": [asdict(p) for p in probes],
    }


def minimal_pair_recall(
    dataset: Dataset, queries: Sequence[Query], asked: Tensor, encode: Any
) -> float | None:
    """R@1 among the candidates of the query's own entity; ties count against the model."""
    wanted = {i: dataset.minimal_pairs.get(q.id, ()) for i, q in enumerate(queries)}
    wanted = {i: ids for i, ids in wanted.items() if len(ids) > 1}
    if not wanted:
        return None
    pool = dataset.pool(queries[0].task)
    ids = list(dict.fromkeys(id for some in wanted.values() for id in some))
    place = {id: row for row, id in enumerate(ids)}
    shown = encode([pool[pool.row(id)] for id in ids])
    hits = []
    for i, some in wanted.items():
        rows = shown[[place[id] for id in some]]
        hits.append(leads_its_own(asked[i : i + 1], some, rows, queries[i].positives))
    return fmean(hits)
