"""What each query of a step is compared with: its right answers, its own negatives, the batch.

Candidates are told apart by what they say and show (`Candidates.identities`), never by their id: a
copy of a right answer is no negative, and what two queries share is embedded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elva.data import Query
from elva.draws import uniforms
from elva.errors import UserError
from elva.recipe import StageConfig
from elva.training.examples import Examples
from elva.training.plan import Batch

SOURCES = ("given", "mined", "random", "in_batch")
"""Where a negative comes from; `Comparison.sources` counts in this order."""


@dataclass(frozen=True)
class Comparison:
    """One step's queries among its candidates, which are named by their place in `candidates`.

    Args:
        queries: B of them.
        candidates: [M] rows of `Examples.candidates`, distinct by content.
        rolled: the first so many are rolled out; the others' embeddings come from the bank.
        target: [B, P] places of the right answers that are trained, -1 where there are fewer.
        excluded: [E, 2] (query, place): right answers that are not trained in this step.
        negatives: [B, N] places of a query's own negatives and, where it ranks against the batch,
            of the others' answers; -1 where there are fewer.
        sources: [B, N] index into `SOURCES`.
    """

    queries: list[Query]
    candidates: np.ndarray
    rolled: int
    target: np.ndarray
    excluded: np.ndarray
    negatives: np.ndarray
    sources: np.ndarray


def compare(
    stage: StageConfig,
    examples: Examples,
    batch: Batch,
    own: np.ndarray,
    sources: np.ndarray,
    seed: Sequence[int | str],
) -> Comparison:
    """A batch with its candidates.

    Args:
        own: [B, N] rows of `Examples.candidates`, each query's own negatives, -1 where fewer.
        sources: [B, N] index into `SOURCES`.
    """
    queries = [examples.query(row) for row in batch.rows]
    right = _right(examples, queries)
    trained = _trained(stage, [examples.right(query) for query in queries], batch, seed)
    every = np.unique(np.concatenate([own[own >= 0], *map(np.asarray, right)]).astype(np.int64))
    # What is only captioned is compared with nothing, and its pictures are not looked at.
    identities = examples.candidates.identities(every) if stage.embeds else every
    known = dict(zip(every.tolist(), identities.tolist(), strict=True))
    places: dict[int, int] = {}  # identity -> place
    rows: list[int] = []

    def place(row: int) -> int:
        if known[row] not in places:
            places[known[row]] = len(rows)
            rows.append(row)
        return places[known[row]]

    target = _padded([list(dict.fromkeys(map(place, some))) for some in trained])
    own_places = [[place(row) if row >= 0 else -1 for row in some] for some in own.tolist()]
    answers = int(target.max()) + 1
    rolled = {"query": 0, "query_positive": answers if stage.banks else len(rows)}
    correct = [{places[known[r]] for r in some if known[r] in places} for some in right]
    excluded = [(b, p) for b, some in enumerate(correct) for p in sorted(some - {*target[b]})]
    negatives = np.array(own_places, np.int64).reshape(len(queries), -1)
    for b, some in enumerate(correct):
        _blank(negatives[b], some)
    if stage.ranks and stage.negatives.in_batch:
        others = np.tile(np.arange(answers), (len(queries), 1))
        for b, some in enumerate(correct):
            _blank(others[b], some | {*negatives[b].tolist()})
        negatives = np.concatenate([negatives, others], 1)
        sources = np.concatenate([sources, np.full_like(others, SOURCES.index("in_batch"))], 1)
    if stage.ranks and not (negatives >= 0).any():
        raise UserError(
            f"train: a step's queries must have negatives to rank against, got none in step "
            f"{batch.step}; set the stage's negatives.mined, random or in_batch"
        )
    return Comparison(
        queries,
        np.array(rows, np.int64),
        rolled.get(stage.rollout_candidates, len(rows)),
        target,
        np.array(excluded, np.int64).reshape(-1, 2),
        negatives,
        sources,
    )


def _right(examples: Examples, queries: Sequence[Query]) -> list[list[int]]:
    """Every right answer of each query, those of an equal query of the batch included."""
    asked: dict[tuple[str, str], list[int]] = {}
    keys = [(query.prompted, str(query.image)) for query in queries]
    for key, query in zip(keys, queries, strict=True):
        asked.setdefault(key, []).extend(examples.right(query))
    return [asked[key] for key in keys]


def _trained(
    stage: StageConfig, right: Sequence[Sequence[int]], batch: Batch, seed: Sequence[int | str]
) -> list[list[int]]:
    """The right answers that this step trains: all, or one of each query drawn anew."""
    if stage.positives == "all":
        return [list(some) for some in right]
    drawn = uniforms((*seed, "positive", batch.step), (len(right),)).tolist()
    return [[some[int(u * len(some))]] for some, u in zip(right, drawn, strict=True)]


def _padded(lists: Sequence[Sequence[int]]) -> np.ndarray:
    out = np.full((len(lists), max(map(len, lists))), -1, np.int64)
    for row, some in zip(out, lists, strict=True):
        row[: len(some)] = some
    return out


def _blank(row: np.ndarray, places: set[int]) -> None:
    """-1 for places that are no negatives, and for the repeats of one."""
    first = np.zeros(len(row), bool)
    first[np.unique(row, return_index=True)[1]] = True
    row[~first | np.isin(row, list(places))] = -1
