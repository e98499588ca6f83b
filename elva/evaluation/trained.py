"""`elva evaluate`: what a run's models retrieve, and which grains they see.

Ranks are exact and pessimistic: they come from `elva_kernels.ranking_reward` itself, with every
other candidate of the pool as a negative, so a tie counts against the positive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import elva_kernels
from elva.data import Dataset, Item, Query, load
from elva.data import emoji as emoji_corpus
from elva.evaluation.grains import by_type, probe
from elva.model.retriever import Retriever
from elva.model.rollout import Encoded, encode
from elva.progress import Reporter
from elva.run import Run, RunError

COLUMNS = {
    "t2i_recall_at_1": "t→i R@1",
    "t2i_recall_at_5": "t→i R@5",
    "i2t_recall_at_1": "i→t R@1",
    "i2t_recall_at_5": "i→t R@5",
    "minimal_pair_recall_at_1": "pairs R@1",
}
"""Figures of an evaluation, and their column headings."""


@dataclass(frozen=True)
class Ranking:
    """One task's queries against its pool."""

    rank: Tensor  # [Q] int32, 1-based, pessimistic; of the best-placed positive
    top: Tensor  # [Q, 5] pool rows, best first


def recall_at_k(rank: Tensor, k: int) -> float:
    """Share of queries whose best positive is among the first k: M-BEIR's hit@k."""
    return (rank <= k).float().mean().item()


def rank_all(
    query: Tensor, pool: Tensor, positives: Sequence[Sequence[int]], allowed: Tensor | None = None
) -> Ranking:
    """Rank every query's best positive among the pool.

    Args:
        query: [Q, D] fp32; pool: [P, D] fp32.
        positives: pool rows of each query's right answers.
        allowed: [Q, P] bool, the candidates that compete (the positive always does); None for all.
    """
    best = torch.tensor([_best(query[i], pool, rows) for i, rows in enumerate(positives)])
    competes = torch.ones(len(query), len(pool), dtype=torch.bool) if allowed is None else allowed
    mask = competes.clone()
    for i, rows in enumerate(positives):
        mask[i, list(rows)] = False
    out = elva_kernels.ranking_reward(query, pool[best], pool.expand(len(query), -1, -1), mask=mask)
    scores = out.scores[:, 1:].scatter(1, best[:, None], out.scores[:, :1])
    top = scores.sort(dim=1, descending=True, stable=True).indices[:, :5]
    return Ranking(out.rank, top)


def _best(query: Tensor, pool: Tensor, rows: Sequence[int]) -> int:
    if len(rows) == 1:
        return rows[0]
    return list(rows)[int(torch.cosine_similarity(query[None], pool[list(rows)]).argmax())]


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
    dataset = load(source(last.data, run), split=split, tasks=["t2i", "i2t"])
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


def source(data: str, run: Run | None = None) -> Path:
    """Where a stage's data lies: the embedded corpus, built on first use, or a directory."""
    if data == "emoji":
        size = 64 if run is None else run.recipe.model.scratch.image_size
        return emoji_corpus.cached(size)
    path = Path(data)
    if not path.is_dir():
        raise RunError(
            f"{path}: must be a directory in M-BEIR's layout; see elva data emoji --help"
        )
    return path


def evaluate(
    run: Run, reporter: Reporter, names: Sequence[str] | None = None, *, split: str = "test"
) -> dict[str, dict[str, Any]]:
    """Evaluate the named stages (all that are trained, for None); {name: its evaluation}."""
    wanted = list(names) if names is not None else run.trained
    if not wanted:
        raise RunError(
            f"{run.directory}: must hold a trained stage; finish it with elva train --resume"
        )
    for name in wanted:
        if not run.is_trained(name):
            raise RunError(
                f"{run.directory}: stage {name!r} must be trained first; "
                f"trained so far: {', '.join(run.trained) or 'none'}"
            )
    return {name: evaluate_stage(run, name, reporter, split=split) for name in wanted}
