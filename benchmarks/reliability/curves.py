"""A training by the kernels and one by the reference's formulas: the same curves.

Both begin with the same seed and go through every stage of the small recipe, the last one by GRPO
and soft ranks, too; every figure of metrics.jsonl at every step is compared, losses, rewards,
advantages and norms of gradients among them.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import elva_kernels
from benchmarks.reliability.crashes import small
from benchmarks.reliability.crashes.forks import apart, ended, forked
from benchmarks.reliability.row import Outcome, Row, Trials
from elva.commands.train import train
from elva.progress import SILENT
from elva.recipe import NegativeConfig
from elva.run import Run
from elva_kernels.backends.table import BACKENDS

STAGES = ("0", "1", "2", "3")
BOUND = 1e-4


def curve(backend: str, steps: int, seed: int) -> list[dict[str, float]]:
    """The figures of each step of all stages, `steps` each, the kernels by a backend."""
    with tempfile.TemporaryDirectory(prefix="elva-curves-") as scratch:
        place, printed = Path(scratch), Path(scratch) / "printed"
        if ended(forked(partial(_train, backend, steps, seed, place), printed)):
            raise RuntimeError(f"{backend}: {printed.read_text(encoding='utf-8')[-3000:]}")
        lines = (place / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _train(backend: str, steps: int, seed: int, place: Path) -> None:
    """What such a process does."""
    for name, known in BACKENDS.items():
        if name not in (backend, "reference"):
            BACKENDS[name] = known._replace(unavailable_reason=lambda: "another one is compared")
    recipe = small.recipe(small.corpus(place / "corpus"))
    stages = {name: replace(recipe.stages[name], steps=steps) for name in STAGES}
    stages["3"] = replace(
        stages["3"], policy=1.0, pathwise=0.5, num_generations=3,
        negatives=NegativeConfig(given=0, mined=3, random=2, in_batch=False),
    )  # fmt: skip
    recipe = replace(recipe, stages=stages, controls={}, seed=seed, save_seconds=1e9)
    train(Run.create(place / "run", recipe), SILENT)


def trials(wanted: Trials) -> Outcome:
    """Steps of both, as many of each stage."""
    steps = -(-wanted.count // len(STAGES))
    seed = wanted.seed + wanted.first
    curves = [curve(backend, steps, seed) for backend in ("cpu", "reference")]
    outcome = Outcome(tried=wanted.count)
    if len(curves[0]) != len(curves[1]) or len(curves[0]) < wanted.count:
        outcome.wrong.append(f"seed {seed}: {len(curves[0])} and {len(curves[1])} steps")
    for ours, theirs in zip(*curves, strict=False):
        compare(ours, theirs, outcome)
    return outcome


def compare(ours: dict[str, float], theirs: dict[str, float], outcome: Outcome) -> None:
    """A step's figures: relative where they are above 1."""
    where = f"stage {ours.get('stage')} step {ours.get('step')}"
    for name in sorted({*ours, *theirs}):
        a, b = ours.get(name), theirs.get(name)
        if not (isinstance(a, (int, float)) and isinstance(b, (int, float))):
            if a != b:
                outcome.wrong.append(f"{where}: {name} is {a}, and {b} by the reference")
            continue
        outcome.counts[name] += 1
        difference = abs(a - b) / max(1.0, abs(b))
        outcome.measured("difference", difference)
        if not difference <= BOUND:
            outcome.wrong.append(f"{where}: {name} is {a}, and {b} by the reference")


ROWS = {
    "curves": Row(
        title="training steps of every stage by the kernels and by the reference, from one seed",
        goal="200, every figure of every step within 1e-4",
        unit="steps",
        amount=200,
        smoke=4,
        chunk=200,
        run=partial(apart, trials),
        said=lambda kept: f"largest difference {kept['most']['difference']:.2g}",
        missing=lambda: elva_kernels.available_backends()["cpu"] or "",
    ),
}
