"""A trained stage of a run: what its model retrieves, and which grains it sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elva.data import Dataset, Item, Pool, Query, load
from elva.data.queries import Queries
from elva.data.schema import TASKS
from elva.errors import UserError
from elva.evaluation.columns import columns
from elva.evaluation.grains import by_type, probe
from elva.evaluation.portrait import POINTS, grains_of, plane, pushes, spread
from elva.evaluation.ranks import chance_at_k, rank_all, rank_among, recall_at_k
from elva.evaluation.reading import one_of_a_type, readings
from elva.model.retriever import Retriever
from elva.model.rollout import encode
from elva.processes import Processes, brought_together
from elva.progress import Reporter
from elva.recipe import Recipe, StageConfig
from elva.run import Run, evaluated

AT_ONCE = 4096
"""Ours: items that are opened and tokenised at a time."""


def evaluation_tasks(root: Path, split: str, recipe: Recipe | None = None) -> list[str]:
    """The tasks that are evaluated: those that a split of the data asks, in the order of `TASKS`.

    Args:
        recipe: of them those that its last stage names, where it names any of them.

    Raises:
        DataError: what is wrong with the split; it is read.
    """
    return _tasks(_read(root, split, recipe))


def _read(root: Path, split: str, recipe: Recipe | None) -> Dataset:
    trained = {} if recipe is None else _last(recipe).tasks
    folder = root / "query" / split
    named = [t for t in trained if any(folder.glob(f"mbeir_*_task{TASKS[t]}_{split}.jsonl"))]
    return load(root, split=split, tasks=named or None)


def _tasks(dataset: Dataset) -> list[str]:
    return [task for task in TASKS if task in dataset.pools]


def _last(recipe: Recipe) -> StageConfig:
    return list(recipe.stages.values())[-1]


def evaluate_stage(
    run: Run,
    name: str,
    reporter: Reporter,
    *,
    split: str | None = None,
    retriever: Retriever | None = None,
    processes: Processes | None = None,
) -> dict[str, Any] | None:
    """Evaluate one trained stage from its files and write its `evaluation.json`.

    Args:
        split: one that the data have; None for test, else val.
        retriever: the stage's model, where it is loaded already.
        processes: those that share the work, each of which makes this call.

    Returns:
        What `evaluation.json` holds; None, with a line, where the data have no such split.
    """
    root, there = evaluated(run.recipe)
    if split is None and there is None:
        reporter.finish(f"{run.title(name)}: not evaluated, {root} has no queries of test or val")
        return None
    retriever = Retriever.load(run.model(name)) if retriever is None else retriever
    retriever.freeze_vision(True)
    processes = processes or Processes()
    result = evaluate_model(run, retriever, run.title(name), reporter, processes, split)
    reporter.finish(_line(run.title(name), result))
    if processes.first:
        run.write(name, "evaluation.json", result)
    return result


def evaluate_model(
    run: Run,
    retriever: Retriever,
    title: str,
    reporter: Reporter,
    processes: Processes,
    split: str | None = None,
) -> dict[str, Any]:
    """What `evaluation.json` holds, of the weights of now.

    Raises:
        UserError: the data have no such split.
    """
    started = time.perf_counter()
    root, there = evaluated(run.recipe)
    split = there if split is None else split
    if split is None:
        raise UserError(f"train: {root} must have queries of test or val to be evaluated on")
    dataset = _read(root, split, run.recipe)
    limit = run.recipe.evaluate_limit
    tasks = {task: _Task.of(dataset, task, limit) for task in _tasks(dataset)}
    for name, task in tasks.items():
        if not task.queries.listed("positives").any() and not task.queries.listed("outside").any():
            raise UserError(
                f"{root}: {name} of {split} must have right answers, got none: they are not "
                "published; evaluate another split"
            )
    length = _last(run.recipe).max_completion_length
    encoder = _Encoder(retriever, reporter, title, run.recipe, length, processes)
    result: dict[str, Any] = {"split": split, "figures": {}, "samples": {}}
    training = retriever.plain.training
    retriever.plain.eval()
    with brought_together(retriever):
        for name, task in tasks.items():
            _evaluate_task(name, task, dataset.minimal_pairs, encoder, result, root)
    retriever.plain.train(training)
    result["seconds"] = time.perf_counter() - started
    return result


def _line(title: str, result: Mapping[str, Any]) -> str:
    figures = result["figures"]
    shown = [f"{heading} {figures[key]:.3f}" for key, heading in columns([figures]).items()]
    lost = sum(value for key, value in figures.items() if key.endswith("_no_answer_inside"))
    if lost:
        shown.append(f"queries without an answer in their pool: {lost:,}")
    return f"{title}: {', '.join(shown)} in {result['seconds']:.0f} s"


@dataclass(frozen=True)
class _Task:
    """Queries, and which rows of their pool compete; a place is the position of a row in `rows`."""

    queries: Queries
    pool: Pool
    rows: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, task: str, limit: int | None) -> _Task:
        """All of the task, or `limit` of its queries against their positives and `limit` others,
        both spread evenly over the data: a task is often of several sets."""
        rows = dataset.queries.rows_of(task)
        queries = dataset.queries.select(rows if limit is None else spread(rows, limit))
        pool = dataset.pool(task)
        if limit is None:
            return cls(queries, pool, np.arange(len(pool)))
        right = [pool.row(p) for q in queries for p in q.positives]
        others = np.setdiff1d(np.arange(len(pool)), right)
        return cls(queries, pool, np.array([*dict.fromkeys(right), *spread(others, limit)]))

    def __len__(self) -> int:
        return len(self.rows)

    def shown(self, places: Sequence[int] | range) -> list[Item]:
        """The candidates at some places."""
        return [self.pool[int(self.rows[place])] for place in places]

    def places(self, ids: Sequence[Sequence[str]]) -> list[list[int]]:
        """Places of the candidates of these ids, of those that compete."""
        at = np.full(len(self.pool), -1)
        at[self.rows] = np.arange(len(self.rows))
        known = ([at[self.pool.row(id)] for id in some if id in self.pool] for some in ids)
        return [[int(place) for place in some if place >= 0] for some in known]


@dataclass(frozen=True)
class _Encoded:
    """What a model made of some items."""

    embeddings: Tensor  # [n, D] fp32
    summaries: list[str]
    silent: float  # share of the summaries that never reached [RET]


@dataclass(frozen=True)
class _Encoder:
    """A stage's model, and how it is asked."""

    retriever: Retriever
    reporter: Reporter
    title: str
    recipe: Recipe
    max_completion_length: int
    processes: Processes

    def queries(self, what: str, items: Sequence[Query]) -> _Encoded:
        return self._encode(what, len(items), lambda places: [items[i] for i in places])

    def pool(self, what: str, task: _Task) -> _Encoded:
        return self._encode(what, len(task), task.shown)

    def _encode(self, what: str, count: int, items: Callable[[range], Sequence[Item]]) -> _Encoded:
        own = self.processes.share(count)
        self.reporter.start(f"{self.title}: {what}", len(own), "items")
        model = self.retriever
        embeddings = torch.zeros(len(own), model.embedding_size, dtype=model.embedding_dtype)
        summaries: list[str] = []
        finished = 0
        for start in range(0, len(own), AT_ONCE):
            places = own[start : start + AT_ONCE]
            out = model(
                encode,
                model,
                items(places),
                max_completion_length=self.max_completion_length,
                batch_size=self.recipe.evaluate_batch_size,
                progress=lambda done, start=start: self.reporter.advance(start + done),
            )
            embeddings[start : start + len(places)] = out.embeddings
            summaries += out.summaries
            finished += int(out.finished.sum())
        ended = self.processes.total({"finished": finished})["finished"]
        return _Encoded(
            self.processes.gather(embeddings.to(model.device), count).cpu(),
            self.processes.gather_list(summaries),
            1 - ended / max(1, count),
        )


def _evaluate_task(
    name: str,
    task: _Task,
    minimal_pairs: Mapping[str, Sequence[str]],
    encoder: _Encoder,
    result: dict[str, Any],
    root: Path,
) -> None:
    asked = encoder.queries(f"{name} queries", task.queries)
    shown = encoder.pool(f"{name} pool", task)
    positives = task.places([q.positives for q in task.queries])
    contents = task.pool.identities(task.rows)
    ranking = rank_all(asked.embeddings, shown.embeddings, positives, contents)
    answered = torch.tensor([bool(some) for some in positives])
    figures = result["figures"]
    for k in (1, 5):
        figures[f"{name}_recall_at_{k}"] = recall_at_k(ranking.rank, k)
        figures[f"{name}_chance_at_{k}"] = chance_at_k(positives, len(task), k)
    figures[f"{name}_reward"] = ranking.reward[answered].mean().item() if answered.any() else 0.0
    figures[f"{name}_queries"], figures[f"{name}_pool"] = len(task.queries), len(task)
    figures[f"{name}_no_answer_inside"] = int((~answered).sum())
    if encoder.max_completion_length:  # else nothing is written that could end
        figures[f"{name}_frac_no_ret"] = shown.silent
    result["samples"][name] = [
        {
            "id": q.id,
            "query": q.raw_text,
            "positives": list(q.positives),
            "rank": int(ranking.rank[i]),
            "margin_reward": round(float(ranking.margin_reward[i]), 5),
            "rank_reward": round(float(ranking.rank_reward[i]), 5),
            "summary": asked.summaries[i],
            "top": [
                {"id": task.pool[int(task.rows[place])].id, "summary": shown.summaries[place]}
                for place in ranking.top[i].tolist()
                if place >= 0
            ],
        }
        for i, q in enumerate(task.queries)
    ]
    if "pushes" not in result:
        stage = _last(encoder.recipe)
        found = pushes(asked.embeddings, shown.embeddings, positives, contents, stage)
        if found is not None:
            result["pushes"] = {"task": name, **found}
    _plane(name, task, shown, positives, result)
    _grains(task, asked, encoder, result)
    _readings(name, task, shown, root, result)
    if "minimal_pair_task" not in figures:
        _minimal_pairs(name, task, minimal_pairs, asked, shown, positives, figures)


def _plane(
    name: str,
    task: _Task,
    shown: _Encoded,
    positives: Sequence[Sequence[int]],
    result: dict[str, Any],
) -> None:
    """The right answers' embeddings, of the first task that has three of them, in their plane."""
    places = spread(np.unique([p for some in positives for p in some]).astype(np.int64), POINTS)
    if "plane" in result or len(places) < 3:
        return
    points, explained = plane(shown.embeddings[places])
    grains = grains_of(list(task.queries))
    ids = [item.id for item in task.shown(places.tolist())]
    result["plane"] = {
        "task": name,
        "explained": [round(share, 5) for share in explained],
        "points": [
            {"id": id, "x": round(x, 5), "y": round(y, 5), "grains": grains.get(id, {})}
            for id, (x, y) in zip(ids, points.tolist(), strict=True)
        ],
    }


def _grains(task: _Task, asked: _Encoded, encoder: _Encoder, result: dict[str, Any]) -> None:
    """Grain distances of the first task whose queries have grains."""
    if result.get("grain_distances"):
        return
    found = probe(task.queries, asked.embeddings, lambda q: encoder.queries("grains", q).embeddings)
    result["grain_distances"] = probes = by_type(found)
    result["figures"]["grain_distance"] = {k: fmean(v) for k, v in sorted(probes.items())}


def _readings(name: str, task: _Task, shown: _Encoded, root: Path, result: dict[str, Any]) -> None:
    """What a linear probe reads off the answers, fitted on those of training: of the first task
    whose queries have grains."""
    trained = any((root / "query" / "train").glob(f"mbeir_*_task{TASKS[name]}_train.jsonl"))
    asked = trained and any(query.grains for query in task.queries)
    if not asked or "grain_reading" in result["figures"]:
        return

    def of_answers(queries: Iterable[Query]) -> dict[int, dict[str, str]]:
        known = [*queries]
        right = task.places([query.positives for query in known])
        own = map(one_of_a_type, known)
        return {place: one for one, some in zip(own, right, strict=True) for place in some}

    held_out = of_answers(task.queries)
    grains = of_answers(load(root, split="train", tasks=[name]).queries) | held_out
    found = readings(shown.embeddings, grains, frozenset(held_out))
    result["figures"]["grain_reading"] = {kind: one._asdict() for kind, one in found.items()}


def _minimal_pairs(
    name: str,
    task: _Task,
    minimal_pairs: Mapping[str, Sequence[str]],
    asked: _Encoded,
    shown: _Encoded,
    positives: Sequence[Sequence[int]],
    figures: dict[str, Any],
) -> None:
    """Among the candidates of the query's own entity only: nothing but the small grains decides.
    Of the first task whose queries have them."""
    rivals = task.places([minimal_pairs.get(q.id, ()) for q in task.queries])
    rows = [i for i, found in enumerate(rivals) if len(found) > 1]
    if not rows:
        return
    sizes = [len(set(rivals[i]) | set(positives[i])) for i in rows]
    ranks = rank_among(
        asked.embeddings[rows], shown.embeddings,
        [positives[i] for i in rows], [rivals[i] for i in rows],
    )  # fmt: skip
    figures["minimal_pair_task"] = name
    figures["minimal_pair_recall_at_1"] = recall_at_k(ranks, 1)
    figures["minimal_pair_queries"] = len(rows)
    figures["minimal_pair_pool_mean"] = fmean(sizes)
    figures["minimal_pair_chance"] = fmean(1 / size for size in sizes)
