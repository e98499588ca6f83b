"""The training table from finished runs: `python -m benchmarks.train_seeds RUN...`.

Keeps each run's figures as results/train-<recipe>-seed-<seed>.json and prints the table; of several
seeds, the means with each figure's lowest and highest.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import report
from elva.evaluation.columns import columns
from elva.report.table import as_json
from elva.run import Run


def keep(run: Run) -> dict[str, Any]:
    """Write a run's figures to the results."""
    facts = json.loads((run.directory / "run.json").read_text(encoding="utf-8"))
    kept = {"device": report.machine()["device"], "run": facts, "figures": as_json(run)}
    kept["figures"]["run"] = run.directory.name
    path = report.RESULTS / f"train-{facts['recipe']}-seed-{facts['seed']}.json"
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return kept


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row a stage, `mean (lowest to highest)` over the runs."""
    shown = columns(row["figures"] for run in runs for row in run["figures"]["rows"])
    heads = ["after", *shown.values(), "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for rows in zip(*(r["figures"]["rows"] for r in runs), strict=True):
        kind = rows[0]["kind"]
        values = [[row["figures"][key] for row in rows] for key in shown]
        spread = [f" ({min(v):.3f} to {max(v):.3f})" if len(v) > 1 else "" for v in values]
        cells = [f"{fmean(v):.3f}{between}" for v, between in zip(values, spread, strict=True)]
        seconds = f"{fmean(row['seconds'] for row in rows):.0f}"
        lines.append(f"| {kind} {rows[0]['name']} | " + " | ".join([*cells, seconds]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_seeds", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="finished run directories, one a seed")
    arguments = parser.parse_args()
    print(table([keep(Run.open(directory)) for directory in arguments.runs]))


if __name__ == "__main__":
    main()
