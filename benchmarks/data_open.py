"""A split of M-BEIR's size: queries and pool read once, checked against each other, then mapped.

`python -m benchmarks.data_open` writes 300,000 queries of three tasks and 300,000 candidates as
M-BEIR's training files, opens them in a process of its own and again in another, and keeps
`benchmarks/results/data-<machine>.json`.
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
from elva.data.instructions import write_instructions

ROWS = 300_000
SETS = {"text": 0, "image": 3, "image,text": 7}
"""Modality of the queries -> task."""

OPEN = """
import json, sys, time
from pathlib import Path
from elva.data import load
def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {k: int(v.split()[0]) / 1024 for k, _, v in (l.partition(":") for l in lines)
            if k in ("VmHWM", "RssAnon")}
before, began = held(), time.perf_counter()
dataset = load(Path(sys.argv[1]))
opened, at_open = time.perf_counter() - began, held()
began, count = time.perf_counter(), 0
for row in range(0, len(dataset.queries), max(1, len(dataset.queries) // 10_000)):
    query = dataset.queries[row]
    assert all(p in dataset.pool(query.task) for p in query.positives)
    count += 1
each = (time.perf_counter() - began) / count
began = time.perf_counter()
assert sum(1 for _ in dataset.queries) == len(dataset.queries)
print(json.dumps({"queries": len(dataset.queries), "tasks": dataset.queries.tasks(),
                  "seconds": opened, "us_a_query": 1e6 * each,
                  "us_a_query_in_order": 1e6 * (time.perf_counter() - began) / len(dataset.queries),
                  "mb_before": before, "mb_opened": at_open, "mb_after_all": held()}))
"""


def write(root: Path, rows: int) -> int:
    """Queries, pool and instructions as M-BEIR has them for training; the files' bytes."""
    prompts = {(query, cand): ["Find it."] for query in SETS for cand in SETS}
    write_instructions(root, "made", 1, prompts)
    paths = [
        root / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl",
        root / "query" / "train" / "mbeir_made_train.jsonl",
    ]
    for path, of in zip(paths, (_candidate, _query), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(of(n, rows)) + "\n" for n in range(rows))
    return sum(path.stat().st_size for path in paths)


def _content(n: int, modality: str, text: str, image: str) -> dict[str, str | None]:
    words = f"Number {n} and a dozen more words about what is said or shown by it, or asked for."
    picture = f"mbeir_images/made_images/{n // 1000}/{n}.jpg"
    return {
        text: words if "text" in modality else None,
        image: picture if "image" in modality else None,
    }


def _candidate(n: int, rows: int) -> dict[str, object]:
    modality = "image" if n % 3 != 1 else "text"
    content = _content(n, modality, "txt", "img_path")
    return {**content, "modality": modality, "did": f"1:{n}", "src_content": None}


def _query(n: int, rows: int) -> dict[str, object]:
    modality, task = list(SETS.items())[n % len(SETS)]
    return {
        "qid": f"1:{n}",
        **_content(n, modality, "query_txt", "query_img_path"),
        "query_modality": modality,
        "query_src_content": None,
        "pos_cand_list": [f"1:{n}", f"1:{(7 * n) % rows}"],
        "neg_cand_list": [f"1:{(n * i + 11) % rows}" for i in range(1, 9)],
        "task_id": task,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "M-BEIR"
        began = time.perf_counter()
        size = write(root, rows)
        print(f"wrote {size / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s")
        found = {"machine": report.machine(), "rows": rows, "bytes": size}
        for name in ("first", "mapped"):
            done = subprocess.run(
                [sys.executable, "-c", OPEN, str(root)], check=True, capture_output=True, text=True,
                env={**os.environ, "ELVA_CACHE": f"{place}/cache"},
            )  # fmt: skip
            found[name] = json.loads(done.stdout)
            print(name, done.stdout.strip())
    report.write("data", found)


if __name__ == "__main__":
    main()
