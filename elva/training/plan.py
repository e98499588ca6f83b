"""Which queries each step trains on: a pure function of (seed, step), so that a resumed run sees
what the unkilled one would have."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch

from elva.draws import permutation, uniforms
from elva.recipe import StageConfig
from elva.training.examples import Examples

NEIGHBOURS = 7
"""Ours: rows that join a query in a hard batch, so that a batch of 64 is of eight such groups."""


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written inside a stage, and how many are kept: the recipe's fields."""

    seconds: float
    steps: int | None = None
    limit: int = 2


@dataclass(frozen=True)
class Batch:
    """One step's queries, as rows of `Examples.queries`."""

    step: int
    rows: list[int]


def plan(
    stage: StageConfig,
    examples: Examples,
    steps: int,
    seed: Sequence[int | str],
    neighbours: Mapping[int, list[int]] | None = None,
) -> list[Batch]:
    """The batches of a stage.

    Where the stage names no shares of its tasks, an epoch is a pass: every query once. With shares
    each batch is of a task drawn by them.

    Args:
        neighbours: row -> rows of queries whose answers it confuses with its own: a batch is then
            made of a few queries and theirs, so that the in-batch negatives are hard.
    """
    if neighbours is not None or stage.tasks:
        chosen = _by_shares(stage, examples, seed, neighbours or {}, steps)
    else:
        chosen = islice(_passes(stage, examples, seed), steps)
    return [Batch(step, rows) for step, rows in enumerate(chosen)]


def steps_an_epoch(stage: StageConfig, examples: Examples) -> int:
    """Batches in which every query is seen once (with shares of tasks: as many queries)."""
    if stage.tasks or stage.batches == "mixed":
        return -(-len(examples) // stage.batch_size)
    return sum(-(-len(rows) // stage.batch_size) for rows in examples.rows.values())


def _passes(
    stage: StageConfig, examples: Examples, seed: Sequence[int | str]
) -> Iterator[list[int]]:
    """Batches of like size, every query once an epoch."""
    parts = list(examples.rows.values())
    if stage.batches == "mixed":
        parts = [np.concatenate(parts)]
    for epoch in count():
        batches: list[np.ndarray] = []
        for place, rows in enumerate(parts):
            order = rows[permutation((*seed, "order", epoch, place), len(rows))]
            batches += np.array_split(order, -(-len(rows) // stage.batch_size))
        for i in permutation((*seed, "batches", epoch), len(batches)):
            yield batches[i].tolist()


def _by_shares(
    stage: StageConfig,
    examples: Examples,
    seed: Sequence[int | str],
    neighbours: Mapping[int, list[int]],
    steps: int,
) -> Iterator[list[int]]:
    tasks = list(examples.shares)
    shares = torch.tensor([examples.shares[t] for t in tasks], dtype=torch.float64)
    edges = (shares / shares.sum()).cumsum(0)
    streams = {t: _forever(examples.rows[t], (*seed, "order", t)) for t in tasks}
    mixed = stage.batches == "mixed"
    shape = (steps, stage.batch_size) if mixed else (steps,)
    drawn = torch.searchsorted(edges, uniforms((*seed, "task"), shape)).clamp_(max=len(tasks) - 1)
    for step in range(steps):
        if mixed:
            found = dict.fromkeys(next(streams[tasks[t]]) for t in drawn[step].tolist())
            yield list(found)
            continue
        task = tasks[int(drawn[step])]
        size = min(stage.batch_size, len(examples.rows[task]))
        rows: dict[int, None] = {}
        while len(rows) < size:
            row = next(streams[task])
            rows.update(dict.fromkeys([row, *neighbours.get(row, [])[:NEIGHBOURS]]))
        yield list(rows)[:size]


def _forever(rows: np.ndarray, seed: Sequence[int | str]) -> Iterator[int]:
    for epoch in count():
        yield from rows[permutation((*seed, epoch), len(rows))].tolist()
