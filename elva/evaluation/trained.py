"""A trained stage of a run: what its model retrieves, and which grains it sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from elva.data import Dataset, Item, Query, load
from elva.evaluation.columns import COLUMNS
from elva.evaluation.grains import by_type, probe
from elva.evaluation.ranks import rank_all, recall_at_k
from elva.model.retriever import Retriever
from elva.model.rollout import Encoded, encode
from elva.progress import Reporter
from elva.run import Run


def evaluate_stage(
    run: Run,
    name: str,
    reporter: Reporter,
    *,
    split: str = "test",
    retriever: Retriever | None = None,
) -> dict[str, Any]:
    """Evaluate one trained stage from its files and write its `evaluation.json`.

    Args:
        retriever: the stage's model, where it is loaded already.
    """
    started = time.perf_counter()
    last = run.recipe.stages[max(run.recipe.stages)]
    retriever = Retriever.load(run.model(name)) if retriever is None else retriever
    dataset = load(run.source(last.data), split=split, tasks=["t2i", "i2t"])
    limit = last.max_completion_length

    def embed(what: str) -> Callable[[Sequence[Item]], Encoded]:
        def call(items: Sequence[Item]) -> Encoded:
            reporter.start(f"{run.title(name)}: {what}", len(items), "items")
            return encode(
                retriever,
                items,
                max_completion_length=limit,
                batch_size=run.recipe.evaluate_batch_size,
                progress=reporter.advance,
            )

        return call

    tasks = {task: _Task.of(dataset, task, run.recipe.evaluate_limit) for task in ("t2i", "i2t")}
    retriever.remember(
        prompt.image
        for task in tasks.values()
        for prompt in map(retriever.inputs.prompt, [*task.queries, *task.pool])
        if prompt.image is not None
    )
    result: dict[str, Any] = {"split": split, "figures": {}, "samples": {}}
    for name_of_task, task in tasks.items():
        _evaluate_task(name_of_task, task, dataset.minimal_pairs, embed, result)
    result["seconds"] = time.perf_counter() - started
    figures = result["figures"]
    reporter.finish(
        f"{run.title(name)}: "
        + ", ".join(f"{COLUMNS[k]} {figures[k]:.3f}" for k in COLUMNS if k in figures)
        + f" in {result['seconds']:.0f} s"
    )
    run.write(name, "evaluation.json", result)
    return result


@dataclass(frozen=True)
class _Task:
    """Queries, the pool they are asked of, and which rows of it are right."""

    queries: list[Query]
    pool: list[Item]
    rows: dict[str, int]

    @classmethod
    def of(cls, dataset: Dataset, task: str, limit: int | None) -> _Task:
        """All of the task, or its first `limit` queries against their positives and `limit`
        more."""
        queries = [q for q in dataset.queries if q.task == task][:limit]
        whole = dataset.pool(task)
        ids = whole.ids
        if limit is not None:
            ids = list(dict.fromkeys([p for q in queries for p in q.positives] + ids[:limit]))
        pool = [whole[whole.row(i)] for i in ids]
        return cls(queries, pool, {i: row for row, i in enumerate(ids)})

    @property
    def positives(self) -> list[list[int]]:
        return [[self.rows[p] for p in q.positives] for q in self.queries]


def _evaluate_task(
    name: str,
    task: _Task,
    minimal_pairs: Mapping[str, Sequence[str]],
    embed: Callable[[str], Callable[[Sequence[Item]], Encoded]],
    result: dict[str, Any],
) -> None:
    asked = embed(f"{name} queries")(task.queries)
    shown = embed(f"{name} pool")(task.pool)
    ranking = rank_all(asked.embeddings, shown.embeddings, task.positives)
    figures = result["figures"]
    for k in (1, 5):
        figures[f"{name}_recall_at_{k}"] = recall_at_k(ranking.rank, k)
    result["samples"][name] = [
        {
            "id": q.id,
            "query": q.raw_text,
            "positives": list(q.positives),
            "rank": int(ranking.rank[i]),
            "summary": asked.summaries[i],
            "top": [
                {"id": task.pool[r].id, "summary": shown.summaries[r]}
                for r in ranking.top[i].tolist()
            ],
        }
        for i, q in enumerate(task.queries)
    ]
    figures[f"{name}_queries"], figures[f"{name}_pool"] = len(task.queries), len(task.pool)
    figures[f"{name}_frac_no_ret"] = 1 - shown.finished.float().mean().item()
    if name == "t2i":
        _minimal_pairs(task, minimal_pairs, asked, shown, figures)
        probes = by_type(
            probe(task.queries, asked.embeddings, lambda q: embed("grains")(q).embeddings)
        )
        figures["grain_distance"] = {k: fmean(v) for k, v in sorted(probes.items())}
        result["grain_distances"] = probes


def _minimal_pairs(
    task: _Task,
    minimal_pairs: Mapping[str, Sequence[str]],
    asked: Encoded,
    shown: Encoded,
    figures: dict[str, Any],
) -> None:
    """Among the pictures of the query's own entity only: nothing but the small grains decides."""
    rivals = {
        i: [task.rows[c] for c in minimal_pairs.get(q.id, ()) if c in task.rows]
        for i, q in enumerate(task.queries)
    }
    rows = [i for i, found in rivals.items() if len(found) > 1]
    if not rows:
        return
    allowed = torch.zeros(len(rows), len(task.pool), dtype=torch.bool)
    for k, i in enumerate(rows):
        allowed[k, rivals[i]] = True
    positives = task.positives
    ranking = rank_all(
        asked.embeddings[rows], shown.embeddings, [positives[i] for i in rows], allowed
    )
    figures["minimal_pair_recall_at_1"] = recall_at_k(ranking.rank, 1)
    figures["minimal_pair_queries"] = len(rows)
    figures["minimal_pair_pool_mean"] = allowed.sum(1).float().mean().item()
    figures["minimal_pair_chance"] = (1 / allowed.sum(1)).mean().item()
