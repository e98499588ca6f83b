"""Search, indexes built and changed, and steps of training in a loop, by seconds: what a process
holds does not grow."""

from __future__ import annotations

import gc
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.reliability.load.memory import descriptors, missing, resident_mb
from benchmarks.reliability.row import Outcome, Row, Trials
from elva.index import Index
from elva.index.compact import compact
from elva.integrations.examples.pairs import Pairs, TwoTowers
from elva.model.identity import Identity
from elva_kernels import in_batch_ranking_reward, info_nce

MOST_MB = 64.0
MOST_DESCRIPTORS = 4
ROWS, DIM = 2000, 64
MODEL = Identity("drawn", "r", "p")


def indexed(place: Path, number: int) -> Counter[str]:
    """An index built, searched, changed, searched and compacted; each row finds itself."""
    drawn = torch.Generator().manual_seed(number)
    rows = torch.randn(ROWS, DIM, generator=drawn)
    index = Index.build(place, [f"{i}" for i in range(ROWS)], rows, model=MODEL, overwrite=True)
    index = index.delete([f"{i}" for i in range(0, ROWS, 2)])
    index = index.add(["new"], rows[:1], model=MODEL)
    index = compact(index.directory)
    own = torch.cat([rows[1:200:2], rows[:1]])
    found = index.search(own, 3)
    ids = [index.ids([int(row)])[0] for row in found.rows[:, 0]]
    assert ids == [*(f"{i}" for i in range(1, 200, 2)), "new"], "a row does not find itself"
    return Counter(indexes=1, questions=len(own))


def trained(number: int) -> Counter[str]:
    """Steps of the two losses, whose parameters stay finite."""
    model, pairs = TwoTowers(), Pairs(64, seed=number, copies=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(10):
        batch = pairs[torch.arange(64)]
        query, candidates = model(batch["query"], batch["candidates"])
        if step % 2:
            loss = -in_batch_ranking_reward(query, candidates).reward.mean()
        else:
            loss = info_nce(query, candidates, symmetric=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(x.isfinite().all() for x in model.parameters()), "a parameter is not finite"
    return Counter(steps=10)


def rounds(seconds: float, place: Path, first: int) -> Iterator[Counter[str]]:
    """What was done by rounds numbered `first` on, until the time is over; once at least."""
    end, number = time.monotonic() + seconds, first
    while number == first or time.monotonic() < end:
        yield indexed(place / "i", number) + trained(number)
        number += 1


@cache
def at_first() -> tuple[float, int]:
    """Memory and descriptors of this process when all was imported and allocated, before any of its
    trials."""
    with tempfile.TemporaryDirectory(prefix="elva-soak-") as scratch:
        for _ in rounds(0, Path(scratch), 0):
            gc.collect()
    return resident_mb(), descriptors()


def trials(wanted: Trials) -> Outcome:
    """As many seconds of work."""
    outcome = Outcome(tried=wanted.count)
    before, opened = at_first()
    with tempfile.TemporaryDirectory(prefix="elva-soak-") as scratch:
        try:
            for done in rounds(wanted.count, Path(scratch), 1_000 * (wanted.first + wanted.seed)):
                outcome.counts.update(done)
        except Exception as error:  # noqa: BLE001  it is what the row is about
            outcome.wrong.append(f"second {wanted.first}: {type(error).__name__} {error}"[:400])
        gc.collect()
        grown, more = resident_mb() - before, descriptors() - opened
    if grown > MOST_MB or more > MOST_DESCRIPTORS:
        outcome.wrong.append(
            f"second {wanted.first}: {grown:.0f} MB and {more} descriptors more than before"
        )
    outcome.measured("MB grown", round(grown, 1))
    outcome.measured("MB resident", round(resident_mb(), 1))
    outcome.measured("descriptors more", more)
    return outcome


def said(kept: Mapping[str, Any]) -> str:
    counts, most = kept["counts"], kept["most"]
    return (
        f"{counts['indexes']:,} indexes, {counts['questions']:,} questions, {counts['steps']:,} "
        f"steps; at most {most['MB resident']:,.0f} MB, {most['descriptors more']:.0f} descriptors "
        "more"
    )


ROW = Row(
    title="search, indexes and steps of training in a loop: memory and descriptors",
    goal="24 h, no growth",
    unit="seconds",
    amount=86_400,
    smoke=2,
    chunk=600,
    run=trials,
    said=said,
    missing=missing,
)
