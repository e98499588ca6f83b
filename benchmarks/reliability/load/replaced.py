"""Readers of an index, opened anew for each question, while a writer replaces it again and again:
each answer is that of one whole index, with its own scores."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.reliability.child import findable
from benchmarks.reliability.row import Outcome, Row, Trials
from elva.index import Index
from elva.model.identity import Identity

ROWS_OF_INDEX, DIM, K, QUERIES, READERS = 300, 16, 5, 4, 4
MODEL = Identity("drawn", "r", "p")


def vectors(generation: int) -> torch.Tensor:
    """[300, 16] rows of the index that the writer wrote as this one."""
    drawn = torch.Generator().manual_seed(generation)
    return torch.randn(ROWS_OF_INDEX, DIM, generator=drawn)


def write(place: Path, generation: int) -> None:
    ids = [f"{generation}-{i}" for i in range(ROWS_OF_INDEX)]
    Index.build(place, ids, vectors(generation), model=MODEL, dtype="float32", overwrite=True)


def replacing(place: Path, stop: Event) -> None:
    """The writer, a process of its own."""
    generation = 1
    while not stop.is_set():
        write(place, generation)
        generation += 1


@lru_cache(maxsize=64)
def right(generation: int, number: int, seed: int) -> tuple[list[list[str]], np.ndarray]:
    """Ids and cosines of the best rows, by plain float64."""
    query, rows = asked(number, seed).double().numpy(), vectors(generation).double().numpy()
    cosines = query @ rows.T
    cosines /= np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
    best = np.argsort(-cosines, axis=1)[:, :K]
    ids = [[f"{generation}-{i}" for i in row] for row in best]
    return ids, np.take_along_axis(cosines, best, 1)


def asked(number: int, seed: int) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randn(QUERIES, DIM, generator=drawn)


def question(place: Path, number: int, seed: int) -> tuple[int, float]:
    """The generation that answered, and milliseconds to open the index and to be answered.

    Raises:
        AssertionError: an answer of no one index.
    """
    began = time.perf_counter()
    index = Index(place, verify=number % 4 == 0)
    found = index.search(asked(number, seed), K)
    took = 1e3 * (time.perf_counter() - began)
    ids = [index.ids(row.tolist()) for row in found.rows]
    generations = {int(name.split("-")[0]) for row in ids for name in row}
    assert len(generations) == 1, f"rows of several: {generations}"
    (generation,) = generations
    wanted, cosines = right(generation, number, seed)
    assert ids == wanted, f"{ids} for {wanted}"
    apart = float(np.abs(found.scores.double().numpy() - cosines).max())
    assert apart <= 1e-6, f"scores are {apart:.1e} apart"
    return generation, took


def trials(wanted: Trials) -> Outcome:
    """Questions by four readers at once."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="elva-replaced-") as scratch:
        place = Path(scratch) / "i"
        write(place, 0)
        findable()
        stop = get_context("spawn").Event()
        writer = get_context("spawn").Process(target=replacing, args=(place, stop), daemon=True)
        writer.start()
        while question(place, 0, 0)[0] < 1 and writer.is_alive():
            time.sleep(0.02)  # the process imports what it needs
        times, generations = [], set()

        def tried(number: int) -> str:
            try:
                generation, took = question(place, number, wanted.seed)
            except Exception as error:  # noqa: BLE001  the next question is asked all the same
                return f"seed {wanted.seed} number {number}: {type(error).__name__} {error}"[:400]
            times.append(took)
            generations.add(generation)
            return ""

        with ThreadPoolExecutor(READERS) as pool:
            lines = [*pool.map(tried, wanted.numbers)]
        if not writer.is_alive():
            lines.append(f"the writer ended by itself, with {writer.exitcode}")
        stop.set()
        writer.join(60)
    outcome.tried = wanted.count
    outcome.wrong += filter(None, lines)
    outcome.counts.update(answers=len(times), indexes_seen=len(generations))
    if times:
        outcome.measured("ms, median", round(float(np.median(times)), 2))
        outcome.measured("ms, 99 of 100", round(float(np.quantile(times, 0.99)), 2))
    return outcome


def said(kept: Mapping[str, Any]) -> str:
    most = kept["most"]
    return (
        f"of {kept['counts']['indexes_seen']:,} indexes; opened and answered in "
        f"{most['ms, median']:.0f} ms, 99 of 100 in {most['ms, 99 of 100']:.0f}"
    )


ROW = Row(
    title="questions by 4 readers while a process replaces the index: each of one whole index",
    goal="20,000, 0 of two indexes",
    unit="questions",
    amount=20_000,
    smoke=40,
    chunk=500,
    run=trials,
    said=said,
)
