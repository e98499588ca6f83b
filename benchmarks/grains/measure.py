"""What a model of the laboratory is measured by: ranks a query, and how far grains move it.

Embeddings come first and are kept, figures after: those of the test split can be taken from them
once, when every choice has been made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import elva_kernels
from elva.data import Dataset, Item, Query, load
from elva.data.schema import Grain
from elva.draws import uniforms
from elva.evaluation.grains import distance, masked
from elva.evaluation.ranks import rank_all
from elva.evaluation.reading import one_of_a_type, readings
from elva.model.retriever import Retriever
from elva.model.rollout import encode

DIRECTIONS = ("t2i", "i2t")
SUMMARY, AT_ONCE = 16, 512  # the emoji recipe's: tokens of a summary, rows at once
ACROSS = 5_000  # ours: drawn pairs of pictures of different entities


@dataclass(frozen=True)
class Split:
    """A split's queries, by direction, and the text queries without one grain each."""

    queries: Mapping[str, list[Query]]
    parts: list[tuple[int, Grain, Query]]  # (a text query's place, the grain, the query without it)
    entities: list[tuple[str, ...]]  # of each text query, the pictures of its entity

    @classmethod
    def of(cls, dataset: Dataset) -> Split:
        asked = {d: [*dataset.queries.select(dataset.queries.rows_of(d))] for d in DIRECTIONS}
        parts = [(i, *part) for i, query in enumerate(asked["t2i"]) for part in masked(query)]
        own = (dataset.minimal_pairs.get(q.id, q.positives) for q in asked["t2i"])
        return cls(asked, parts, [*map(tuple, own)])

    def entity_numbers(self) -> list[int]:
        """Of each text query: equal where they ask for one entity."""
        number = {entity: i for i, entity in enumerate(dict.fromkeys(self.entities))}
        return [number[entity] for entity in self.entities]


@dataclass(frozen=True)
class Corpus:
    """The pools and the splits of the emoji, with each picture's grains."""

    pools: Mapping[str, Any]
    splits: Mapping[str, Split]
    grains: Mapping[str, Mapping[str, str]] = field(repr=False)  # picture -> type -> text, of
    # the types that it has one grain of: two people may differ in tone
    training: frozenset[str]  # pictures that were trained on

    @classmethod
    def of(cls, root: Path) -> Corpus:
        read = {s: load(root, split=s, tasks=DIRECTIONS) for s in ("train", "val", "test")}
        grains = {
            id: one_of_a_type(query)
            for dataset in read.values()
            for query in dataset.queries.select(dataset.queries.rows_of("t2i"))
            for id in query.positives
        }
        train = read["train"].queries.select(read["train"].queries.rows_of("t2i"))
        return cls(
            {d: read["val"].pool(d) for d in DIRECTIONS},
            {s: Split.of(read[s]) for s in ("val", "test")},
            grains,
            frozenset(id for query in train for id in query.positives),
        )


def embed(retriever: Retriever, corpus: Corpus) -> dict[str, Tensor]:
    """[n, D] of both pools, and of each split's queries, whole and without one grain each."""

    def of(items: Sequence[Item]) -> Tensor:
        return encode(
            retriever, items, max_completion_length=SUMMARY, batch_size=AT_ONCE
        ).embeddings

    found = {d: of([pool[i] for i in range(len(pool))]) for d, pool in corpus.pools.items()}
    for name, split in corpus.splits.items():
        found |= {f"{name}.{d}": of(queries) for d, queries in split.queries.items()}
        found[f"{name}.parts"] = of([query for _, _, query in split.parts])
    return found


def figures(embedded: Mapping[str, Tensor], corpus: Corpus, name: str) -> dict[str, Any]:
    """A split's figures.

    Returns:
        `ranks`: direction -> rank of each query's answer in the whole pool; `pairs`: the rank of
        each text query's answer among its own entity's pictures, 0 where it has no rivals;
        `grains`: what `_geometry` gives.
    """
    split, ranks = corpus.splits[name], {}
    for direction, queries in split.queries.items():
        pool = corpus.pools[direction]
        right = [[pool.row(id) for id in query.positives] for query in queries]
        ranks[direction] = rank_all(
            embedded[f"{name}.{direction}"], embedded[direction], right
        ).rank.tolist()
    pairs, lead = _among_own(embedded, corpus, name)
    return {"ranks": ranks, "pairs": pairs, "grains": _geometry(embedded, corpus, name, lead)}


def _geometry(
    embedded: Mapping[str, Tensor], corpus: Corpus, name: str, lead: float
) -> dict[str, Any]:
    """How far the embedding of a text moves, and between which of them.

    Returns:
        `distance`: the cosine distance of a query with and without one grain (definition 2 of the
        paper), by the grain's type and over all; `within`: of two pictures of one entity, the mean
        over entities; `across`: of pictures of two entities, drawn; `relative`: the first over
        `across`; `norm`: of a query's embedding; `lead`: by how much the answer's score leads the
        hardest rival's of its own entity; `probe`: accuracy of a linear probe for each type of
        grain, asked of held-out pictures.
    """
    split = corpus.splits[name]
    whole, parts = embedded[f"{name}.t2i"], embedded[f"{name}.parts"]
    rows = torch.tensor([i for i, _, _ in split.parts])
    moved: dict[str, list[float]] = defaultdict(list)
    apart = distance(whole[rows], parts).tolist()
    for (_, grain, _), d in zip(split.parts, apart, strict=True):
        moved[grain.type].append(d)
    pool = corpus.pools["t2i"]
    several = (entity for entity in dict.fromkeys(split.entities) if len(entity) > 1)
    groups = [torch.tensor([pool.row(id) for id in entity]) for entity in several]
    shown = embedded["t2i"]

    def mean_distance(pairs: Tensor) -> float:
        left, right = pairs.unbind(1)
        return float(distance(shown[left], shown[right]).mean())

    within = fmean(mean_distance(torch.combinations(rows_)) for rows_ in groups)
    across = mean_distance(_pairs_across(groups))
    every = fmean(apart)
    return {
        "distance": {"all": every, **{kind: fmean(d) for kind, d in sorted(moved.items())}},
        "within": within,
        "across": across,
        "relative": every / across,
        "norm": float(whole.norm(dim=1).mean()),
        "lead": lead,
        "probe": _probe(embedded, corpus, name),
    }


def _pairs_across(groups: Sequence[Tensor]) -> Tensor:
    """[n, 2] rows of two groups each: both groups are drawn, and one row of each."""
    draws = uniforms(("across",), (ACROSS, 4)).double()
    first = (draws[:, 0] * len(groups)).long()
    second = (first + 1 + (draws[:, 1] * (len(groups) - 1)).long()) % len(groups)
    pairs = [
        torch.stack([groups[g][int(share * len(groups[g]))] for g, share in ends])
        for ends in zip(zip(first, draws[:, 2], strict=True), zip(second, draws[:, 3], strict=True),
                        strict=True)
    ]  # fmt: skip
    return torch.stack(pairs)


def _among_own(
    embedded: Mapping[str, Tensor], corpus: Corpus, name: str
) -> tuple[list[int], float]:
    """The rank of each text query's answer among its own entity's pictures, 0 where it has no
    rivals; and the mean lead of its score over the hardest's."""
    split, pool, shown = corpus.splits[name], corpus.pools["t2i"], embedded["t2i"]
    asked, right, wrong = [], [], []
    for i, query in enumerate(split.queries["t2i"]):
        answer = pool.row(query.positives[0])
        own = (pool.row(id) for id in split.entities[i])
        if rivals := [row for row in own if row != answer]:
            asked.append(i)
            right.append(answer)
            wrong.append(rivals)
    width = max(map(len, wrong))
    index = torch.tensor([[*some, *[-1] * (width - len(some))] for some in wrong])
    found = elva_kernels.ranking_reward(
        embedded[f"{name}.t2i"][asked], shown[right], shown, negative_index=index
    )
    ranks = [0] * len(split.queries["t2i"])
    for i, rank in zip(asked, found.rank.tolist(), strict=True):
        ranks[i] = rank
    return ranks, float((found.scores[:, 0] - found.scores[:, 1:].amax(1)).mean())


def _probe(embedded: Mapping[str, Tensor], corpus: Corpus, name: str) -> dict[str, float]:
    """Type of grain -> accuracy of a linear probe, fitted on the pictures of training and asked of
    the split's; under `TYPE chance` that of the commonest value."""
    pool = corpus.pools["t2i"]
    asked = {id for query in corpus.splits[name].queries["t2i"] for id in query.positives}
    known = {pool.row(id): own for id, own in corpus.grains.items()
             if id in asked or id in corpus.training}  # fmt: skip
    found = readings(embedded["t2i"], known, frozenset(map(pool.row, asked)))
    return {kind: one.accuracy for kind, one in found.items()} | {
        f"{kind} chance": one.chance for kind, one in found.items()
    }
