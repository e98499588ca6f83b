"""Does a ranking reward mitigate grain blindness? `python -m benchmarks.grains`

Makes the starts (models after stage 2, of several seeds), trains every arm of arms.yaml from each
with the same order of data, and writes one file a trial under benchmarks/results/grains. What is
there already is not made again: kill it and start it again at any time.

  python -m benchmarks.grains --dry-run           what there is and what is missing
  python -m benchmarks.grains                     everything; hours on two cores
  python -m benchmarks.grains --arms hard,soft    some arms
  python -m benchmarks.grains --test hard,soft    their figures of the test split, once
  python -m benchmarks.grains --costs hard,soft   their seconds, one at a time, on a quiet machine
  python -m benchmarks.grains --page              the table and the plots, from the files
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

from benchmarks import report
from benchmarks.grains.arms import arms
from benchmarks.grains.trial import COSTS, Trial, begin_worker, recipe_of_start
from elva.commands.train import train
from elva.files import write_text
from elva.progress import SILENT
from elva.run import Run

STARTS = range(5)
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
                print(f"{running.pop(future)}: {future.result():.0f} s", flush=True)
        for trial in missing:
            label = f"{trial.arm} from start {trial.start}, seed {trial.seed}"
            running[pool.submit(trial.run)] = label
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
    """Train each arm alone on one thread, in turns, and keep the seconds."""
    os.environ["OMP_NUM_THREADS"] = "1"
    begin_worker()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(COST_TURNS):
        for name in names:
            seconds[name].append(round(Trial(place, name, STARTS[0], 0).cost(), 1))
            print(f"[{turn + 1}/{COST_TURNS}] {name}: {seconds[name][-1]:.0f} s", flush=True)
    write_text(COSTS, json.dumps({"machine": report.machine(), "seconds": seconds}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grains", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--place", type=Path, default=Path("runs/grains"),
                        help="of starts, runs and embeddings (default: runs/grains)")  # fmt: skip
    parser.add_argument("--arms", help="some of them, with commas between (default: all)")
    parser.add_argument("--starts", help="some of them, with commas between (default: all)")
    parser.add_argument("--seeds", type=int, help="at most so many seeds a start")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time (default: 2)")
    parser.add_argument("--dry-run", action="store_true", help="what is missing, and nothing else")
    parser.add_argument("--test", metavar="ARMS", help="figures of the test split of some arms")
    parser.add_argument("--costs", metavar="ARMS", help="measure what some arms cost")
    parser.add_argument("--page", action="store_true", help="print the table, draw the plots")
    asked = parser.parse_args()
    if asked.page:
        from benchmarks.grains import page

        page.main()
        return
    names = (asked.test or asked.costs or asked.arms or ",".join(arms())).split(",")
    if unknown := [name for name in names if name not in arms()]:
        parser.error(f"arms must be among {', '.join(arms())}, got {unknown[0]}")
    place = asked.place.resolve()
    if asked.costs:
        measure_costs(place, [name for name in names if arms()[name].stage is not None])
        return
    starts = [int(s) for s in asked.starts.split(",")] if asked.starts else STARTS
    every = [*trials(place, names, starts, asked.seeds)]
    if asked.test:
        for trial in every:
            trial.test()
        return
    missing = [trial for trial in every if not trial.is_done]
    print(f"{len(every)} trials of {len(names)} arms, {len(missing)} missing", flush=True)
    if asked.dry_run:
        for trial in missing:
            print(f"  {trial.arm} from start {trial.start}, seed {trial.seed}")
        return
    if missing:
        work(place, missing, asked.jobs)


if __name__ == "__main__":
    main()
