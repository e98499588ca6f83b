"""Does a ranking reward mitigate grain blindness? `python -m benchmarks.grains`

Makes the starts (models after stage 2, of several seeds), trains every arm of arms.yaml from each
with the same order of data, and writes one file a trial under benchmarks/results/grains. What is
there already is not made again: kill it and start it again at any time.

  python -m benchmarks.grains --dry-run           what is missing, START-SEED of each arm
  python -m benchmarks.grains                     everything; hours on two cores
  python -m benchmarks.grains --arms hard,soft    some arms
  python -m benchmarks.grains --measure test --arms hard,soft    their figures of the test split,
                                                  when nothing is left to choose
  python -m benchmarks.grains --costs --arms hard,soft    their seconds, on a quiet machine
  python -m benchmarks.grains --page              the tables and the plots, from the files
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.grains.arms import arms
from benchmarks.grains.trial import (
    COSTS,
    ENTITIES,
    STARTS,
    Trial,
    begin_worker,
    corpus_of,
    recipe_of_start,
)
from elva.commands.train import train
from elva.files import write_text
from elva.progress import SILENT
from elva.run import Run

COST_TURNS = 2


def make_start(place: Path, seed: int) -> float:
    """Train a start to its plateau, where it is not trained yet; seconds of it."""
    began = time.perf_counter()
    directory, recipe = place / "starts" / str(seed), recipe_of_start(seed)
    known = (directory / "recipe.yaml").is_file()
    run = Run.open(directory) if known else Run.create(directory, recipe)
    if run.recipe != recipe:
        raise SystemExit(f"{directory}: must be a start of this laboratory; name another --place")
    train(run, SILENT, controls=False)
    return time.perf_counter() - began


def trials(
    place: Path, names: Sequence[str], starts: Sequence[int], most: int | None
) -> Iterator[Trial]:
    """Of some arms, a pair of start and seed after the other, so that all arms go on together."""
    deepest = max(arms()[name].described.pairs for name in names)
    for seed in range(deepest if most is None else min(deepest, most)):
        for start in starts:
            for name in names:
                if seed < arms()[name].described.pairs:
                    yield Trial(place, name, start, seed)


def is_start(place: Path, seed: int) -> bool:
    """Whether a start is trained."""
    directory = place / "starts" / str(seed)
    return (directory / "recipe.yaml").is_file() and Run.open(directory).is_trained("2")


def work(place: Path, missing: Sequence[Trial], jobs: int) -> None:
    """Make what is missing, so many at a time, each on one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    starts = [s for s in sorted({trial.start for trial in missing}) if not is_start(place, s)]
    began, done, failed = time.perf_counter(), 0, 0
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=begin_worker) as pool:
        running: dict[Future[float], str] = {}
        for seed in starts:
            running[pool.submit(make_start, place, seed)] = f"start {seed}"
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                label, error = running.pop(future), future.exception()
                if error is not None:
                    raise SystemExit(f"{label} failed: {error!r}")
                print(f"{label}: {future.result():.0f} s", flush=True)
        for trial in missing:
            running[pool.submit(trial.run)] = trial.label
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                label, done = running.pop(future), done + 1
                left = (time.perf_counter() - began) / done * (len(missing) - done) / 60
                error = future.exception()
                failed += error is not None
                what = f"{future.result():.0f} s" if error is None else f"failed: {error!r}"
                print(f"[{done}/{len(missing)}] {label}: {what}, {left:.0f} min left", flush=True)
    if failed:
        raise SystemExit(f"{failed} trials failed; the others are kept, run it again for these")


def measure_costs(place: Path, names: Sequence[str]) -> None:
    """Train each arm alone on one thread, in turns, and keep what it costs beside others' costs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    begin_worker()
    kept = json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.is_file() else {"arms": {}}
    found: dict[str, Any] = {name: {"seconds": [], "first": None} for name in names}
    for turn in range(COST_TURNS):
        for name in names:
            seconds, first = Trial(place, name, STARTS[0], 0).cost()
            found[name]["seconds"].append(round(seconds, 1))
            found[name]["first"] = first if first is None else round(first, 4)
            print(f"[{turn + 1}/{COST_TURNS}] {name}: {seconds:.0f} s", flush=True)
    kept = {"machine": report.machine(), "arms": kept["arms"] | found}
    write_text(COSTS, json.dumps(kept) + "\n")


def measure(split: str, every: Sequence[Trial]) -> None:
    """Figures of a split for trials that are done, from their embeddings."""
    for trial in every:
        if not (trial.is_done and trial.embeddings.is_file()):
            raise SystemExit(
                f"--measure: {trial.label} must be done, with its embeddings under --place; run it"
            )
    for n, trial in enumerate(every, 1):
        trial.measure(split)
        print(f"[{n}/{len(every)}] {trial.label}", flush=True)


def keep_entities() -> None:
    """Keep which queries ask for one entity: a piece of evidence, to the statistics of the page."""
    splits = corpus_of(recipe_of_start(STARTS[0])).splits
    found = {name: split.entity_numbers() for name, split in splits.items()}
    write_text(ENTITIES, json.dumps(found) + "\n")


def arm_names(text: str) -> list[str]:
    """Some arms by name."""
    names = text.split(",")
    if unknown := [name for name in names if name not in arms()]:
        raise argparse.ArgumentTypeError(
            f"must be names of benchmarks/grains/arms.yaml with commas between, got {unknown[0]!r}"
        )
    return names


def start_numbers(text: str) -> list[int]:
    """Some starts by their seeds."""
    known = {str(seed): seed for seed in STARTS}
    if unknown := [word for word in text.split(",") if word not in known]:
        raise argparse.ArgumentTypeError(
            f"must be of {', '.join(known)} with commas between, got {unknown[0]!r}"
        )
    return [known[word] for word in text.split(",")]


def count(text: str) -> int:
    """A number of things, one or more."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 10_000):
        raise argparse.ArgumentTypeError(f"must be a whole number over 0, got {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grains", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--place", type=Path, default=Path("runs/grains"),
                        help="of starts, runs and embeddings (default: runs/grains)")  # fmt: skip
    parser.add_argument("--arms", type=arm_names, default=[*arms()], metavar="A,B",
                        help="some of them (default: all)")  # fmt: skip
    parser.add_argument("--starts", type=start_numbers, default=[*STARTS], metavar="0,1",
                        help="some of them (default: all)")  # fmt: skip
    parser.add_argument("--seeds", type=count, help="at most so many seeds a start")
    parser.add_argument("--jobs", type=count, default=2, help="trials at a time (default: 2)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="what is missing, and nothing else")
    only.add_argument("--measure", choices=("val", "test"),
                      help="figures of a split, from the embeddings of trials")  # fmt: skip
    only.add_argument("--costs", action="store_true", help="measure what the arms cost")
    only.add_argument(
        "--page", action="store_true", help="print every table, draw the plots under results/grains"
    )
    asked = parser.parse_args()
    if asked.page:
        from benchmarks.grains import page

        page.main()
        return
    place = asked.place.resolve()
    every = [*trials(place, asked.arms, asked.starts, asked.seeds)]
    if asked.measure:
        measure(asked.measure, every)
        keep_entities()
        return
    if asked.costs:
        if not is_start(place, STARTS[0]):
            parser.error(f"--costs: start {STARTS[0]} must be trained under {place}; run an arm")
        measure_costs(place, [name for name in asked.arms if arms()[name].stage is not None])
        return
    missing = [trial for trial in every if not trial.is_done]
    print(f"{len(every)} trials of {len(asked.arms)} arms, {len(missing)} missing", flush=True)
    if asked.dry_run:
        for name in asked.arms:
            if own := [f"{one.start}-{one.seed}" for one in missing if one.arm == name]:
                print(f"  {name} ({arms()[name].described.what}): {' '.join(own)}")
    elif missing:
        work(place, missing, asked.jobs)
        keep_entities()


if __name__ == "__main__":
    main()
