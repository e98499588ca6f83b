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

import elva_kernels
from elva.data import Dataset, Grain, Query
from elva.data.schema import mask_grain
from elva.evaluation.ranks import rank_among, recall_at_k


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
    apart = distance(embeddings[rows], encode([q for _, _, q in taken]))
    return [
        Probe(queries[i].id, queries[i].raw_text or "", grain.text, grain.type, d)
        for (i, grain, _), d in zip(taken, apart.tolist(), strict=True)
    ]


def distance(whole: Tensor, part: Tensor) -> Tensor:
    """[n] fp32 cosine distances, in [0, 2], of the rows of two [n, D] in pairs."""
    nobody = whole.new_empty(len(whole), 0, whole.shape[1])
    return 1 - elva_kernels.ranking_reward(whole, part, nobody).scores[:, 0]


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
    pairs = [(i, dataset.minimal_pairs.get(q.id, ())) for i, q in enumerate(queries)]
    pairs = [(i, ids) for i, ids in pairs if len(ids) > 1]
    if not pairs:
        return None
    pool = dataset.pool(queries[0].task)
    place = {id: row for row, id in enumerate(dict.fromkeys(d for _, ids in pairs for d in ids))}
    shown = encode([pool[pool.row(id)] for id in place])
    positives = [[place[p] for p in queries[i].positives if p in place] for i, _ in pairs]
    rivals = [[place[id] for id in ids] for _, ids in pairs]
    return recall_at_k(rank_among(asked[[i for i, _ in pairs]], shown, positives, rivals), 1)
