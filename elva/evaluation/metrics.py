"""Figures of retrieval, from what was found and what is right.

Ties are pessimistic: among equal scores the wrong candidates come first, so a model that gives
everything the same score earns nothing. Where no scores are equal, every figure is that of
trec_eval's same name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from statistics import fmean

from elva.evaluation.trec import Answers, Qrels

CUTOFFS = (1, 5, 10, 20, 50)


@dataclass(frozen=True)
class Figures:
    """What `measure` gives.

    Args:
        mean: figure -> mean over the queries, in [0, 1].
        per_query: qid -> figure -> value.
        optimistic: the means if ties were broken in the model's favour.
        unanswered: judged queries that the run lacks; they count as 0.
        unjudged: answered queries without a right candidate; they do not count.
    """

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]
    optimistic: dict[str, float]
    unanswered: list[str]
    unjudged: list[str]

    def ties(self) -> list[str]:
        """A line for each figure that ties move by over 0.1 point."""
        return [
            f"{name}: {100 * value:.2f} with ties counted against the model, "
            f"{100 * self.optimistic[name]:.2f} in its favour"
            for name, value in self.mean.items()
            if self.optimistic[name] - value > 0.001
        ]


def measure(
    run: Answers,
    qrels: Qrels,
    cutoffs: Sequence[int] = CUTOFFS,
    *,
    map_cutoffs: Sequence[int] = (),
) -> Figures:
    """Measure a run.

    Args:
        run: each query's answers, deeper than the largest cut-off by as many as it has positives,
            so that a tie at the end of the list cannot hide a candidate.
        qrels: a relevance above 0 is right; higher ones weigh more in nDCG, as in trec_eval.
        map_cutoffs: of `map_at_k`, CIRCO's (Baldrati et al., arXiv:2303.15247): the precisions at
            the ranks of the right answers among the first k, summed, over the smaller of k and
            their number, where trec_eval's map_cut divides by their number.

    Returns:
        `hit_at_k` (M-BEIR's "Recall@k": any positive among the first k), `recall_at_k` (the share
        of them), `mrr` and `mrr_at_10`, `ndcg_at_k`.
    """
    right = {q: {d: r for d, r in judged.items() if r > 0} for q, judged in qrels.items()}
    right = {q: judged for q, judged in right.items() if judged}
    per_query, optimistic = {}, []
    for qid, judged in right.items():
        answers = run.get(qid, ())
        per_query[qid] = _figures(_relevances(answers, judged, 1), judged, cutoffs, map_cutoffs)
        optimistic.append(_figures(_relevances(answers, judged, -1), judged, cutoffs, map_cutoffs))
    names = list(next(iter(per_query.values()), {}))
    return Figures(
        {name: fmean(v[name] for v in per_query.values()) for name in names},
        per_query,
        {name: fmean(v[name] for v in optimistic) for name in names},
        [q for q in right if q not in run],
        [q for q in run if q not in right],
    )


def _relevances(
    answers: Sequence[tuple[str, float]], judged: dict[str, int], against: int
) -> list[int]:
    """Relevance at each rank; `against` 1 puts the wrong first among equals, -1 the right."""
    keyed = [(-score, against * judged.get(did, 0)) for did, score in answers]
    return [abs(relevance) for _, relevance in sorted(keyed)]


def _figures(
    relevances: Sequence[int],
    judged: dict[str, int],
    cutoffs: Sequence[int],
    map_cutoffs: Sequence[int],
) -> dict[str, float]:
    ranks = [rank for rank, relevance in enumerate(relevances, start=1) if relevance]
    first = ranks[0] if ranks else None
    found: dict[str, float] = {}
    for k in cutoffs:
        inside = sum(rank <= k for rank in ranks)
        found[f"hit_at_{k}"] = float(inside > 0)
        found[f"recall_at_{k}"] = inside / len(judged)
        ideal = _gain(sorted(judged.values(), reverse=True)[:k])
        found[f"ndcg_at_{k}"] = _gain(relevances[:k]) / ideal
    for k in map_cutoffs:
        precisions = (i / rank for i, rank in enumerate(ranks, start=1) if rank <= k)
        found[f"map_at_{k}"] = sum(precisions) / min(k, len(judged))
    found["mrr"] = 0.0 if first is None else 1 / first
    found["mrr_at_10"] = found["mrr"] if first is not None and first <= 10 else 0.0
    return found


def _gain(relevances: Sequence[int]) -> float:
    return sum(relevance / log2(rank + 1) for rank, relevance in enumerate(relevances, start=1))
