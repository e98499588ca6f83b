"""A pool of M-BEIR's size, 5.6 M candidates: read once, then mapped.

`python -m benchmarks.bench_pool` writes a pool file of that many rows, reads it strictly into its
table, and opens the table in a fresh process; `benchmarks/results/pool-<machine>.json` keeps what
it saw.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report

ROWS = 5_600_000

OPEN = """
import json, resource, sys, time
from pathlib import Path
from elva.data import mbeir
def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {k: int(v.split()[0]) / 1024 for k, _, v in (l.partition(":") for l in lines)
            if k in ("VmHWM", "RssAnon")}
path, before = Path(sys.argv[1]), held()
began = time.perf_counter()
pool = mbeir.read_pool(path, path.parent)
opened, at_open = time.perf_counter() - began, held()
step = max(1, len(pool) // 10_000)
began = time.perf_counter()
for row in range(0, len(pool), step):
    assert pool.row(pool[row].id) == row
found = (time.perf_counter() - began) / len(range(0, len(pool), step))
after = held()
print(json.dumps({"rows": len(pool), "seconds": opened, "us_a_row_and_back": 1e6 * found,
                  "mb_before": before, "mb_opened": at_open, "mb_after_10000_rows": after}))
"""


def write(path: Path, rows: int) -> None:
    """A pool like M-BEIR's: ids of ten datasets, texts of a dozen words, some pictures."""
    with open(path, "w", encoding="utf-8") as file:
        for n in range(rows):
            picture = None if n % 3 else f"mbeir_images/some_images/{n // 1000}/{n}.jpg"
            row = {
                "txt": f"A candidate with the number {n} and a few more words about what it shows.",
                "img_path": picture,
                "modality": "text" if picture is None else "image,text",
                "did": f"{n % 10}:{n // 10 + 1}",
                "src_content": None,
            }
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "mbeir_union_test_cand_pool.jsonl"
        began = time.perf_counter()
        write(path, rows)
        print(f"wrote {path.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s")
        found = {"machine": report.machine(), "bytes": path.stat().st_size}
        for name in ("first", "mapped"):
            done = subprocess.run(
                [sys.executable, "-c", OPEN, str(path)], check=True, capture_output=True, text=True,
                env={**os.environ, "ELVA_CACHE": f"{place}/cache"},
            )  # fmt: skip
            found[name] = json.loads(done.stdout)
            print(name, done.stdout.strip())
    report.write("pool", found)


if __name__ == "__main__":
    main()
