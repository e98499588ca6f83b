"""What was tried to make it go wrong, and how often it did: `python -m benchmarks.reliability ROW`.

Each row has a goal, a number of trials. What has been tried is kept in
benchmarks/results/reliability/ROW.json after every chunk; the same command goes on from there, so
that a long row may be ended at any time. Ends with 1 where a trial went wrong.

    python -m benchmarks.reliability --list
    python -m benchmarks.reliability flips
    python -m benchmarks.reliability adversarial-avx2 --amount 20000 --processes 2
    python -m benchmarks.reliability --table
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.reliability.row import KEPT, measure
from benchmarks.reliability.rows import ROWS
from benchmarks.reliability.table import table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="of --list; all without one")
    parser.add_argument("--amount", type=int, help="trials in all; what the goal asks for")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--processes", type=int, default=1, help="that try at once")
    parser.add_argument("--fresh", action="store_true", help="forget what is kept of the rows")
    parser.add_argument("--smoke", action="store_true", help="few trials, nothing kept: as CI does")
    parser.add_argument("--list", action="store_true", help="rows, their goals and their amounts")
    parser.add_argument("--table", action="store_true", help="what is kept, as Markdown")
    given = parser.parse_args()
    unknown = [name for name in given.rows if name not in ROWS]
    if unknown:
        parser.error(f"ROW must be of --list, got {', '.join(unknown)}")
    if given.list:
        for name, row in ROWS.items():
            print(f"{name:24s} {row.amount:>9,} {row.unit}: {row.goal}")
        return
    if given.table:
        print(table())
        return
    failed = []
    for name in given.rows or ROWS:
        row = ROWS[name]
        if missing := row.missing():
            print(f"{name}: not tried: {missing}", file=sys.stderr)
            continue
        amount = row.smoke if given.smoke else given.amount or row.amount
        with tempfile.TemporaryDirectory(prefix="elva-smoke-") as scratch:
            place = Path(scratch) if given.smoke else KEPT
            if given.fresh and not given.smoke:
                (place / f"{name}.json").unlink(missing_ok=True)
            found = measure(
                name, row, amount, given.seed, processes=given.processes, directory=place
            )
        failed += [f"{name}: {line}" for line in found["wrong"]]
    if failed:
        print(*failed, sep="\n", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
